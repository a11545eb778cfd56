from pathlib import Path
from typing import Final

import pytest

from agekms import write_pair
from kms_core import keyring
from kms_core.backends.age import version_of
from kms_core.envelope import x25519
from kms_core.errors import ConfigurationError, UnknownKey
from kms_core.keyring import Key, Keyring
from kms_core.settings import Settings, load

OWN: Final = x25519.Identity.generate()
PAYROLL: Final = x25519.Identity.generate()
NEXT: Final = x25519.Identity.generate()


def settings_of(tmp_path: Path, text: str = "") -> Settings:
    file = tmp_path / "kms.toml"
    file.write_text(text.format(tmp=tmp_path))
    return load(file, {"HOME": str(tmp_path), "KMS_STATE_DIR": str(tmp_path / "state")})


def built(tmp_path: Path, text: str = "") -> Keyring:
    return keyring.build(settings_of(tmp_path, text))


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        built(tmp_path, text)
    return caught.value.detail


@pytest.fixture(autouse=True)
def key_files(tmp_path: Path) -> None:
    """The key of the state directory, and another."""
    write_pair(tmp_path / "state/age", OWN)
    write_pair(tmp_path / "payroll", PAYROLL)


def sealed_by(key: Key, identity: x25519.Identity) -> bool:
    return key.backend.current_version() == version_of(identity.recipient)


# -- which key ---------------------------------------------------------------------------------------


def test_without_settings_the_only_key_is_the_default(tmp_path: Path) -> None:
    keys = built(tmp_path)

    assert list(keys.keys) == ["default"]
    assert keys.named(None) is keys.named("default") is keys.default
    assert sealed_by(keys.default, OWN)


def test_further_ids_are_mapped_by_uri(tmp_path: Path) -> None:
    keys = built(tmp_path, '[kms.keys]\npayroll = "age://{tmp}/payroll/private_key.txt"')

    assert set(keys.keys) == {"default", "payroll"}
    assert sealed_by(keys.named("payroll"), PAYROLL)
    assert sealed_by(keys.named(None), OWN)


def test_the_default_may_have_another_name(tmp_path: Path) -> None:
    keys = built(tmp_path, '[kms]\ndefault_key_id = "main"')

    assert keys.named(None).key_id == "main"
    assert sealed_by(keys.named("main"), OWN)


def test_the_default_may_be_one_of_the_mapped(tmp_path: Path) -> None:
    text = '[kms]\ndefault_key_id = "payroll"\n[kms.keys]\npayroll = "age://{tmp}/payroll/private_key.txt"'
    keys = built(tmp_path, text)

    assert list(keys.keys) == ["payroll"]
    assert sealed_by(keys.named(None), PAYROLL)


def test_a_default_that_is_mapped_needs_no_key_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "state/age/private_key.txt").unlink()
    keys = built(tmp_path, '[kms.keys]\ndefault = "age://{tmp}/payroll/private_key.txt"')

    assert sealed_by(keys.named(None), PAYROLL)


@pytest.mark.parametrize("key_id", ["other", "", "DEFAULT", "default ", "age:///etc/passwd"])
def test_an_unknown_id_is_unknown(tmp_path: Path, key_id: str) -> None:
    with pytest.raises(UnknownKey):
        built(tmp_path).named(key_id)


@pytest.mark.parametrize("accepted", [True, False])
def test_every_key_knows_whether_it_takes_foreign_files(tmp_path: Path, *, accepted: bool) -> None:
    text = f"[kms.age]\naccept_foreign = {str(accepted).lower()}\n"
    keys = built(tmp_path, text + '[kms.keys]\npayroll = "age://{tmp}/payroll/private_key.txt"')

    assert {key.accept_foreign for key in keys.keys.values()} == {accepted}


def test_a_key_names_its_versions_the_current_first(tmp_path: Path) -> None:
    write_pair(tmp_path / "state/age", OWN, NEXT, current=OWN)
    key = built(tmp_path).default
    own, other = version_of(OWN.recipient), version_of(NEXT.recipient)

    assert [ref.version for ref in key.refs("acme")] == [own, other]
    assert key.ref("acme") == key.refs("acme")[0]
    assert (key.ref("acme").tenant, key.ref("acme").key_id, key.ref("acme").backend) == (
        "acme",
        "default",
        "age",
    )


# -- what is refused at start ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[kms.keys]\npayroll = "vualt://v/keys/x"',
            "key 'payroll' names the backend 'vualt', which is not one of: age",
        ),
        (
            '[kms.keys]\npayroll = "age://user:hunter2@host/private_key.txt"',
            "The URI of key 'payroll' holds a password: put it into a file instead",
        ),
        ('[kms.keys]\npayroll = "age://host/private_key.txt"', "An age key is age:///"),
        ('[kms.keys]\npayroll = "age://{tmp}/gone"', "Cannot read the age key file {tmp}/gone"),
        ('[kms.keys]\n"{{}}" = "age://{tmp}/payroll/private_key.txt"', ""),
    ],
    ids=["scheme", "password", "host", "missing file", "key id"],
)
def test_a_wrong_uri_is_refused(tmp_path: Path, text: str, said: str) -> None:
    refused = refusal(tmp_path, text)

    assert refused.startswith(said.format(tmp=tmp_path))
    assert "hunter2" not in refused


def test_a_missing_pair_of_the_active_backend_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state/age/private_key.txt").unlink()

    assert "kms keygen -o" in refusal(tmp_path, "")


def test_a_key_id_with_a_line_break_is_refused(tmp_path: Path) -> None:
    text = '[kms.keys]\n"pay\\n" = "age://{tmp}/payroll/private_key.txt"'

    assert "must be 1 to 80 of A-Z a-z 0-9 _ . -" in refusal(tmp_path, text)


def test_a_backend_that_is_not_there_is_refused(tmp_path: Path) -> None:
    text = '[kms]\nenvironment = "lab"\n[kms.environments.lab]\nbackend = "cosmian"\n'
    refused = refusal(tmp_path, text + '[kms.cosmian]\nserver_url = "https://kms.test"')

    assert refused == "the active backend names the backend 'cosmian', which is not one of: age"
