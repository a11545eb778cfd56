"""Answers of a Cosmian KMS server that make no sense, and how we show who we are."""

import json
import ssl
from base64 import urlsafe_b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Final

import pytest

from kms_core.backends import KeyMissing
from kms_core.backends.batching import BATCHES
from kms_core.backends.cosmian.backend import CosmianCipher, CosmianKey
from kms_core.backends.cosmian.server import CosmianServer, Protocol
from kms_core.http_client import Busy, PeerServer, Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed, KmsError
from support.contract.cosmian_ciphers import (
    AAD,
    ALICE,
    MALLORY,
    SECRET,
    answering,
    cipher_of,
    configured_key,
    held_back,
    key_of,
    settings_of,
    versions,
    with_first_version,
)
from support.contract.cosmian_double import OLD, CosmianDouble, Fault, Handler, Json
from support.credentials import Authority
from support.waiting import WAIT_S
from support.webhooks import make_localhost_tls


def changed(change: Callable[[Json], Json | None], tag: str) -> Fault:
    """A fault: the right answer, but for the fields of one tag, which are changed, or left out for None."""

    def answer(handler: Handler) -> bool:
        def keep(node: Json) -> Json:
            if isinstance(node.get("value"), list):
                fields = [change(each) if each["tag"] == tag else keep(each) for each in node["value"]]
                return node | {"value": [each for each in fields if each]}
            return node

        body = json.dumps(keep(handler.answer(handler.double.requests[-1][1]))).encode()
        handler.reply(200, "application/json", body)
        return True

    return answer


def refusing(operation: str, reason: str, message: str) -> Fault:
    """A fault: the next message with this operation gets this answer."""

    def answer(handler: Handler) -> bool:
        if f'"{operation}"' not in json.dumps(handler.double.requests[-1][1]):
            handler.double.faults.append(answer)
            return False
        told = {"ResultStatus": "OperationFailed", "ResultReason": reason, "ResultMessage": message}
        fields: list[Json] = [{"tag": "UniqueBatchItemID", "type": "ByteString", "value": "00"}]
        fields += [{"tag": tag, "type": "TextString", "value": value} for tag, value in told.items()]
        body = {"tag": "ResponseMessage", "value": [{"tag": "BatchItem", "value": fields}]}
        handler.reply(200, "application/json", json.dumps(body).encode())
        return True

    return answer


def through(handler: Handler) -> bool:
    """No fault."""
    del handler
    return False


def json_answer(status: int, body: object) -> Fault:
    """A fault: this JSON."""
    return answering(status, json.dumps(body).encode(), "application/json")


def told_by_jose(error: str, description: str, status: int = 422) -> Fault:
    return json_answer(status, {"error": error, "description": description})


ELSEWHERE: Final = "does not answer as Cosmian KMS does"
IMPOSSIBLE: Final = "AES-GCM cannot have made"
OTHER_KEY: Final = changed(lambda field: field | {"value": "other"}, "UniqueIdentifier")
"""A key set answers so, under the name of its newest key."""

OTHER_ORDER: Final = changed(lambda field: field | {"value": "01"}, "UniqueBatchItemID")
NO_ANSWERS: Final = json_answer(200, {"tag": "ResponseMessage", "value": []})
SHORT: Final = json_answer(200, {"kid": "x", "data": "AQAA"})
"""What the server gives for a ciphertext that it took for BulkData."""

