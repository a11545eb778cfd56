import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pyrage
import pytest
from structlog.testing import capture_logs

from agekms import NativeIdentity, age_backend, write_identities, write_pair, write_recipient
from kms_core.backends import age
from kms_core.backends.age import AgeBackend, KeyFiles, parse_identity, parse_recipient, version_of
from kms_core.envelope import hybrid, x25519
from kms_core.envelope.binding import KeyRef
from kms_core.envelope.x25519 import NoMatch
from kms_core.errors import ConfigurationError
from kms_core.settings import Settings, load

FIRST: Final = x25519.Identity.generate()
SECOND: Final = x25519.Identity.generate()
HYBRID: Final = hybrid.Identity.generate()
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

    assert backend.current_version() == version_of(HYBRID.recipient)
    assert versions_of(backend) == [version_of(one.recipient) for one in (FIRST, SECOND, HYBRID)]
    assert [opens(backend, one) for one in (FIRST, SECOND, HYBRID)] == [True] * 3


def test_without_a_recipient_file_the_last_identity_seals(tmp_path: Path) -> None:
    files = replace(write_pair(tmp_path, FIRST, SECOND, FIRST), public=None)

    assert opened(files).current_version() == version_of(FIRST.recipient)
    assert versions_of(opened(files)) == [version_of(SECOND.recipient), version_of(FIRST.recipient)]


def test_a_version_is_the_digest_of_the_recipient() -> None:
    identity = x25519.Identity(bytes(32))

    assert str(identity.recipient) == "age19ljhmgevsr6vgem8zupsf2sn6j5l0vw6a9etunj9mxfuh7e7vdeqntq0vm"
    assert version_of(identity.recipient) == "7f7af28f"


def test_the_time_of_making_is_read(tmp_path: Path) -> None:
    text = f"# created: 2026-11-24T16:00:00+01:00\n{FIRST.export()}\n# created: today\n{SECOND.export()}\n"
    backend = opened(pair(tmp_path, text, f"{SECOND.recipient}"))

    assert [version.created_at for version in backend.versions()] == [
        datetime(2026, 11, 24, 15, tzinfo=UTC),
        None,
    ]


def test_a_time_belongs_to_the_next_identity_only(tmp_path: Path) -> None:
    text = f"# created: 2026-11-24T16:00:00Z\n{FIRST.export()}\n{SECOND.export()}\n"
    backend = opened(pair(tmp_path, text, f"{SECOND.recipient}"))

    assert backend.versions()[-1].created_at is None


def test_a_recipient_file_may_have_comments(tmp_path: Path) -> None:
    backend = opened(pair(tmp_path, FIRST.export(), f"# in use\n\n {FIRST.recipient} \r\n"))

    assert backend.current_version() == version_of(FIRST.recipient)


@pytest.mark.parametrize("identity", [FIRST, HYBRID], ids=["x25519", "hybrid"])
def test_both_native_types_parse(identity: NativeIdentity) -> None:
    assert parse_identity(identity.export()) == identity
    assert parse_recipient(str(identity.recipient)) == identity.recipient
    assert parse_identity(identity.export().lower()) == identity


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["private_key.txt", "public_key.txt"])
def test_a_missing_file_is_named_with_the_way_to_make_it(tmp_path: Path, name: str) -> None:
    files = write_pair(tmp_path, FIRST)
    (tmp_path / name).unlink()

    assert refusal(files) == (
        f"Cannot read the age key file {tmp_path / name} (No such file or directory): make a pair with "
        f"`kms keygen -o {files.private}` and `kms keygen -y {files.private} > {files.public}`"
    )


def test_a_missing_file_without_a_public_one_is_named_too(tmp_path: Path) -> None:
    assert "kms keygen -y" in refusal(KeyFiles(tmp_path / "gone"))


def test_a_directory_is_no_key_file(tmp_path: Path) -> None:
    assert "(Is a directory)" in refusal(KeyFiles(tmp_path))


def test_a_binary_file_is_no_key_file(tmp_path: Path) -> None:
    files = write_pair(tmp_path, FIRST)
    files.private.write_bytes(b"\xff\xfe" + os.urandom(40))

    assert refusal(files).endswith("are not text")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "\n\n"], ids=["empty", "comment", "blank"])
def test_a_file_without_identities_is_refused(tmp_path: Path, text: str) -> None:
    files = pair(tmp_path, text)

    assert refusal(files) == (
        f"{files.private} holds no age identity: make one with `kms keygen -o {files.private}`"
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
        f"write it anew with `kms keygen -y {files.private} > {files.public}`"
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
        f"{files.private} can be read by others (mode {mode:04o}): run `chmod 600 {files.private}`"
    )


def test_a_private_file_open_to_others_is_a_warning_in_dev(tmp_path: Path) -> None:
    files = write_pair(tmp_path, FIRST)
    files.private.chmod(0o644)
    with capture_logs() as logs:
        AgeBackend(files)

    assert [(line["event"], line["log_level"], line["mode"]) for line in logs] == [
        ("key.file_open_to_others", "warning", "0644")
    ]


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700], ids=oct)
def test_a_private_file_is_fine(tmp_path: Path, mode: int) -> None:
    files = write_pair(tmp_path, FIRST)
    files.private.chmod(mode)
    with capture_logs() as logs:
        AgeBackend(replace(files, strict=True))

    assert logs == []


