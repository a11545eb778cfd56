"""What is Cosmian's own: dialects, BulkData, messages of several calls, versions, keys of other users.

What is asked of a server is in ``test_kmip_requests``.

Tests marked ``cosmian`` run against the server at ``COSMIAN_KMS_URL`` where there is one; the others need
the double: they look at what was sent, or make it misbehave.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final
from uuid import uuid4

import pytest

from kms_core.backends import KeyMissing
from kms_core.backends.batching import BATCHES
from kms_core.backends.cosmian.backend import BULK, CosmianCipher, CosmianKey
from kms_core.backends.cosmian.server import Protocol
from kms_core.http_client import Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed
from support.contract.cosmian_ciphers import (
    AAD,
    ALICE,
    MALLORY,
    SECRET,
    cipher_of,
    configured_key,
    held_back,
    key_of,
    operations,
    settings_of,
    versions,
    with_first_version,
)
from support.contract.cosmian_double import NEW, OLD, CosmianDouble, Handler
from support.contract.cosmian_store import Key
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
        wrapped = with_first_version(cipher_of(double)).encrypt(SECRET, "1", AAD)
        double.upgrade()

        assert cipher_of(double, protocol).decrypt(wrapped, "1", AAD) == SECRET


def test_the_dialect_is_looked_at_again_after_a_failure_to_reach_the_server() -> None:
    with CosmianDouble(OLD) as double:
        cipher = with_first_version(cipher_of(double))
        wrapped = cipher.encrypt(SECRET, "1", AAD)
        double.stop()
        with pytest.raises(Unreachable):
            cipher.decrypt(wrapped, "1", AAD)
        double.upgrade()
        double.start()

        assert cipher.decrypt(wrapped, "1", AAD) == SECRET
        assert double.batch_counts


def test_the_version_is_asked_for_once(double: CosmianDouble, cipher: CosmianCipher) -> None:
    for _ in range(3):
        cipher.encrypt(SECRET, "1", AAD)

    assert [path for path, _ in double.requests].count("/version") == 1


@pytest.mark.parametrize("version", [OLD, "5.22.1 (OpenSSL 3.0.22)"], ids=["4.24", "5.22"])
def test_jose_on_a_server_without_it_says_what_to_set(version: str) -> None:
    with CosmianDouble(version) as double:
        with_first_version(cipher_of(double))

        with pytest.raises(BackendUnavailable, match=r'5\.23: set kms\.cosmian\.protocol = "kmip"'):
            cipher_of(double, "jose").encrypt(SECRET, "1", AAD)


def test_jose_is_spoken_with_the_first_server_that_has_it() -> None:
    with CosmianDouble("5.23.0 (OpenSSL 3.0.22)") as double:
        cipher = with_first_version(cipher_of(double, "jose"))

        assert cipher.decrypt(cipher.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET
        assert "/v1/crypto/encrypt" in dict(double.requests)


# -- BulkData, and other wraps than ours ---------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["kmip", "jose"])
def test_a_ciphertext_that_looks_like_bulk_data_is_made_anew(
    double: CosmianDouble, protocol: Protocol
) -> None:
    cipher = with_first_version(cipher_of(double, protocol))
    nonces = iter([_bulky_nonce(double), bytes(12)])
    double.store.next_nonce = lambda: next(nonces)
    wrapped = cipher.encrypt(SECRET, "1", AAD)

    assert wrapped[1:13] == bytes(12)
    assert cipher.decrypt(wrapped, "1", AAD) == SECRET


def test_a_server_whose_every_ciphertext_looks_like_bulk_data_is_given_up(
    double: CosmianDouble, cipher: CosmianCipher
) -> None:
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
def test_what_is_no_wrap_of_ours_is_not_sent(
    double: CosmianDouble, cipher: CosmianCipher, change: Callable[[bytes], bytes]
) -> None:
    """A server takes bulk data without its AAD, and a tag that is cut."""
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    asked = len(double.requests)

    with pytest.raises(DecryptFailed):
        cipher.decrypt(change(wrapped), "1", AAD)
    assert len(double.requests) == asked


def test_a_wrap_of_something_else_under_our_key_does_not_open(cipher: CosmianCipher) -> None:
    """Whoever may encrypt with the key has not thereby made a wrap."""
    server, uid = cipher.key.server, cipher.key.uid("1")
    assert uid
    with cipher.key.call():
        sealed = server.seal(uid, b"\x02" + SECRET, AAD)
    assert sealed

    with pytest.raises(DecryptFailed):
        cipher.decrypt(b"\x01" + sealed.nonce + sealed.ciphertext + sealed.tag, "1", AAD)


# -- messages of several calls -----------------------------------------------------------------------


def test_calls_that_wait_go_in_one_message_and_fail_each_alone(
    double: CosmianDouble, cipher: CosmianCipher
) -> None:
    good = cipher.encrypt(SECRET, "1", AAD)
    bad = good[:-1] + bytes([good[-1] ^ 1])
    double.requests.clear()
    with ThreadPoolExecutor(16) as threads:
        first = []
        for _ in range(BATCHES):
            came, go_on = held_back(double)
            first.append((threads.submit(cipher.decrypt, good, "1", AAD), go_on))
            assert came.wait(WAIT_S)
        rest = [threads.submit(cipher.decrypt, each, "1", AAD) for each in (good, bad, good, bad, good)]
        until(lambda: cipher.key.server.messages.batcher.waiting == len(rest), "the rest waits")
        for _, go_on in first:
            go_on.set()

        assert [call.result(WAIT_S) for call, _ in first] == [SECRET] * BATCHES
        assert [call.result(WAIT_S) for call in rest[::2]] == [SECRET] * 3
        assert {type(call.exception(WAIT_S)) for call in rest[1::2]} == {DecryptFailed}
    assert double.batch_counts == [*[1] * BATCHES, len(rest)]


def test_keys_of_one_server_share_its_messages(double: CosmianDouble) -> None:
    """As ``open_key`` makes them: every key of the settings' section calls through one connection."""
    settings = settings_of(double, {"payroll": "cosmian:payroll", "mail": "cosmian:mail"})

    first, second = (configured_key(name, settings) for name in ("payroll", "mail"))
    assert first.server is second.server