WRONG: Final[dict[str, tuple[Protocol, str, Fault, type[KmsError], str]]] = {
    **{
        f"no {part}": ("auto", "encrypt", changed(lambda _: None, part), BackendUnavailable, "")
        for part in ("IVCounterNonce", "AuthenticatedEncryptionTag", "Data", "UniqueIdentifier")
    },
    "sealed by another key": ("auto", "encrypt", OTHER_KEY, BackendUnavailable, "is a key set"),
    "opened by another key": ("auto", "decrypt", OTHER_KEY, BackendUnavailable, "is a key set"),
    "no answers": ("auto", "encrypt", NO_ANSWERS, BackendUnavailable, ELSEWHERE),
    "another order": ("auto", "encrypt", OTHER_ORDER, BackendUnavailable, ELSEWHERE),
    "internal error": ("jose", "encrypt", told_by_jose("crypto_failure", "Redis Error: gone"), Busy, ""),
    "unsupported": ("jose", "encrypt", told_by_jose("unsupported_algorithm", "no"), BackendUnavailable, ""),
    "forbidden": ("jose", "encrypt", told_by_jose("forbidden", "Access denied", 403), BackendUnavailable, ""),
    "another server": ("jose", "encrypt", json_answer(404, "no such page"), BackendUnavailable, ""),
    "internal error of decryption": (
        "jose",
        "decrypt",
        told_by_jose("crypto_failure", "Redis Error"),
        Busy,
        "",
    ),
    "decryption failed": ("jose", "decrypt", told_by_jose("decryption_failed", "no"), DecryptFailed, ""),
    "no base64": ("jose", "decrypt", json_answer(200, {"kid": "x", "data": "A"}), BackendUnavailable, ""),
    "another length": ("jose", "decrypt", SHORT, BackendUnavailable, IMPOSSIBLE),
}


@pytest.mark.parametrize(("protocol", "call", "fault", "kind", "said"), WRONG.values(), ids=WRONG)
def test_an_answer_that_makes_no_sense_is_one_error_of_its_kind(  # noqa: PLR0913, PLR0917 -- a table
    double: CosmianDouble, protocol: Protocol, call: str, fault: Fault, kind: type[KmsError], said: str
) -> None:
    cipher = with_first_version(cipher_of(double, protocol))
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    double.faults.append(fault)

    with pytest.raises(KmsError) as caught:
        cipher.encrypt(SECRET, "1", AAD) if call == "encrypt" else cipher.decrypt(wrapped, "1", AAD)
    assert type(caught.value) is kind
    assert said in caught.value.detail


def test_an_old_server_that_answers_another_operation_is_refused() -> None:
    with CosmianDouble(OLD) as double:
        cipher = with_first_version(cipher_of(double))
        double.faults.append(json_answer(200, {"tag": "CreateResponse", "value": []}))

        with pytest.raises(BackendUnavailable, match=ELSEWHERE):
            cipher.encrypt(SECRET, "1", AAD)


# -- JOSE answers that are well formed and wrong in one thing --------------------------------------------

ALPHABET: Final = ascii_uppercase + ascii_lowercase + digits + "-_"
OTHER_HEADER: Final = urlsafe_b64encode(b'{"alg":"dir","enc":"A256GCM","kid":"other"}').rstrip(b"=").decode()


def member_changed(name: str, change: Callable[[str], str]) -> Fault:
    """A fault: the right answer, with one member changed."""

    def answer(handler: Handler) -> bool:
        body = handler.answer(handler.double.requests[-1][1])
        handler.reply(200, "application/json", json.dumps(body | {name: change(body[name])}).encode())
        return True

    return answer


