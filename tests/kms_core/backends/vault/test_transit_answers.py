"""Answers of a transit engine that are wrong in one thing, and what goes with each request."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from structlog.testing import capture_logs

from kms_core.backends import KeyMissing
from kms_core.backends.vault.transit import TransitCipher
from kms_protocol.errors import BackendUnavailable
from support import openbao
from support.contract.faults import answer, faulty

SECRET: Final = bytes(range(16))
AAD: Final = b"names and a context"
KEY: Final[dict[str, object]] = {"type": "aes256-gcm96", "latest_version": 2, "keys": {"1": 1, "2": 2}}


@contextmanager
def answering(data: Mapping[str, object]) -> Iterator[TransitCipher]:
    """A cipher whose server answers so, whatever it is asked."""
    with faulty(answer(200, json.dumps({"data": data}).encode())) as front:
        yield TransitCipher(openbao.vault(front.url, token="s.token"), "transit", "pay")


def test_a_wrap_is_what_follows_the_prefix_of_its_version() -> None:
    with answering({"ciphertext": "vault:v2:QUJD"}) as cipher:
        assert cipher.encrypt(SECRET, "2", AAD) == b"ABC"


def test_each_request_bears_the_header_that_an_agent_may_ask_for() -> None:
    """``X-Vault-Request: true``, for listeners with ``require_request_header``."""
    with faulty(answer(200, json.dumps({"data": KEY}).encode())) as front:
        TransitCipher(openbao.vault(front.url, token="s.token"), "transit", "pay").versions()

    assert front.requests
    assert all(b"\r\nX-Vault-Request: true\r\n" in each for each in front.requests)


def test_the_life_of_a_new_token_is_looked_up_at_once(tmp_path: Path) -> None:
    """The old one's life says nothing of it: it may end within the hour that the old one had left."""
    file = tmp_path / "token"
    document = {"data": KEY | {"ttl": 7200, "renewable": True}}
    with faulty(answer(200, json.dumps(document).encode())) as front:
        file.write_text("s.first")
        file.chmod(0o600)
        cipher = TransitCipher(openbao.vault(front.url, token_file=file), "transit", "pay")
        cipher.versions()
        cipher.versions()
        file.write_text("s.second")
        cipher.versions()

        looked_up = [each for each in front.requests if b"/auth/token/lookup-self" in each]
    assert [b"s.second" in each for each in looked_up] == [False, True]


WRONG: Final = {
    "another version": "vault:v1:QUJD",
    "a longer version": "vault:v22:QUJD",
    "text before it": "xvault:v2:QUJD",
    "nothing after it": "vault:v2:",
    "no prefix": "QUJD",
    "no base64": "vault:v2:QU!JD",
    "a line end": "vault:v2:QUJD\n",
}


@pytest.mark.parametrize("ciphertext", WRONG.values(), ids=WRONG)
def test_a_ciphertext_of_another_form_is_refused(ciphertext: str) -> None:
    """What was stored of it would open nothing."""
    with (
        answering({"ciphertext": ciphertext}) as cipher,
        pytest.raises(BackendUnavailable, match="does not answer as OpenBao or Vault does"),
    ):
        cipher.encrypt(SECRET, "2", AAD)


THREE: Final = {"latest_version": 3, "keys": {"1": 1, "3": 1795546983, "2": {"name": "x"}}}


@pytest.mark.parametrize(
    ("record", "versions"),
    [
        ({"latest_version": 1}, ["1"]),
        (THREE | {"min_decryption_version": 2}, ["2", "3"]),
        (THREE | {"min_available_version": 2}, ["2", "3"]),
    ],
    ids=["latest", "minimum of decryption", "minimum available"],
)
def test_a_version_outside_the_bounds_of_its_key_is_not_believed(
    record: dict[str, object], versions: list[str]
) -> None:
    with answering(KEY | record) as cipher:
        assert [version.version for version in cipher.versions()] == versions


def test_a_key_without_its_latest_version_is_refused() -> None:
    with (
        answering(KEY | {"latest_version": 3}) as cipher,
        pytest.raises(BackendUnavailable, match="does not answer as OpenBao or Vault does"),
    ):
        cipher.versions()


def test_a_key_that_is_deleted_for_now_says_how_to_restore_it() -> None:
    with (
        answering(KEY | {"soft_deleted": True}) as cipher,
        pytest.raises(BackendUnavailable, match=r"restore it with `bao write -f transit/keys/pay/soft-"),
    ):
        cipher.versions()


def test_a_404_of_another_server_is_told_from_a_missing_key() -> None:
    with faulty(answer(404, b'{"hello": 1}')) as front:
        cipher = TransitCipher(openbao.vault(front.url, token="s.token"), "transit", "pay")
        with pytest.raises(BackendUnavailable, match="does not answer as OpenBao or Vault does"):
            cipher.versions()
    with faulty(answer(404, b"")) as front:  # RustyVault, for an item that is not there
        cipher = TransitCipher(openbao.vault(front.url, token="s.token"), "transit", "pay")
        with pytest.raises(KeyMissing):
            cipher.versions()


@pytest.mark.parametrize("mark", ["exportable", "allow_plaintext_backup"])
def test_a_key_that_can_leave_its_server_is_told_of_once(mark: str) -> None:
    with answering(KEY | {mark: True}) as cipher, capture_logs() as logs:
        cipher.versions()
        cipher.versions()

    assert [entry["event"] for entry in logs].count("key.exportable") == 1
