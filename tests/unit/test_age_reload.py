from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from structlog.testing import capture_logs

from agekms import NativeIdentity, age_backend, write_identities, write_pair, write_recipient
from kms_core.age import x25519
from kms_core.age.recipients import version_of
from kms_core.age.x25519 import NoMatch
from kms_core.backends import age
from kms_core.backends.age import AgeBackend
from kms_core.envelope.binding import KeyRef

FIRST: Final = x25519.X25519Identity.generate()
SECOND: Final = x25519.X25519Identity.generate()
FILE_KEY: Final = bytes(range(16))


def versions_of(backend: AgeBackend) -> list[str]:
    return [version.version for version in backend.versions()]


def opens(backend: AgeBackend, identity: NativeIdentity) -> bool:
    key = KeyRef("acme", "k", version_of(identity.recipient), backend.name)
    try:
        return backend.unwrap(identity.recipient.wrap(FILE_KEY), key, b"") == FILE_KEY
    except NoMatch:
        return False


# -- rotation without a restart ----------------------------------------------------------------------


def test_an_appended_identity_and_a_new_recipient_are_picked_up(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, FIRST)
    write_identities(tmp_path / "private_key.txt", FIRST, SECOND)

    assert backend.current_version() == version_of(FIRST.recipient)
    assert opens(backend, SECOND)
    write_recipient(tmp_path / "public_key.txt", SECOND)
    assert backend.current_version() == version_of(SECOND.recipient)
    assert versions_of(backend) == [version_of(FIRST.recipient), version_of(SECOND.recipient)]
    assert opens(backend, FIRST)


def test_files_replaced_by_rename_are_picked_up(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, FIRST)
    write_pair(tmp_path / "new", FIRST, SECOND)
    for name in ("private_key.txt", "public_key.txt"):
        (tmp_path / "new" / name).rename(tmp_path / name)

    assert backend.current_version() == version_of(SECOND.recipient)


def test_a_removed_identity_opens_nothing_more(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, FIRST, SECOND)
    assert opens(backend, FIRST)
    write_identities(tmp_path / "private_key.txt", SECOND)

    assert not opens(backend, FIRST)
    with pytest.raises(NoMatch):
        backend.origin_key(KeyRef("acme", "k", version_of(FIRST.recipient), "age"))


def test_a_reload_is_logged_without_keys(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, FIRST)
    write_pair(tmp_path, FIRST, SECOND)
    with capture_logs() as logs:
        backend.current_version()
        backend.current_version()

    assert [line["event"] for line in logs] == ["key.reloaded"]
    assert SECOND.export() not in str(logs)


def test_between_two_looks_the_files_are_taken_to_be_unchanged(tmp_path: Path) -> None:
    backend = AgeBackend(write_pair(tmp_path, FIRST), recheck_s=3600)
    write_pair(tmp_path, FIRST, SECOND)

    assert backend.current_version() == version_of(FIRST.recipient)


def test_a_running_process_looks_at_least_once_a_second() -> None:
    assert age.RECHECK_S < 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda directory: (directory / "private_key.txt").unlink(),
        lambda directory: (directory / "public_key.txt").unlink(),
        lambda directory: (directory / "private_key.txt").write_text("AGE-SECRET-KEY-1HUNTER2\n"),
        lambda directory: (directory / "private_key.txt").write_text(""),
        lambda directory: write_recipient(directory / "public_key.txt", SECOND),
        lambda directory: (directory / "private_key.txt").write_bytes(b"\xff"),
    ],
    ids=["private gone", "public gone", "malformed", "empty", "recipient without identity", "binary"],
)
def test_bad_new_files_leave_the_old_keys_in_use_in_the_open(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    backend = age_backend(tmp_path, FIRST)
    spoil(tmp_path)
    with capture_logs() as logs:
        health = backend.health_check()

    assert not health.healthy
    assert health.detail
    assert backend.current_version() == version_of(FIRST.recipient)
    assert opens(backend, FIRST)
    assert {(line["event"], line["log_level"]) for line in logs} == {("key.reload_failed", "warning")}
    assert "HUNTER2" not in health.detail + str(logs)


def test_trouble_is_over_when_the_files_are_right_again(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, FIRST)
    before = (tmp_path / "private_key.txt").read_bytes()
    (tmp_path / "private_key.txt").write_text("nonsense")
    assert not backend.health_check().healthy
    (tmp_path / "private_key.txt").write_bytes(before)

    assert backend.health_check().healthy
    assert backend.health_check().detail == ""


def test_trouble_is_over_when_the_same_file_is_back(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, FIRST)
    away = (tmp_path / "private_key.txt").rename(tmp_path / "away")
    assert not backend.health_check().healthy
    away.rename(tmp_path / "private_key.txt")

    assert backend.health_check().healthy


def test_files_that_become_open_in_prod_are_trouble(tmp_path: Path) -> None:
    backend = AgeBackend(replace(write_pair(tmp_path, FIRST), strict=True), recheck_s=0)
    write_pair(tmp_path, FIRST, SECOND)
    (tmp_path / "private_key.txt").chmod(0o644)

    assert "chmod 600" in backend.health_check().detail
    assert backend.current_version() == version_of(FIRST.recipient)
