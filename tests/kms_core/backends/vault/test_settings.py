"""Refused values of [kms.transit] and [kms.vault_kv], which are checked only while they are in use."""

from pathlib import Path
from typing import Final

import pytest

from kms_core import keyring
from kms_core.backends.vault.settings import TransitSection
from kms_protocol.errors import ConfigurationError
from support.settings_files import HOME, read, refusal

DEV: Final = "[kms]\ndev_backend = 'transit'\n[kms.transit]\n"
DEV_KV: Final = "[kms]\ndev_backend = 'vault-kv'\n[kms.vault_kv]\n"
PROD: Final = "[kms]\nenvironment = 'prod'\nprod_backend = 'transit'\n[kms.transit]\ntoken_file = '/t'\n"
PLACE: Final = "address = 'https://vault.test:8200'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEV, "kms.transit.address is missing"),
        (DEV_KV, "kms.vault_kv.address is missing"),
        (DEV + "address = 'vault.test:8200'\n", "kms.transit.address: expected https://host"),
        (DEV + "address = 'https://vault test'\n", "kms.transit.address: expected https://host"),
        (DEV + "address = 'https://vault.test:x'\n", "kms.transit.address: expected https://host"),
        (DEV + "address = 'https://u:secret@v'\n", "kms.transit.address: no user, password"),
        (DEV + "address = 'https://v?secret'\n", "kms.transit.address: no user, password, query"),
        (DEV + PLACE, "kms.transit.token_file: name the file"),
        (DEV_KV + PLACE, "kms.vault_kv.token_file: name the file"),
        (DEV + PLACE + "token_file = '/t'\ntoken = 'secret'\n", "and not both"),
        (DEV + PLACE + "token = '${GONE}'\n", "kms.transit.token uses ${GONE}, which is not set"),
        (DEV_KV + PLACE + "token = '${GONE}'\n", "kms.vault_kv.token uses ${GONE}, which is not set"),
        (DEV + PLACE + "token_file = '/t'\nclient_cert = '/c'\n", "belong together"),
        (DEV + PLACE + "token_file = '/t'\nnamespace = 'a b'\n", "kms.transit.namespace: expected a path"),
        (DEV + PLACE + "token_file = '/t'\ntimeout_s = 0\n", "kms.transit.timeout_s: expected float > 0"),
        (
            DEV_KV + PLACE + "token_file = '/t'\nkv_version = 3\n",
            "kms.vault_kv.kv_version: expected one of 1, 2",
        ),
        (PROD + "address = 'http://v'\n", "kms.transit.address: http:// is refused in prod"),
        (PROD + PLACE + "tls_verify = false\n", "tls_verify = false is refused in prod"),
        (
            PROD.replace("token_file = '/t'", "token = 'secret'") + PLACE,
            "kms.transit.token: a credential in the settings themselves is refused in prod",
        ),
    ],
)
def test_incomplete_and_unsafe_sections_in_use_are_refused(tmp_path: Path, text: str, message: str) -> None:
    detail = refusal(tmp_path, text)

    assert message in detail
    assert "secret" not in detail


def test_a_section_that_is_not_in_use_may_be_incomplete(tmp_path: Path) -> None:
    settings = read(tmp_path, "[kms.transit]\ntoken = '${GONE}'\n[kms.vault_kv]\naddress = 'no address'\n")

    assert settings.active_backend == "age"


@pytest.mark.parametrize("uri", ["transit:pay", "TRANSIT:pay"], ids=["lower", "upper"])
def test_a_key_that_names_transit_puts_its_section_in_use(tmp_path: Path, uri: str) -> None:
    assert "kms.transit.address is missing" in refusal(tmp_path, f"[kms.keys]\npay = '{uri}'\n")


def test_a_token_from_a_variable_is_allowed_in_prod(tmp_path: Path) -> None:
    text = PROD.replace("token_file = '/t'", "token = '${VAULT_TOKEN}'") + PLACE
    settings = read(tmp_path, text, HOME | {"VAULT_TOKEN": "s.token"})

    assert settings.backend(TransitSection).token == "s.token"
    assert "s.token" not in repr(settings.backend(TransitSection))


# -- keys ----------------------------------------------------------------------------------------------


def opening(tmp_path: Path, uri: str, more: str = "") -> str:
    """What the keyring says to a key of this URI."""
    token = tmp_path / "token"
    token.write_text("s.token\n")
    token.chmod(0o600)
    scheme = uri.partition(":")[0].replace("-", "_")
    text = f"[kms.keys]\ndefault = '{uri}'\n[kms.{scheme}]\n{PLACE}token_file = '{token}'\n{more}"
    settings = read(tmp_path, text)
    try:
        keyring.build(settings)
    except ConfigurationError as exc:
        return exc.detail
    return ""


@pytest.mark.parametrize(
    "uri",
    [
        "transit:pay",
        "transit:pay-roll.1?mount=team/transit",
        "vault-kv:kms/pay",
        "vault-kv:pay?mount=team/kv",
    ],
)
def test_keys_are_opened_without_a_call_to_the_server(tmp_path: Path, uri: str) -> None:
    assert opening(tmp_path, uri) == ""


@pytest.mark.parametrize(
    "uri",
    [
        "transit:",
        "transit://vault.test/pay",
        "transit:pay?mounts=x",
        "transit:pay?mount=",
        "transit:pay?mount=a&mount=b",
        "transit:pay#x",
        "transit:a/b",
        "transit:-pay",
        "transit:pay?mount=../sys",
        "transit:pay?mount=a//b",
        "transit:p%20y",
        "vault-kv:",
        "vault-kv:/kms",
        "vault-kv:kms/../x",
        "vault-kv:kms%3Fversion=1",
    ],
)
def test_misshapen_keys_are_refused(tmp_path: Path, uri: str) -> None:
    assert "key" in opening(tmp_path, uri)


@pytest.mark.parametrize(
    ("text", "missing"),
    [(DEV, "kms.transit.key_name is missing"), (DEV_KV, "kms.vault_kv.path is missing")],
    ids=["transit", "vault-kv"],
)
def test_the_active_backend_needs_a_key(tmp_path: Path, text: str, missing: str) -> None:
    settings = read(tmp_path, text + PLACE + "token = 's.token'\n")

    with pytest.raises(ConfigurationError, match=missing):
        keyring.build(settings)


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0, "Cannot read the token in"),
        ("", 0o600, "holds no token"),
        ("two\nlines", 0o600, "holds no token"),
        ("höher", 0o600, "holds no token"),
        ("s.token", 0o644, "run `chmod 600"),
    ],
    ids=["missing", "empty", "lines", "not-ascii", "open"],
)
def test_a_token_file_that_cannot_be_used_stops_the_start_in_prod(
    tmp_path: Path, content: str | None, mode: int, message: str
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
        token.chmod(mode)
    text = PROD.replace("/t", str(token)) + PLACE + "key_name = 'pay'\n"
    settings = read(tmp_path, text)

    with pytest.raises(ConfigurationError, match=message) as caught:
        keyring.build(settings)
    assert not content or content not in caught.value.detail


@pytest.mark.parametrize("key", ["ca_file", "client_cert"])
def test_a_tls_file_that_cannot_be_used_stops_the_start(tmp_path: Path, key: str) -> None:
    file = tmp_path / "broken.pem"
    file.write_text("not PEM")
    more = f"{key} = '{file}'\n" + (f"client_key = '{file}'\n" if key == "client_cert" else "")
    detail = opening(tmp_path, "transit:pay", more)

    assert "kms.transit" in detail
    assert str(file) in detail
