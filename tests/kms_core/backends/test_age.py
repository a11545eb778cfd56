"""Age keys in files: what is read and refused, and how a running process takes changes up."""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pyrage
import pytest
from structlog.testing import capture_logs

from kms_core.age import mlkem768x25519, x25519
from kms_core.age.x25519 import NoMatch
from kms_core.backends import age
from kms_core.backends.age import AgeBackend
from kms_core.backends.key_files import KeyFiles
from kms_core.envelope.binding import KeyRef, version_of
from kms_core.http_client import Unreachable
from kms_protocol.errors import ConfigurationError, RotationRefused
from support.age_kms import NativeIdentity, age_backend, write_identities, write_pair, write_recipient

FIRST: Final = x25519.X25519Identity.generate()
SECOND: Final = x25519.X25519Identity.generate()
HYBRID: Final = mlkem768x25519.HybridIdentity.generate()
FILE_KEY: Final = bytes(range(16))


def pair(directory: Path, private: str, public: str | None = None) -> KeyFiles:
    files = KeyFiles(directory / "private_key.txt", directory / "public_key.txt")
    write_identities(files.private)
    files.private.write_bytes(private.encode())
    (directory / "public_key.txt").write_text(f"{FIRST.recipient}\n" if public is None else public)
    return files


def opened(files: KeyFiles) -> AgeBackend:
    return AgeBackend(files, recheck_s=0)


def refusal(files: KeyFiles) -> str:
    with pytest.raises(ConfigurationError) as caught:
        AgeBackend(files)
    return caught.value.detail


def versions_of(backend: AgeBackend) -> list[str]:
    return [version.version for version in backend.versions()]


def opens(backend: AgeBackend, identity: NativeIdentity) -> bool:
    key = KeyRef("acme", "k", version_of(identity.recipient), backend.name)
    try:
        return backend.unwrap(identity.recipient.wrap(FILE_KEY), key, b"") == FILE_KEY
    except NoMatch:
        return False


# -- key files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{first}\n",
        "{first}",
        "# created: 2026-11-24T16:00:00Z\n# public key: age1…\n{first}\n",
        "\n\n  {first}  \n\n#{second}\n",
        "# created: 2026-11-24T16:00:00Z\r\n{first}\r\n",
        "{first}\n{first}\n",
        "{lower}\n",
    ],
    ids=["one line", "no line break", "as age-keygen writes", "blanks", "CRLF", "twice", "lower case"],
)
def test_an_identity_file_is_read_as_age_reads_it(tmp_path: Path, text: str) -> None:
    words = {"first": FIRST.export(), "second": SECOND.export(), "lower": FIRST.export().lower()}
    backend = opened(pair(tmp_path, text.format(**words)))

    assert versions_of(backend) == [version_of(FIRST.recipient)]
    assert opens(backend, FIRST)
    assert backend.health_check().healthy


def test_several_identities_open_and_the_recipient_says_which_seals(tmp_path: Path) -> None:
    backend = opened(write_pair(tmp_path, FIRST, HYBRID, SECOND, current=HYBRID))

    assert backend.versions()[-1].version == version_of(HYBRID.recipient)
    assert versions_of(backend) == [version_of(one.recipient) for one in (FIRST, SECOND, HYBRID)]
    assert [opens(backend, one) for one in (FIRST, SECOND, HYBRID)] == [True] * 3


def test_without_a_recipient_file_the_last_identity_seals(tmp_path: Path) -> None:
    files = replace(write_pair(tmp_path, FIRST, SECOND, FIRST), public=None)

    assert opened(files).versions()[-1].version == version_of(FIRST.recipient)
    assert versions_of(opened(files)) == [version_of(SECOND.recipient), version_of(FIRST.recipient)]


def test_a_version_is_the_digest_of_the_recipient() -> None:
    identity = x25519.X25519Identity(bytes(32))

    assert str(identity.recipient) == "age19ljhmg68e43yx9fgm2k9lwefquc0la5y4lzvlshdjzv47kxt8d6qr9vf4p"
    assert version_of(identity.recipient) == "0087f1a8"


@pytest.mark.parametrize("second", ["# created: today\n", ""], ids=["no time", "of the next identity only"])
def test_the_time_of_making_is_read(tmp_path: Path, second: str) -> None:
    text = f"# created: 2026-11-24T16:00:00+01:00\n{FIRST.export()}\n{second}{SECOND.export()}\n"
    backend = opened(pair(tmp_path, text, f"{SECOND.recipient}"))

    made = [version.created_at for version in backend.versions()]
    assert made == [datetime(2026, 11, 24, 15, tzinfo=UTC), None]