def test_what_another_key_sealed_is_refused(double: CosmianDouble) -> None:
    """The protected header names the key: one that is not ours would be found out when a file is opened."""
    cipher = with_first_version(cipher_of(double, "jose"))
    cipher.encrypt(SECRET, "1", AAD)
    double.faults.append(member_changed("protected", lambda _: OTHER_HEADER))

    with pytest.raises(BackendUnavailable):
        cipher.encrypt(SECRET, "1", AAD)
    assert cipher.decrypt(cipher.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET


LAX: Final[dict[str, Callable[[str], str]]] = {
    "padded": lambda text: text + "=" * (-len(text) % 4),
    "with a line end": lambda text: f"{text}\n",
    "with another character": lambda text: f"{text[:4]}!{text[4:]}",
    "with bits that no octet holds": lambda text: text[:-1] + ALPHABET[ALPHABET.index(text[-1]) + 1],
}


@pytest.mark.parametrize("change", LAX.values(), ids=LAX)
def test_base64_has_one_form(double: CosmianDouble, change: Callable[[str], str]) -> None:
    """RFC 7515 §2: a lax decoder would read the right plaintext from each of them."""
    cipher = with_first_version(cipher_of(double, "jose"))
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    double.faults.append(member_changed("data", change))

    with pytest.raises(BackendUnavailable):
        cipher.decrypt(wrapped, "1", AAD)
    double.faults.append(member_changed("data", str))
    assert cipher.decrypt(wrapped, "1", AAD) == SECRET


# -- other refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["Locate", "GetAttributes", "Create"])
def test_an_operation_that_is_refused_leaves_as_an_error_of_ours(
    double: CosmianDouble, cipher: CosmianCipher, operation: str
) -> None:
    double.faults.append(refusing(operation, "Operation_Not_Supported", "Database Error: no more room"))

    with pytest.raises(Busy, match="has an internal error"):
        cipher.rotate()


def test_who_cannot_be_told_to_own_a_key_is_no_owner(double: CosmianDouble) -> None:
    with_first_version(cipher_of(double))
    double.faults += [through, through, answering(404, b"")]

    with pytest.raises(BackendUnavailable, match=ELSEWHERE):
        cipher_of(double).versions()


def test_a_version_that_is_not_there_does_not_seal(double: CosmianDouble) -> None:
    with pytest.raises(BackendUnavailable, match="has no version 7"):
        with_first_version(cipher_of(double)).encrypt(SECRET, "7", AAD)


def test_a_call_that_waits_for_the_next_message_waits_no_longer_than_its_timeout(
    double: CosmianDouble,
) -> None:
    """Its time began before the messages that it waits for were sent, so it is the first to give up."""
    server = CosmianServer(PeerServer(double.url, "Cosmian KMS", "kms.cosmian.server_url", 0.5), None)
    cipher = with_first_version(CosmianCipher(CosmianKey(server, "payroll")))
    cipher.encrypt(SECRET, "1", AAD)
    gates = [held_back(double) for _ in range(BATCHES)]
    with server.peer.one_timeout(), ThreadPoolExecutor(BATCHES) as threads:
        calls = [threads.submit(cipher.encrypt, SECRET, "1", AAD) for _ in gates]
        for came, _ in gates:
            assert came.wait(WAIT_S)

        with pytest.raises(Unreachable, match=r"within 0\.5 s"):
            cipher.encrypt(SECRET, "1", AAD)
        assert all(isinstance(call.exception(WAIT_S), Unreachable) for call in calls)
        for _, go_on in gates:
            go_on.set()
    server.peer.close()


def test_a_server_that_gave_up_on_our_request_is_asked_again(
    double: CosmianDouble, cipher: CosmianCipher
) -> None:
    double.faults.append(answering(408, b""))

    with pytest.raises(Busy):
        cipher.versions()
    assert versions(cipher) == ["1"]


def test_credentials_that_are_refused_name_the_settings(two_users: CosmianDouble) -> None:
    cipher = CosmianCipher(key_of(two_users, "bm9ib2R5"))

    with pytest.raises(BackendUnavailable, match=r"check kms\.cosmian\.api_key_file .* or client_cert_file"):
        cipher.versions()


def test_an_api_key_is_read_again_when_its_file_changes(two_users: CosmianDouble, tmp_path: Path) -> None:
    file = tmp_path / "api-key"
    file.write_text(MALLORY)
    file.chmod(0o600)
    with key_of(two_users, ALICE).call():
        key_of(two_users, ALICE).init()
    settings = settings_of(two_users, {}, api_key_file=file)
    cipher = CosmianCipher(configured_key("payroll", settings))
    with pytest.raises(KeyMissing):
        cipher.versions()
    file.write_text(ALICE)

    assert versions(cipher) == ["1"]


def test_a_client_certificate_says_who_we_are(double: CosmianDouble, tmp_path: Path) -> None:
    authority, clients = make_localhost_tls(tmp_path / "servers"), Authority(tmp_path / "clients")
    alice = clients.issue("alice", subject="alice")
    double.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=clients.ca_file)
    double.tls.load_cert_chain(authority.cert_and_key)
    double.tls.verify_mode = ssl.CERT_OPTIONAL
    unnamed = settings_of(double, {}, ca_file=authority.ca_file)
    files = {"client_cert_file": alice.cert, "client_key_file": alice.key}
    named = settings_of(double, {}, ca_file=authority.ca_file, **files)
    with_first_version(CosmianCipher(configured_key("payroll", named)))

    assert {key.owner for key in double.store.keys.values()} == {"alice"}
    with pytest.raises(BackendUnavailable, match="does not accept our credentials"):
        CosmianCipher(configured_key("payroll", unnamed)).versions()
