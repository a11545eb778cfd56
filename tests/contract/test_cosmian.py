"""What is Cosmian's own: dialects that open each other's wraps, BulkData, messages of several calls.

What is asked of a server is in ``test_cosmian_requests``.

Tests marked ``cosmian`` run against the server at ``COSMIAN_KMS_URL`` where there is one; the others need
the double: they look at what was sent, or make it misbehave.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from kms_core.backends.batching import BATCHES
from kms_core.backends.cosmian.backend import BULK, CosmianCipher, CosmianKey
from kms_core.backends.cosmian.server import Protocol
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed
from support.contract.cosmian_ciphers import (
    AAD,
    SECRET,
    answering,
    cipher_of,
    configured_key,
    held,
    made,
    settings_of,
)
from support.contract.cosmian_double import NEW, OLD, CosmianDouble
from support.contract.rig_cosmian import cosmian, new_key, server_url
from support.waiting import WAIT_S, until

# -- dialects ----------------------------------------------------------------------------------------


@pytest.mark.cosmian
@pytest.mark.parametrize("seals", ["kmip", "jose"])
@pytest.mark.parametrize("opens", ["kmip", "jose"])
def test_a_wrap_opens_in_every_dialect(seals: Protocol, opens: Protocol) -> None:
    url = server_url(NEW)
    key = new_key(cosmian(url))
    sealing = CosmianCipher(CosmianKey(cosmian(url, seals), key.name))
    opening = CosmianCipher(CosmianKey(cosmian(url, opens), key.name))
    wrapped = sealing.encrypt(SECRET, "1", AAD)

    assert opening.decrypt(wrapped, "1", AAD) == SECRET
    with pytest.raises(DecryptFailed):
        opening.decrypt(wrapped, "1", AAD + b"!")


@pytest.mark.parametrize("protocol", ["kmip", "jose"])
def test_a_wrap_outlives_the_upgrade_of_its_server(protocol: Protocol) -> None:
    with CosmianDouble(OLD) as double:
        wrapped = made(cipher_of(double)).encrypt(SECRET, "1", AAD)
        double.upgrade()

        assert cipher_of(double, protocol).decrypt(wrapped, "1", AAD) == SECRET


def test_the_dialect_is_looked_at_again_after_a_failure_to_reach_the_server() -> None:
    with CosmianDouble(OLD) as double:
        cipher = made(cipher_of(double))
        wrapped = cipher.encrypt(SECRET, "1", AAD)
        double.stop()
        with pytest.raises(Unreachable):
            cipher.decrypt(wrapped, "1", AAD)
        double.upgrade()
        double.start()

        assert cipher.decrypt(wrapped, "1", AAD) == SECRET
        assert double.messages


def test_the_version_is_asked_for_once(double: CosmianDouble) -> None:
    cipher = made(cipher_of(double))
    for _ in range(3):
        cipher.encrypt(SECRET, "1", AAD)

    assert [path for path, _ in double.requests].count("/version") == 1


@pytest.mark.parametrize("version", [OLD, "5.22.1 (OpenSSL 3.0.22)"], ids=["4.24", "5.22"])
def test_jose_on_a_server_without_it_says_what_to_set(version: str) -> None:
    with CosmianDouble(version) as double:
        made(cipher_of(double))

        with pytest.raises(BackendUnavailable, match=r'5\.23: set kms\.cosmian\.protocol = "kmip"'):
            cipher_of(double, "jose").encrypt(SECRET, "1", AAD)


def test_jose_is_spoken_with_the_first_server_that_has_it() -> None:
    with CosmianDouble("5.23.0 (OpenSSL 3.0.22)") as double:
        cipher = made(cipher_of(double, "jose"))

        assert cipher.decrypt(cipher.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET
        assert "/v1/crypto/encrypt" in dict(double.requests)


# -- BulkData, and other wraps than ours ---------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["kmip", "jose"])
def test_a_ciphertext_that_looks_like_bulk_data_is_made_anew(
    double: CosmianDouble, protocol: Protocol
) -> None:
    cipher = made(cipher_of(double, protocol))
    nonces = iter([_bulky_nonce(double), bytes(12)])
    double.store.next_nonce = lambda: next(nonces)
    wrapped = cipher.encrypt(SECRET, "1", AAD)

    assert wrapped[1:13] == bytes(12)
    assert cipher.decrypt(wrapped, "1", AAD) == SECRET


def test_a_server_whose_every_ciphertext_looks_like_bulk_data_is_given_up(double: CosmianDouble) -> None:
    cipher = made(cipher_of(double))
    nonce = _bulky_nonce(double)
    double.store.next_nonce = lambda: nonce

    with pytest.raises(BackendUnavailable, match="AES-GCM cannot have made"):
        cipher.encrypt(SECRET, "1", AAD)


def _bulky_nonce(double: CosmianDouble) -> bytes:
    """One under which our plaintext becomes something that begins as BulkData does."""
    (key,) = double.store.keys.values()
    nonces = (number.to_bytes(12, "big") for number in range(1, 2_000_000))
    return next(nonce for nonce in nonces if double.store.seal(key, b"\x01\x00", b"", nonce)[1] == BULK)


NO_WRAPS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "of bulk data": lambda wrap: wrap[:13] + BULK + wrap[15:],
    "of another form": lambda wrap: b"\x02" + wrap[1:],
    "cut by a byte": lambda wrap: wrap[:-1],
    "longer by a byte": lambda wrap: wrap + b"\0",
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("change", NO_WRAPS.values(), ids=NO_WRAPS)
def test_what_is_no_wrap_of_ours_is_not_sent(double: CosmianDouble, change: Callable[[bytes], bytes]) -> None:
    """A server takes bulk data without its AAD, and a tag that is cut."""
    cipher = made(cipher_of(double))
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    asked = len(double.requests)

    with pytest.raises(DecryptFailed):
        cipher.decrypt(change(wrapped), "1", AAD)
    assert len(double.requests) == asked


def test_a_wrap_of_something_else_under_our_key_does_not_open(double: CosmianDouble) -> None:
    """Whoever may encrypt with the key has not thereby made a wrap."""
    cipher = made(cipher_of(double))
    server, uid = cipher.key.server, cipher.key.uid("1")
    assert uid
    with cipher.key.call():
        sealed = server.seal(uid, b"\x02" + SECRET, AAD)
    assert sealed

    with pytest.raises(DecryptFailed):
        cipher.decrypt(b"\x01" + sealed.nonce + sealed.ciphertext + sealed.tag, "1", AAD)


# -- messages of several calls -----------------------------------------------------------------------


def test_calls_that_wait_go_in_one_message_and_fail_each_alone(double: CosmianDouble) -> None:
    cipher = made(cipher_of(double))
    good = cipher.encrypt(SECRET, "1", AAD)
    bad = good[:-1] + bytes([good[-1] ^ 1])
    double.requests.clear()
    with ThreadPoolExecutor(16) as threads:
        first = []
        for _ in range(BATCHES):
            came, go_on = held(double)
            first.append((threads.submit(cipher.decrypt, good, "1", AAD), go_on))
            assert came.wait(WAIT_S)
        rest = [threads.submit(cipher.decrypt, each, "1", AAD) for each in (good, bad, good, bad, good)]
        until(lambda: cipher.key.server.messages.batcher.waiting == len(rest), "the rest waits")
        for _, go_on in first:
            go_on.set()

        assert [call.result(WAIT_S) for call, _ in first] == [SECRET] * BATCHES
        assert [call.result(WAIT_S) for call in rest[::2]] == [SECRET] * 3
        assert {type(call.exception(WAIT_S)) for call in rest[1::2]} == {DecryptFailed}
    assert double.messages == [*[1] * BATCHES, len(rest)]


def test_a_message_that_fails_fails_all_its_calls(double: CosmianDouble) -> None:
    cipher = made(cipher_of(double))
    with ThreadPoolExecutor(16) as threads:
        gates = []
        for _ in range(BATCHES):
            came, go_on = held(double)
            threads.submit(cipher.encrypt, SECRET, "1", AAD)
            gates.append(go_on)
            assert came.wait(WAIT_S)
        double.faults.append(answering(500, b"Internal server error"))
        rest = [threads.submit(cipher.encrypt, SECRET, "1", AAD) for _ in range(3)]
        until(lambda: cipher.key.server.messages.batcher.waiting == len(rest), "the rest waits")
        for go_on in gates:
            go_on.set()

        assert {type(call.exception(WAIT_S)) for call in rest} == {Busy}
    assert double.messages[-1] == len(rest)


def test_keys_of_one_server_share_its_messages(double: CosmianDouble) -> None:
    """As ``open_key`` makes them: every key of the settings' section calls through one connection."""
    settings = settings_of(double, {"payroll": "cosmian:payroll", "mail": "cosmian:mail"})

    first, second = (configured_key(name, settings) for name in ("payroll", "mail"))
    assert first.server is second.server
