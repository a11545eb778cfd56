"""Calls of several threads on one transit key go in one request, and each has its own outcome."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import pytest

from kms_core.backends import KeyMissing
from kms_core.backends.vault.client import VaultClient
from kms_core.backends.vault.transit import TransitCipher, _Item
from kms_core.http_client import Busy, PeerAnswer, PeerServer, Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed, KmsError
from support.openbao import Bao, bao, transit

SECRETS: Final = [bytes([n]) * 16 for n in range(200)]
AAD: Final = b"names and context"


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bao, Path]]:
    folder = tmp_path_factory.mktemp("bao")
    server = Bao(folder, audit=folder / "audit.log")
    yield server, folder / "audit.log"
    server.close()


def test_concurrent_calls_share_requests(counted: tuple[Bao, Path]) -> None:
    server, log = counted
    key = server.new_key()
    cipher = transit(server, key)
    with ThreadPoolExecutor(64) as threads:
        wrapped = list(threads.map(lambda secret: cipher.encrypt(secret, "1", AAD), SECRETS))
        opened = list(threads.map(lambda each: cipher.decrypt(each, "1", AAD), wrapped))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    paths = [line["request"]["path"] for line in lines if line["type"] == "request"]

    assert opened == SECRETS
    assert len(set(wrapped)) == len(SECRETS)
    for kind in ("encrypt", "decrypt"):
        assert 0 < paths.count(f"transit/{kind}/{key}") < len(SECRETS) / 2


def outcomes(cipher: TransitCipher, operation: str, *items: _Item) -> list[object]:
    """What a batch of these items gives, each error by its kind."""
    made = cipher._send(operation, items)  # noqa: SLF001 -- else the test would depend on the threads
    return [type(one) if isinstance(one, KmsError) else one for one in made]


def sealed(cipher: TransitCipher, secret: bytes = bytes(16), aad: bytes = AAD) -> _Item:
    wrapped = cipher.encrypt(secret, "1", aad)
    return _Item(AAD, ciphertext=f"vault:v1:{msgspec.json.encode(wrapped).decode().strip(chr(34))}")


def test_a_damaged_item_fails_alone() -> None:
    server = bao()
    cipher = transit(server, server.new_key())
    good, foreign = sealed(cipher), sealed(cipher, aad=b"another context")
    damaged = _Item(AAD, ciphertext="vault:v1:AAAA")
    newer = _Item(AAD, ciphertext=good.ciphertext.replace(":v1:", ":v9:"))
    found = outcomes(cipher, "decrypt", foreign, good, damaged, newer, good)

    assert [one if isinstance(one, type) else cast("Any", one).plaintext for one in found] == [
        DecryptFailed, bytes(16), DecryptFailed, DecryptFailed, bytes(16)
    ]  # fmt: skip


def test_a_version_that_does_not_encrypt_fails_alone() -> None:
    server = bao()
    cipher = transit(server, server.new_key())
    good, late = (_Item(AAD, bytes(16), version) for version in (1, 7))
    first, second, third = outcomes(cipher, "encrypt", good, late, good)

    assert second is BackendUnavailable
    for made in (first, third):
        wrapped = cipher._raw(cast("Any", made).ciphertext, "1")  # noqa: SLF001 -- as encrypt reads it
        assert cipher.decrypt(wrapped, "1", AAD) == bytes(16)


def test_a_missing_key_is_missing_for_all_and_is_not_made() -> None:
    server = bao()
    cipher = transit(server, "nowhere")
    item = _Item(AAD, bytes(16), 1)

    assert outcomes(cipher, "encrypt", item, item) == [KeyMissing] * 2
    with pytest.raises(KeyMissing):
        cipher.versions()


# -- answers of other servers ------------------------------------------------------------------------

SERVER: Final = PeerServer("http://vault.test", "OpenBao or Vault", "kms.transit.address", 1.0)
ITEMS: Final = [_Item(AAD, bytes([n]) * 16, 1) for n in range(3)]


class Scripted:
    """A client whose requests get these answers: a status and a document, or an error."""

    server, token = SERVER, None

    def __init__(self, *answers: tuple[int, object] | KmsError) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    def call(self, method: str, path: str, document: object) -> PeerAnswer:
        del method, path
        self.asked.append(msgspec.to_builtins(document))
        answer = self.answers.pop(0)
        if isinstance(answer, KmsError):
            raise answer
        return PeerAnswer(SERVER, answer[0], json.dumps(answer[1]).encode())


def scripted(*answers: tuple[int, object] | KmsError) -> tuple[TransitCipher, Scripted]:
    client = Scripted(*answers)
    return TransitCipher(cast("VaultClient", client), "transit", "k"), client


def results(*references: str) -> tuple[int, object]:
    made = [{"ciphertext": f"vault:v1:{n}", "reference": each} for n, each in enumerate(references)]
    return 200, {"data": {"batch_results": made}}


def test_no_item_gets_the_outcome_of_another() -> None:
    for answer in (results("1", "0", "2"), results("0", "1"), results("0", "1", "2", "3")):
        cipher, _ = scripted(answer)
        with pytest.raises(BackendUnavailable):
            outcomes(cipher, "encrypt", *ITEMS)
    for answer in (results("0", "1", "2"), results("", "", "")):
        cipher, client = scripted(answer)
        made = outcomes(cipher, "encrypt", *ITEMS)
        assert [cast("Any", one).ciphertext for one in made] == ["vault:v1:0", "vault:v1:1", "vault:v1:2"]
        assert client.asked[0]["type"] == "none"


@pytest.mark.parametrize("whole", [Busy("answers 500"), (400, {"errors": ["refused JSON input"]})])
def test_a_request_that_is_refused_as_a_whole_is_sent_item_by_item(
    whole: tuple[int, object] | KmsError,
) -> None:
    """An item that the server cannot stand fails alone."""
    one = 200, {"data": {"ciphertext": "vault:v1:x"}}
    cipher, client = scripted(whole, one, Busy("answers 500"), one)
    first, second, third = outcomes(cipher, "encrypt", *ITEMS)

    assert second is Busy
    assert cast("Any", first).ciphertext == cast("Any", third).ciphertext == "vault:v1:x"
    assert [each["type"] for each in client.asked] == ["none"] * 4


def test_a_server_that_goes_away_is_asked_no_further() -> None:
    cipher, client = scripted(Busy("answers 500"), Unreachable("gone"))
    assert outcomes(cipher, "encrypt", *ITEMS) == [Unreachable] * 3
    assert len(client.asked) == 2

    cipher, client = scripted(Unreachable("gone"))
    with pytest.raises(Unreachable):
        outcomes(cipher, "encrypt", *ITEMS)
    assert len(client.asked) == 1