# -- versions ----------------------------------------------------------------------------------------


@pytest.mark.cosmian
def test_a_key_that_is_not_there_says_how_to_make_it_and_is_made_once() -> None:
    key = CosmianKey(cosmian(server_url(NEW)), f"test-{uuid4().hex}")
    with pytest.raises(KeyMissing, match="make it with `kms cosmian init-key`"):
        CosmianCipher(key).versions()
    with key.call():
        assert [key.init()[1] for _ in range(2)] == [True, False]


@pytest.mark.cosmian
@pytest.mark.parametrize("version", [NEW, OLD], ids=["5", "4"])
def test_a_key_that_somebody_made_by_its_name_is_version_1_and_rotates(version: str) -> None:
    server, name = cosmian(server_url(version)), f"plain-{uuid4().hex}"
    with server.peer.one_timeout():
        server.kmip().create(name, name, "made-by-hand")
    cipher = CosmianCipher(CosmianKey(server, name))
    wrapped = cipher.encrypt(SECRET, "1", AAD)

    assert versions(cipher) == ["1"]
    assert cipher.rotate().version == "2"
    assert versions(cipher) == ["1", "2"]
    assert cipher.decrypt(wrapped, "1", AAD) == SECRET


def test_another_process_finds_the_new_version(double: CosmianDouble) -> None:
    here, there = with_first_version(cipher_of(double)), cipher_of(double)
    assert versions(there) == ["1"]
    here.rotate()

    assert there.decrypt(here.encrypt(SECRET, "2", AAD), "2", AAD) == SECRET


def test_rotation_is_never_a_rekey(double: CosmianDouble) -> None:
    with_first_version(cipher_of(double)).rotate()

    assert [each["tag"] for each in operations(double)].count("Create") == 2
    assert "ReKey" not in {each["tag"] for each in operations(double)}


def test_two_processes_that_rotate_at_once_make_one_version(double: CosmianDouble) -> None:
    first, second = with_first_version(cipher_of(double)), cipher_of(double)
    came, go_on = held_back(double, "Create")
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(first.rotate)
        assert came.wait(WAIT_S)
        assert second.rotate().version == "2"
        go_on.set()

        assert late.result(WAIT_S).version == "2"
    assert versions(first) == ["1", "2"]


def test_a_rotation_whose_answer_was_lost_has_made_a_version(
    double: CosmianDouble, cipher: CosmianCipher
) -> None:
    double.faults.append(cut_off_after("Create"))

    with pytest.raises(Unreachable):
        cipher.rotate()
    assert versions(cipher) == ["1", "2"]


def cut_off_after(operation: str) -> Callable[[Handler], bool]:
    """A fault: the operation is done, and the connection ends instead of an answer."""

    def cut(handler: Handler) -> bool:
        document = handler.double.requests[-1][1]
        if f'"{operation}"' not in json.dumps(document):
            handler.double.faults.append(cut)
            return False
        handler.answer(document)
        handler.close_connection = True
        return True

    return cut