def test_a_recipient_file_may_have_comments(tmp_path: Path) -> None:
    backend = opened(pair(tmp_path, FIRST.export(), f"# in use\n\n {FIRST.recipient} \r\n"))

    assert backend.versions()[-1].version == version_of(FIRST.recipient)


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["private_key.txt", "public_key.txt"])
def test_a_missing_file_is_named_with_the_way_to_make_it(tmp_path: Path, name: str) -> None:
    files = write_pair(tmp_path, FIRST)
    (tmp_path / name).unlink()

    assert refusal(files) == (
        f"Cannot read the age key file {tmp_path / name} (No such file or directory): make a pair with "
        f"`kms keygen -o '{files.private}'` and `kms keygen -y '{files.private}' > '{files.public}'`"
    )


def test_neither_a_directory_nor_a_binary_file_is_a_key_file(tmp_path: Path) -> None:
    files = write_pair(tmp_path, FIRST)
    files.private.write_bytes(b"\xff\xfe" + os.urandom(40))

    assert refusal(files).startswith(f"{files.private} is not text: ")
    assert refusal(KeyFiles(tmp_path)) == (
        f"Cannot read the age key file {tmp_path} (Is a directory): check the path and its mode, and run "
        "this as the user of the service"
    )
    assert f"make it with `kms keygen -o '{tmp_path}/gone'` as" in refusal(KeyFiles(tmp_path / "gone"))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "\n\n"], ids=["empty", "comment", "blank"])
def test_a_file_without_identities_is_refused(tmp_path: Path, text: str) -> None:
    files = pair(tmp_path, text)

    assert refusal(files) == (
        f"{files.private} holds no age identity: make one with `kms keygen -o '{files.private}'`"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-1],
        lambda text: text + "Q",
        lambda text: text.replace("AGE", "Age"),
        lambda text: text[:30] + text[31:],
        lambda text: text + " # mine",
        lambda text: "AGE-PLUGIN-YUBIKEY-" + text[16:],
        lambda text: "AGE-SECRET-KEY-PQ-" + text[15:],
        lambda text: "-----BEGIN OPENSSH PRIVATE KEY-----" + text[16:],
    ],
    ids=["cut", "longer", "case", "hole", "comment behind", "plugin", "wrong type", "ssh"],
)
def test_a_malformed_identity_is_named_by_its_line_and_never_quoted(
    tmp_path: Path, spoil: Callable[[str], str]
) -> None:
    text = spoil(FIRST.export())
    files = pair(tmp_path, f"# created: 2026-11-24T16:00:00Z\n{SECOND.export()}\n\n{text}\n")
    said = refusal(files)

    assert said.startswith(f"Line 4 of {files.private} is not an age identity (")
    assert not any(text[start : start + 12] in said for start in range(16, len(text) - 12))


def test_a_recipient_without_its_identity_is_refused(tmp_path: Path) -> None:
    files = write_pair(tmp_path, FIRST, current=SECOND)

    assert refusal(files) == (
        f"The recipient in {files.public} has no identity in {files.private}: "
        f"write it again with `kms keygen -y '{files.private}' > '{files.public}'`"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold one recipient (age1…), it holds 0"),
        (f"{FIRST.recipient}\n{SECOND.recipient}\n", "must hold one recipient (age1…), it holds 2"),
        (str(FIRST.recipient)[:-1], "does not hold an age recipient (a key's checksum is wrong"),
        (FIRST.export(), "does not hold an age recipient (not an X25519 recipient: it should look like"),
        ("age1pq1hunter2", "does not hold an age recipient ("),
        ("ssh-ed25519 AAAA", "does not hold an age recipient (a key has mixed case"),
    ],
    ids=["empty", "two", "cut", "an identity", "hybrid, malformed", "ssh"],
)
def test_a_recipient_file_holds_one_recipient(tmp_path: Path, text: str, said: str) -> None:
    files = pair(tmp_path, FIRST.export(), text)
    refused = refusal(files)

    assert refused.startswith(f"{files.public} {said}")
    assert FIRST.export() not in refused


# -- permissions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o610], ids=oct)
def test_a_private_file_open_to_others_is_refused_in_prod(tmp_path: Path, mode: int) -> None:
    files = write_pair(tmp_path, FIRST)
    files.private.chmod(mode)

    assert refusal(replace(files, strict=True)) == (
        f"{files.private} can be read by others (mode {mode:04o}): run `chmod 600 '{files.private}'`"
    )


