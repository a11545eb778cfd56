from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from structlog.testing import capture_logs

from kms_core.age import x25519
from kms_core.age.mlkem768x25519 import version_of
from kms_core.age.x25519 import NoMatch
from kms_core.backends import age
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope.binding import KeyRef
from kms_core.http_client import Unreachable
from kms_protocol.errors import RotationRefused
from support.age_kms import NativeIdentity, age_backend, write_identities, write_pair, write_recipient

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


# -- several hosts with files of their own ---------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[KeyFiles]:
    """The reads of key files after the first one."""
    found: list[KeyFiles] = []
    load = age._load  # noqa: SLF001 -- counted

    def counted(files: KeyFiles) -> object:
        found.append(files)
        return load(files)

    monkeypatch.setattr(age, "_load", counted)
    return found


def test_an_unknown_version_has_the_files_read_at_once(tmp_path: Path) -> None:
    backend = AgeBackend(write_pair(tmp_path, FIRST), recheck_s=3600)
    write_identities(tmp_path / "private_key.txt", FIRST, SECOND)

    assert opens(backend, SECOND)


def test_a_flood_of_unknown_versions_has_them_read_once(tmp_path: Path, loads: list[KeyFiles]) -> None:
    backend = AgeBackend(write_pair(tmp_path, FIRST), recheck_s=3600)
    loads.clear()
    for number in range(100):
        with pytest.raises(NoMatch):
            backend.unwrap(FIRST.recipient.wrap(FILE_KEY), KeyRef("acme", "k", f"{number:08x}", "age"), b"")

    assert len(loads) == 1


def test_an_unknown_version_that_another_host_may_have_is_no_wrong_file(tmp_path: Path) -> None:
    backend = AgeBackend(write_pair(tmp_path, FIRST), recheck_s=3600)
    backend.elsewhere = lambda **_: ["kms-2"]
    with pytest.raises(Unreachable, match="kms-2"):
        opens(backend, SECOND)
    assert opens(backend, FIRST)
    with pytest.raises(NoMatch):  # a version has another form
        backend.unwrap(SECOND.recipient.wrap(FILE_KEY), KeyRef("acme", "k", "12", "age"), b"")


def test_rotation_is_refused_where_other_hosts_would_not_know_of_it(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, FIRST)
    asked: list[bool] = []

    def elsewhere(asks: bool) -> list[str]:
        asked.append(asks)
        return ["kms-2", "kms-3"]

    backend.elsewhere = elsewhere
    with pytest.raises(RotationRefused, match=r"kms-2, kms-3 .*append a new identity"):
        backend.rotate()

    assert asked == [True]
    assert versions_of(backend) == [version_of(FIRST.recipient)]