def test_a_revoked_version_still_opens_and_the_one_before_seals(
    double: CosmianDouble, cipher: CosmianCipher
) -> None:
    cipher.rotate()
    wrapped = cipher.encrypt(SECRET, "2", AAD)
    double.store.keys[cipher.key.made_uid(2)].state = "Deactivated"

    assert versions(cipher) == ["2", "1"]
    assert cipher.decrypt(wrapped, "2", AAD) == SECRET
    with pytest.raises(BackendUnavailable, match="is deactivated, which does not allow this"):
        cipher.encrypt(SECRET, "2", AAD)
    assert cipher.rotate().version == "3"


@pytest.mark.parametrize("protocol", ["kmip", "jose"])
def test_a_destroyed_version_does_not_open_and_all_destroyed_are_no_key(
    double: CosmianDouble, protocol: Protocol
) -> None:
    cipher = with_first_version(cipher_of(double, protocol))
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    cipher.rotate()
    double.store.keys[cipher.key.made_uid(1)].state = "Destroyed"

    with pytest.raises(DecryptFailed):
        cipher.decrypt(wrapped, "1", AAD)
    double.store.keys[cipher.key.made_uid(2)].state = "Destroyed"
    with pytest.raises(KeyMissing):
        cipher.decrypt(wrapped, "1", AAD)


def test_a_key_that_was_destroyed_is_no_key(double: CosmianDouble, cipher: CosmianCipher) -> None:
    cipher.encrypt(SECRET, "1", AAD)
    double.store.keys[cipher.key.made_uid(1)].state = "Destroyed"
    double.store.add("payroll", Key(bytes(32), "admin", frozenset(), "Destroyed"))

    with pytest.raises(KeyMissing):
        cipher.encrypt(SECRET, "1", AAD)
    with pytest.raises(KeyMissing):
        cipher.versions()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (Key(bytes(32), "admin", frozenset(), "PreActive"), "is preactive, which does not allow this"),
        (Key(bytes(32), "admin", frozenset(), keyset="payroll"), "is a key set, which rotates by itself"),
    ],
    ids=["that nobody activated", "set"],
)
def test_a_key_by_its_name_that_cannot_be_used_says_so(double: CosmianDouble, key: Key, said: str) -> None:
    double.store.add("payroll", key)

    with pytest.raises(BackendUnavailable, match=said):
        cipher_of(double).versions()


# -- other users of the server -----------------------------------------------------------------------


def lent(double: CosmianDouble, uid: str, tag: str = "made-by-hand", *operations: str) -> None:
    """A key of Mallory's that Alice may use."""
    theirs = key_of(double, MALLORY)
    with theirs.call():
        theirs.server.kmip().create(uid, "payroll", tag)
    double.store.keys[uid].lent["alice"] = set(operations or ("encrypt", "decrypt", "get"))


def test_keys_of_others_do_not_become_our_versions(two_users: CosmianDouble) -> None:
    """Else a user who lends us a key under the next identifier would read all that we seal from then on."""
    ours = key_of(two_users, ALICE)
    with ours.call():
        ours.init()
    for uid in (ours.made_uid(2), "payroll"):
        lent(two_users, uid, "kms-service:payroll")
    cipher = CosmianCipher(ours)

    assert versions(cipher) == ["1"]
    assert cipher.rotate().version == "3"
    with pytest.raises(DecryptFailed):
        cipher.decrypt(bytes([1]) + bytes(45), "2", AAD)


def test_a_key_that_its_owner_lent_us_by_its_name_is_version_1(two_users: CosmianDouble) -> None:
    lent(two_users, "payroll")
    cipher = CosmianCipher(key_of(two_users, ALICE))

    assert cipher.decrypt(cipher.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET


@pytest.mark.parametrize("protocol", ["kmip", "jose"])
def test_a_key_that_was_not_lent_for_this_says_so(two_users: CosmianDouble, protocol: Protocol) -> None:
    lent(two_users, "payroll", "made-by-hand", "getattributes")
    cipher = CosmianCipher(CosmianKey(cosmian(two_users.url, protocol, ALICE), "payroll"))

    with pytest.raises(BackendUnavailable, match="is not ours to use"):
        cipher.encrypt(SECRET, "1", AAD)


def test_identifiers_that_are_all_taken_are_told(two_users: CosmianDouble) -> None:
    theirs, ours = key_of(two_users, MALLORY), key_of(two_users, ALICE)
    two_users.store.add(theirs.made_uid(1), Key(bytes(32), "mallory", frozenset()))
    with pytest.raises(BackendUnavailable, match="identifiers are taken"), ours.call():
        ours.init()
    two_users.store.keys[ours.made_uid(1)].owner = "alice"
    two_users.store.keys[ours.made_uid(1)].tags = frozenset({"kms-service:payroll"})
    for number in range(2, 10):
        two_users.store.add(theirs.made_uid(number), Key(bytes(32), "mallory", frozenset()))

    with pytest.raises(BackendUnavailable, match="identifiers are taken"), ours.call():
        ours.rotate()
