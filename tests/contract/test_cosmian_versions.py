"""Versions of a key on a Cosmian KMS server, and the keys that other users of it have.

Tests marked ``cosmian`` run against the server at ``COSMIAN_KMS_URL`` where there is one.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from kms_core.backends import KeyMissing
from kms_core.backends.cosmian.backend import CosmianCipher, CosmianKey
from kms_core.backends.cosmian.server import Protocol
from kms_core.http_client import Unreachable
from kms_protocol.errors import BackendUnavailable, DecryptFailed
from support.contract.cosmian_ciphers import (
    AAD,
    ALICE,
    MALLORY,
    SECRET,
    cipher_of,
    held,
    key_of,
    made,
    operations,
    versions,
)
from support.contract.cosmian_double import NEW, OLD, CosmianDouble, Handler
from support.contract.cosmian_store import Key
from support.contract.rig_cosmian import cosmian, server_url
from support.waiting import WAIT_S

# -- versions ----------------------------------------------------------------------------------------


@pytest.mark.cosmian
def test_a_key_is_made_once() -> None:
    key = CosmianKey(cosmian(server_url(NEW)), f"test-{uuid4().hex}")
    with key.call():
        assert [key.init()[1] for _ in range(2)] == [True, False]


@pytest.mark.cosmian
def test_a_key_that_is_not_there_says_how_to_make_it() -> None:
    cipher = CosmianCipher(CosmianKey(cosmian(server_url(NEW)), f"test-{uuid4().hex}"))

    with pytest.raises(KeyMissing, match="make it with `kms cosmian init-key`"):
        cipher.versions()


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
    here, there = made(cipher_of(double)), cipher_of(double)
    assert versions(there) == ["1"]
    here.rotate()

    assert there.decrypt(here.encrypt(SECRET, "2", AAD), "2", AAD) == SECRET


def test_rotation_is_never_a_rekey(double: CosmianDouble) -> None:
    made(cipher_of(double)).rotate()

    assert [each["tag"] for each in operations(double)].count("Create") == 2
    assert "ReKey" not in {each["tag"] for each in operations(double)}


def test_two_processes_that_rotate_at_once_make_one_version(double: CosmianDouble) -> None:
    first, second = made(cipher_of(double)), cipher_of(double)
    came, go_on = held(double, "Create")
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(first.rotate)
        assert came.wait(WAIT_S)
        assert second.rotate().version == "2"
        go_on.set()

        assert late.result(WAIT_S).version == "2"
    assert versions(first) == ["1", "2"]


def test_a_rotation_whose_answer_was_lost_has_made_a_version(double: CosmianDouble) -> None:
    cipher = made(cipher_of(double))
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


def test_a_revoked_version_still_opens_and_the_one_before_seals(double: CosmianDouble) -> None:
    cipher = made(cipher_of(double))
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
    cipher = made(cipher_of(double, protocol))
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    cipher.rotate()
    double.store.keys[cipher.key.made_uid(1)].state = "Destroyed"

    with pytest.raises(DecryptFailed):
        cipher.decrypt(wrapped, "1", AAD)
    double.store.keys[cipher.key.made_uid(2)].state = "Destroyed"
    with pytest.raises(KeyMissing):
        cipher.decrypt(wrapped, "1", AAD)


def test_a_key_that_was_destroyed_is_no_key(double: CosmianDouble) -> None:
    cipher = made(cipher_of(double))
    cipher.encrypt(SECRET, "1", AAD)
    double.store.keys[cipher.key.made_uid(1)].state = "Destroyed"
    double.store.add("payroll", Key(bytes(32), "admin", frozenset(), "Destroyed"))

    with pytest.raises(KeyMissing):
        cipher.encrypt(SECRET, "1", AAD)
    with pytest.raises(KeyMissing):
        cipher.versions()


def test_a_key_by_its_name_that_nobody_activated_says_so(double: CosmianDouble) -> None:
    double.store.add("payroll", Key(bytes(32), "admin", frozenset(), "PreActive"))

    with pytest.raises(BackendUnavailable, match="is preactive, which does not allow this"):
        cipher_of(double).versions()


def test_a_key_set_is_refused(double: CosmianDouble) -> None:
    double.store.add("payroll", Key(bytes(32), "admin", frozenset(), keyset="payroll"))

    with pytest.raises(BackendUnavailable, match="is a key set, which rotates by itself"):
        cipher_of(double).versions()


# -- other users of the server -----------------------------------------------------------------------


def lend(double: CosmianDouble, uid: str) -> None:
    double.store.keys[uid].lent["alice"] = {"encrypt", "decrypt", "get"}


def test_keys_of_others_do_not_become_our_versions(shared: CosmianDouble) -> None:
    """Else a user who lends us a key under the next identifier would read all that we seal from then on."""
    ours, theirs = key_of(shared, ALICE), key_of(shared, MALLORY)
    with ours.call():
        ours.init()
    with theirs.call():
        for uid in (ours.made_uid(2), "payroll"):
            theirs.server.kmip().create(uid, "payroll", "kms-service:payroll")
            lend(shared, uid)
    cipher = CosmianCipher(ours)

    assert versions(cipher) == ["1"]
    assert cipher.rotate().version == "3"
    with pytest.raises(DecryptFailed):
        cipher.decrypt(bytes([1]) + bytes(45), "2", AAD)


def test_a_key_that_its_owner_lent_us_by_its_name_is_version_1(shared: CosmianDouble) -> None:
    theirs = key_of(shared, MALLORY)
    with theirs.call():
        theirs.server.kmip().create("payroll", "payroll", "made-by-hand")
    lend(shared, "payroll")
    cipher = CosmianCipher(key_of(shared, ALICE))

    assert cipher.decrypt(cipher.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET


@pytest.mark.parametrize("protocol", ["kmip", "jose"])
def test_a_key_that_was_not_lent_for_this_says_so(shared: CosmianDouble, protocol: Protocol) -> None:
    theirs = key_of(shared, MALLORY)
    with theirs.call():
        theirs.server.kmip().create("payroll", "payroll", "made-by-hand")
    shared.store.keys["payroll"].lent["alice"] = {"getattributes"}
    cipher = CosmianCipher(CosmianKey(cosmian(shared.url, protocol, ALICE), "payroll"))

    with pytest.raises(BackendUnavailable, match="is not ours to use"):
        cipher.encrypt(SECRET, "1", AAD)


def test_identifiers_that_are_all_taken_are_told(shared: CosmianDouble) -> None:
    theirs, ours = key_of(shared, MALLORY), key_of(shared, ALICE)
    shared.store.add(theirs.made_uid(1), Key(bytes(32), "mallory", frozenset()))
    with pytest.raises(BackendUnavailable, match="identifiers are taken"), ours.call():
        ours.init()
    shared.store.keys[ours.made_uid(1)].owner = "alice"
    shared.store.keys[ours.made_uid(1)].tags = frozenset({"kms-service:payroll"})
    for number in range(2, 10):
        shared.store.add(theirs.made_uid(number), Key(bytes(32), "mallory", frozenset()))

    with pytest.raises(BackendUnavailable, match="identifiers are taken"), ours.call():
        ours.rotate()
