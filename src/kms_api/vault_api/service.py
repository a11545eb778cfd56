"""Calls of the façade into ``Kms``: what binds them, and the numbers of key versions.

Every ciphertext of this door is bound to the pair ``kms:transit=v<number>``, and to what was given as
``context`` and ``associated_data``. No other door can give pairs with such keys, so none opens these files,
and this one opens none of others. The number rests bound: it stays true whatever becomes of older versions.
"""

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, TypeVar

from kms_core.age import header
from kms_core.auth.policy import Principal
from kms_core.envelope import binding
from kms_core.results import DataKey, Sealed
from kms_core.service import Kms
from kms_protocol.context import NUMBER, Context
from kms_protocol.errors import BackendUnavailable, DecryptFailed, InvalidRequest, KmsError, UnknownKey

CONTEXT: Final = "kms:transit.context"
ASSOCIATED_DATA: Final = "kms:transit.associated_data"
_TRIES: Final = 3
M = TypeVar("M", Sealed, DataKey)


@dataclass(frozen=True, slots=True)
class Extra:
    """What the caller gave to be bound; empty is the same as none.

    ``number`` is that of the ciphertext's prefix, or the version that shall seal, of which 0 means any.
    """

    context: bytes = b""
    associated_data: bytes = b""
    number: int = 0

    def __repr__(self) -> str:
        return "Extra(…)"

    def bound(self, number: int) -> Context:
        """With this version. Raises InvalidContext if it is too long."""
        if not self.context and not self.associated_data:
            return _bare(number)
        given = {CONTEXT: self.context, ASSOCIATED_DATA: self.associated_data}
        pairs = {key: b64encode(value).decode("ascii") for key, value in given.items() if value}
        return Context.reserved({NUMBER: f"v{number}", **pairs})


def encrypt(kms: Kms, who: Principal, plaintext: bytes, extra: Extra, *, key_id: str) -> tuple[Sealed, int]:
    """The file and the number of its key version. Raises what ``Kms.encrypt`` raises, InvalidRequest."""
    return _numbered(
        kms, who, extra, key_id, lambda context: kms.encrypt(who, plaintext, context, key_id=key_id)
    )


def data_key(kms: Kms, who: Principal, size_bytes: int, extra: Extra, *, key_id: str) -> tuple[DataKey, int]:
    """As ``encrypt``."""
    return _numbered(
        kms,
        who,
        extra,
        key_id,
        lambda context: kms.generate_data_key(who, size_bytes, context, key_id=key_id),
    )


def decrypt(kms: Kms, who: Principal, file: bytes, extra: Extra, *, key_id: str) -> bytes:
    """The plaintext of a file of this key and this door. Raises what ``Kms.decrypt`` raises."""
    try:
        return kms.decrypt(who, file, extra.bound(extra.number), key_id=key_id).plaintext
    except DecryptFailed as exc:
        if not kms.policy.sees(who, key_id) or key_id not in kms.keyring.keys:
            raise UnknownKey from exc  # of the name in the path there is more to say
        raise


def rewrap(kms: Kms, who: Principal, file: bytes, extra: Extra, *, key_id: str) -> tuple[Sealed, int]:
    """To the version in use. A file of another key, which ``Kms.rewrap`` would move here, is refused."""
    old = extra.bound(extra.number)
    if _names_another(file, key_id):
        kms.refused(who, "rewrap", old, DecryptFailed())
    return _numbered(
        kms,
        who,
        replace(extra, number=0),
        key_id,
        lambda new: kms.rewrap(who, file, old, new_context=new, key_id=key_id),
    )


def _numbered(
    kms: Kms, who: Principal, extra: Extra, key_id: str, make: Callable[[Context], M]
) -> tuple[M, int]:
    """What was made, bound to the number of the very version that made it."""
    for _ in range(_TRIES):
        version, number = _current(kms, who, key_id)
        if number and extra.number not in {0, number}:
            raise InvalidRequest(f"key_version: version {number} is in use, and no other one encrypts")
        made = make(extra.bound(number))
        if made.key.version == version:
            return made, number
    raise BackendUnavailable("The key is rotated again and again")


def _current(kms: Kms, who: Principal, key_id: str) -> tuple[str, int]:
    """The version in use and its number; 0 where ``Kms`` is to say why there is none.

    A caller who may not know of a key learns nothing from how long the answer takes: policy is asked first,
    of every name, and no backend of an unseen key is.
    """
    sees, key = kms.policy.sees(who, key_id), kms.keyring.keys.get(key_id)
    if key is None or not sees:
        return "", 0
    try:
        version, numbers = key.backend.current_version(), key.numbers()
    except BackendUnavailable:
        return "", 0
    return (version, numbers[version]) if version in numbers else ("", 0)


def _names_another(file: bytes, key_id: str) -> bool:
    """Whether a file of ours names another key. What cannot be read is for ``Kms`` to refuse."""
    try:
        bound = binding.read(header.parse(file, header.SYNC_LIMITS))
    except KmsError:
        return False
    return bound is not None and bound.key_id != key_id


@lru_cache(maxsize=256)
def _bare(number: int) -> Context:
    """Of a call that binds nothing else, which most are."""
    return Context.reserved({NUMBER: f"v{number}"})
