"""What a header says of its key, and whether a rewrap would say the same: told without opening anything."""

from pathlib import Path
from typing import Final

import pytest

from kms_core.age import x25519
from kms_core.auth.policy import AllowAll, Principal
from kms_core.backends import Backend
from kms_core.key_selection import SelectionRules
from kms_core.keyring import Key, Keyring
from kms_core.service import Kms
from kms_protocol.errors import UnknownKey
from support.age_kms import ADA, ROW, Kept, age_backend, head_of
from support.memory_kms import memory_backend

IDENTITY: Final = x25519.X25519Identity.generate()


@pytest.fixture
def age(tmp_path: Path) -> Backend:
    return age_backend(tmp_path / "age", IDENTITY)


def service(*backends: Backend, key_id: str = "payroll") -> Kms:
    key = Key(key_id, backends[0], others=backends[1:])
    return Kms(Keyring({key_id: key}, key), AllowAll(), Kept(), SelectionRules())


def sealed(kms: Kms) -> bytes:
    return kms.encrypt(ADA, b"salary", ROW).ciphertext


def newest(kms: Kms, file: bytes) -> bool:
    found = kms.key_version_status(ADA, head_of(file), None)
    assert found
    return found.newest


def test_own_file_is_on_the_newest_version_until_the_key_is_rotated() -> None:
    kms = service(memory_backend()[0])
    file = sealed(kms)
    before = newest(kms, file)
    kms.rotate(ADA, "payroll")
    moved = kms.rewrap(ADA, file, ROW).ciphertext

    assert (before, newest(kms, file), newest(kms, moved)) == (True, False, True)


def test_file_that_lacks_a_wrap_or_has_one_too_many_is_not_as_a_new_one(age: Backend) -> None:
    remote = memory_backend()[0]
    alone, both, native = service(remote), service(remote, age), service(age)

    assert [newest(alone, sealed(kms)) for kms in (alone, both)] == [True, False]
    assert [newest(both, sealed(kms)) for kms in (alone, both)] == [False, True]
    assert [newest(native, sealed(kms)) for kms in (native, both)] == [True, False]


def test_other_key_is_not_the_newest_of_this_one(age: Backend) -> None:
    keys = {name: Key(name, age) for name in ("payroll", "other")}
    kms = Kms(Keyring(keys, keys["payroll"]), AllowAll(), Kept(), SelectionRules())
    head = head_of(sealed(kms))

    moved = kms.key_version_status(ADA, head, "other")
    with pytest.raises(UnknownKey):
        kms.key_version_status(ADA, head, "missing")
    with pytest.raises(UnknownKey):
        service(age, key_id="elsewhere").key_version_status(ADA, head, None)

    assert moved
    assert (moved.key_id, moved.newest) == ("payroll", False)


def test_version_that_the_backend_does_not_know_is_not_named(age: Backend, tmp_path: Path) -> None:
    other = service(age_backend(tmp_path / "other", x25519.X25519Identity.generate()))

    found = service(age).key_version_status(ADA, head_of(sealed(other)), None)

    assert found
    assert (found.key_version, found.newest) == ("", False)


class Blind(AllowAll):
    """A policy that shows no key."""

    def sees(self, who: Principal, key_id: str) -> bool:
        del who, key_id
        return False


def test_a_header_says_nothing_of_a_key_that_the_caller_may_not_see(age: Backend) -> None:
    kms = service(age)
    blind = Kms(kms.keyring, Blind(), Kept(), SelectionRules())

    with pytest.raises(UnknownKey):
        blind.key_version_status(ADA, head_of(sealed(kms)), None)
