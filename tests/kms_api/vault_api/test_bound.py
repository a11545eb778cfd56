"""A caller of the Vault API who may not see a key learns nothing from how long an answer takes."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from kms_api.vault_api import bound
from kms_api.vault_api.bound import Extra
from kms_core import scopes
from kms_core.age import x25519
from kms_core.auth.policy import ByScopes, Principal
from kms_core.backends import Backend, KeyVersion
from kms_core.backends.age import AgeBackend
from kms_core.operation import Sealed
from kms_core.scopes import Scope
from kms_core.service import Kms
from kms_protocol.context import Context
from kms_protocol.errors import KmsError, UnknownKey
from support.age_kms import kms_over, write_pair
from support.memory_kms import memory_backend

WHO: Final = Principal("ada", "default", "token:x")
UNSEEN: Final = "unseen"
ABSENT: Final = "absent"


class FixedScopes:
    """A credential for everything with other keys."""

    def scopes_of(self, who: Principal) -> Iterable[Scope]:
        del who
        return [scopes.parse("* key=default")]


class RecordingPolicy(ByScopes):
    """The policy of the service, which keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__(FixedScopes().scopes_of, {})
        self.questions: list[tuple[str, str | None]] = []

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        self.questions.append((operation, key_id))
        super().require(who, operation, key_id, context)

    def sees(self, who: Principal, key_id: str) -> bool:
        self.questions.append(("sees", key_id))
        return super().sees(who, key_id)


class Local(AgeBackend):
    """Age keys in files, which count what they are asked for."""

    calls: Counter[str]

    def versions(self) -> Sequence[KeyVersion]:
        self.calls["versions"] += 1
        return super().versions()


def local(folder: Path) -> tuple[Backend, Counter[str]]:
    made = Local(write_pair(folder, x25519.X25519Identity.generate()))
    made.calls = Counter()
    return made, made.calls


def peer(folder: Path) -> tuple[Backend, Counter[str]]:
    del folder
    backend, cipher = memory_backend()
    return backend, cipher.calls


def encrypt(kms: Kms, key: str) -> tuple[Sealed, int]:
    return bound.sealed_numbered(kms, WHO, Extra(), partial(kms.encrypt, WHO, b"x", key_id=key), key_id=key)


CALLS: Final[dict[str, Callable[[Kms, str], object]]] = {
    "encrypt": encrypt,
    "data_key": lambda kms, key: bound.sealed_numbered(
        kms, WHO, Extra(), partial(kms.generate_data_key, WHO, 32, key_id=key), key_id=key
    ),
    "decrypt": lambda kms, key: bound.decrypt_bound(kms, WHO, sealed(kms), Extra(number=1), key_id=key),
    "rewrap": lambda kms, key: bound.rewrap_bound(kms, WHO, sealed(kms), Extra(number=1), key_id=key),
}


def sealed(kms: Kms) -> bytes:
    """A file of the key that the caller may use."""
    return kms.encrypt(WHO, b"x", Context()).ciphertext


@pytest.mark.parametrize("make", [local, peer], ids=["local", "peer"])
@pytest.mark.parametrize("name", ["encrypt", "data_key"])
def test_the_backend_of_an_unseen_key_is_not_asked(
    tmp_path: Path, name: str, make: Callable[[Path], tuple[Backend, Counter[str]]]
) -> None:
    """The answer is the one for a key that does not exist, and takes no longer."""
    own, (unseen, calls) = memory_backend(), make(tmp_path)
    kms = kms_over(own[0], {UNSEEN: unseen}, policy=ByScopes(FixedScopes().scopes_of, {}))
    calls.clear()
    told: list[str] = []
    for key in (UNSEEN, ABSENT):
        with pytest.raises(KmsError) as caught:
            CALLS[name](kms, key)
        assert type(caught.value) is UnknownKey
        told.append(caught.value.detail)

    assert told[0] == told[1]
    assert not calls
    CALLS[name](kms, "default")


def test_a_key_that_is_rotated_meanwhile_seals_under_the_number_of_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, cipher = memory_backend()
    kms = kms_over(backend)
    kms_encrypt, left = kms.encrypt, ["once"]

    def rotated_first(*args: Any, **kwargs: Any) -> Sealed:  # noqa: ANN401 -- passed through
        if left:
            left.pop()
            backend.rotate()
        return kms_encrypt(*args, **kwargs)

    monkeypatch.setattr(kms, "encrypt", rotated_first)
    sealed, number = encrypt(kms, "default")

    assert (sealed.key.version, number) == ("2", 2)
    assert cipher.calls["rotate"] == 1
    assert bound.decrypt_bound(kms, WHO, sealed.ciphertext, Extra(number=2), key_id="default") == b"x"


@pytest.mark.parametrize("name", CALLS)
def test_policy_is_asked_the_same_of_an_unseen_key_and_an_absent_one(tmp_path: Path, name: str) -> None:
    policy = RecordingPolicy()
    kms = kms_over(memory_backend()[0], {UNSEEN: local(tmp_path)[0]}, policy=policy)
    asked = []
    for key in (UNSEEN, ABSENT):
        policy.questions.clear()
        with pytest.raises(KmsError):
            CALLS[name](kms, key)
        asked.append([(what, "it" if of == key else of) for what, of in policy.questions])

    assert asked[0] == asked[1]
    assert name == "rewrap" or ("sees", "it") in asked[0]