def test_the_public_file_may_be_open(tmp_path: Path) -> None:
    files = write_pair(tmp_path, FIRST)
    (tmp_path / "public_key.txt").chmod(0o666)

    assert AgeBackend(replace(files, strict=True)).health_check().healthy


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


def test_files_that_become_open_in_prod_are_trouble(tmp_path: Path) -> None:
    backend = opened(replace(write_pair(tmp_path, FIRST), strict=True))
    write_pair(tmp_path, FIRST, SECOND)
    (tmp_path / "private_key.txt").chmod(0o644)

    assert "chmod 600" in backend.health_check().detail
    assert backend.current_version() == version_of(FIRST.recipient)


# -- what hangs on identities ------------------------------------------------------------------------


def test_secrets_are_those_of_all_versions_the_current_last(tmp_path: Path) -> None:
    backend = opened(write_pair(tmp_path, FIRST, SECOND, current=FIRST))
    key = KeyRef("acme", "k", version_of(FIRST.recipient), "age")

    assert len(set(backend.secrets())) == 2
    assert backend.secrets()[-1] == backend.origin_key(key)


def test_health_is_found_by_doing(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    health = age_backend(tmp_path, FIRST).health_check()

    assert health.healthy
    assert before <= health.checked_at <= datetime.now(UTC)


def test_keys_of_another_implementation_serve(tmp_path: Path) -> None:
    theirs = pyrage.x25519.Identity.generate()
    backend = opened(pair(tmp_path, f"{theirs}\n", f"{theirs.to_public()}\n"))

    assert backend.health_check().healthy


def test_nothing_secret_is_shown(tmp_path: Path) -> None:
    shown = repr(age_backend(tmp_path, FIRST, HYBRID).__dict__)

    assert FIRST.export() not in shown
    assert repr(FIRST.secret) not in shown
    assert repr(HYBRID.secret) not in shown


# -- keys by URI -------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Settings:
    """Settings of dev whose own key pair is in place."""
    write_pair(tmp_path / "own", FIRST)
    text = f"""
    [kms.age]
    private_key_path = "{tmp_path}/own/private_key.txt"
    public_key_path = "{tmp_path}/own/public_key.txt"
    data_keys = true
    """
    (tmp_path / "kms.toml").write_text(text)
    return load(tmp_path / "kms.toml", {"HOME": str(tmp_path)})


def test_no_uri_means_the_section_of_settings(config: Settings) -> None:
    backend = age.open_key(None, config)

    assert backend.current_version() == version_of(FIRST.recipient)
    assert backend.data_keys


def test_a_uri_names_both_files(config: Settings, tmp_path: Path) -> None:
    write_pair(tmp_path / "a b", FIRST, SECOND, current=FIRST)
    uri = f"age://{tmp_path}/a%20b/private_key.txt?public={tmp_path}/a%20b/public_key.txt"

    assert age.open_key(urlsplit(uri), config).current_version() == version_of(FIRST.recipient)


def test_a_uri_may_name_the_identity_file_alone(config: Settings, tmp_path: Path) -> None:
    write_pair(tmp_path / "other", FIRST, SECOND, current=FIRST)
    uri = f"age://{tmp_path}/other/private_key.txt"

    assert age.open_key(urlsplit(uri), config).current_version() == version_of(SECOND.recipient)


@pytest.mark.parametrize(
    "uri",
    [
        "age://host{own}/private_key.txt",
        "age://user@{own}/private_key.txt",
        "age:",
        "age://",
        "age:private_key.txt",
        "age://{own}/private_key.txt?pubic={own}/public_key.txt",
        "age://{own}/private_key.txt?public={own}/public_key.txt&mode=0600",
        "age://{own}/private_key.txt?public={own}/public_key.txt&public=/x",
        "age://{own}/private_key.txt?public=",
        "age://{own}/private_key.txt#2",
    ],
    ids=[
        "host", "user", "empty", "no path", "relative", "misspelt option", "unknown option", "option twice",
        "empty option", "fragment",
    ],
)  # fmt: skip
def test_a_wrong_uri_is_refused_with_a_right_one(config: Settings, tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigurationError, match=r"An age key is age:///path/to/private_key\.txt"):
        age.open_key(urlsplit(uri.format(own=tmp_path / "own")), config)


def test_in_prod_a_uri_is_held_to_private_files(tmp_path: Path) -> None:
    write_pair(tmp_path, FIRST)
    (tmp_path / "private_key.txt").chmod(0o644)
    text = '[kms]\nenvironment = "prod"\nprod_backend = "age"\nallow_age_in_prod = true\n[kms.auth]\nmode = "none"'
    (tmp_path / "kms.toml").write_text(text)
    prod = load(tmp_path / "kms.toml", {"HOME": str(tmp_path)})

    with pytest.raises(ConfigurationError, match="chmod 600"):
        age.open_key(urlsplit(f"age://{tmp_path}/private_key.txt"), prod)