def test_a_private_file_open_to_others_is_a_warning_in_dev(tmp_path: Path) -> None:
    files = write_pair(tmp_path, FIRST)
    files.private.chmod(0o644)
    with capture_logs() as logs:
        AgeBackend(files)

    assert [(line["event"], line["log_level"], line["mode"]) for line in logs] == [
        ("key.file_open_to_others", "warning", "0644")
    ]


def test_the_public_file_may_be_open(tmp_path: Path) -> None:
    files = write_pair(tmp_path, FIRST)
    (tmp_path / "public_key.txt").chmod(0o666)

    assert AgeBackend(replace(files, strict=True)).health_check().healthy


# -- what hangs on identities ------------------------------------------------------------------------


def test_secrets_are_those_of_all_versions_the_current_last(tmp_path: Path) -> None:
    backend = opened(write_pair(tmp_path, FIRST, SECOND, current=FIRST))
    key = KeyRef("acme", "k", version_of(FIRST.recipient), "age")

    assert len(set(backend.secrets())) == 2
    assert backend.secrets()[-1] == backend.origin_key(key)


def test_keys_of_another_implementation_serve(tmp_path: Path) -> None:
    theirs = pyrage.x25519.Identity.generate()
    backend = opened(pair(tmp_path, f"{theirs}\n", f"{theirs.to_public()}\n"))

    assert backend.health_check().healthy


def test_nothing_secret_is_shown(tmp_path: Path) -> None:
    shown = repr(age_backend(tmp_path, FIRST, HYBRID).__dict__)

    assert FIRST.export() not in shown
    assert repr(FIRST.secret) not in shown
    assert repr(HYBRID.secret) not in shown


# -- rotation without a restart ----------------------------------------------------------------------


def test_an_appended_identity_and_a_new_recipient_are_picked_up(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, FIRST)
    write_identities(tmp_path / "private_key.txt", FIRST, SECOND)

    assert backend.versions()[-1].version == version_of(FIRST.recipient)
    assert opens(backend, SECOND)
    write_recipient(tmp_path / "public_key.txt", SECOND)
    assert backend.versions()[-1].version == version_of(SECOND.recipient)
    assert versions_of(backend) == [version_of(FIRST.recipient), version_of(SECOND.recipient)]
    assert opens(backend, FIRST)


def test_files_replaced_by_rename_are_picked_up(tmp_path: Path) -> None:
    backend = age_backend(tmp_path, FIRST)
    write_pair(tmp_path / "new", FIRST, SECOND)
    for name in ("private_key.txt", "public_key.txt"):
        (tmp_path / "new" / name).rename(tmp_path / name)

    assert backend.versions()[-1].version == version_of(SECOND.recipient)


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
        backend.versions()
        backend.versions()

    assert [line["event"] for line in logs] == ["key.reloaded"]
    assert SECOND.export() not in str(logs)


def test_between_two_looks_the_files_are_taken_to_be_unchanged(tmp_path: Path) -> None:
    backend = AgeBackend(write_pair(tmp_path, FIRST), recheck_s=3600)
    write_pair(tmp_path, FIRST, SECOND)

    assert backend.versions()[-1].version == version_of(FIRST.recipient)


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
    assert backend.versions()[-1].version == version_of(FIRST.recipient)
    assert opens(backend, FIRST)
    assert {(line["event"], line["log_level"]) for line in logs} == {("key.reload_failed", "warning")}
    assert "HUNTER2" not in health.detail + str(logs)


def test_trouble_is_over_when_the_files_are_right_again_or_the_same_file_is_back(tmp_path: Path) -> None:
    backend, private = age_backend(tmp_path, FIRST), tmp_path / "private_key.txt"
    before = private.read_bytes()
    private.write_text("nonsense")
    assert not backend.health_check().healthy
    private.write_bytes(before)
    assert (backend.health_check().healthy, backend.health_check().detail) == (True, "")

    away = private.rename(tmp_path / "away")
    assert not backend.health_check().healthy
    away.rename(private)
    assert backend.health_check().healthy


def test_files_that_become_open_in_prod_are_trouble(tmp_path: Path) -> None:
    backend = AgeBackend(replace(write_pair(tmp_path, FIRST), strict=True), recheck_s=0)
    write_pair(tmp_path, FIRST, SECOND)
    (tmp_path / "private_key.txt").chmod(0o644)

    assert "chmod 600" in backend.health_check().detail
    assert backend.versions()[-1].version == version_of(FIRST.recipient)


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
