"""Calls of the Vault API into ``Kms``: their contexts, and the numbers of key versions.

Every ciphertext of this API is bound to the pair ``kms:transit=v<number>``, and to the caller's
``context`` and ``associated_data``. Other APIs accept no pairs with such keys, so they open none of these
files, and this one opens none of theirs. The bound number stays true even if older versions are removed.
"""

from base64 import b64encode
from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeVar

import msgspec

from kms_core.age import header
from kms_core.auth.policy import Principal
from kms_core.envelope import binding
from kms_core.operation import DataKey, Sealed
from kms_core.service import Kms
from kms_protocol.context import NUMBER, Context
from kms_protocol.errors import BackendUnavailable, DecryptFailed, InvalidRequest, KmsError, UnknownKey
from kms_protocol.wire import Hidden

CONTEXT: Final = "kms:transit.context"
ASSOCIATED_DATA: Final = "kms:transit.associated_data"
_TRIES: Final = 3
M = TypeVar("M", Sealed, DataKey)


class Extra(Hidden, frozen=True):
    """The caller's data to be bound; empty is the same as none.

    ``number`` is that of the ciphertext's prefix, or of the version to seal with, where 0 is any.
    """

    context: bytes = b""
    associated_data: bytes = b""
    number: int = 0

    def bound(self, number: int) -> Context:
        """The context for this version. Raises InvalidContext if it is too long."""
        if not self.context and not self.associated_data:
            return _bare(number)
        given = {CONTEXT: self.context, ASSOCIATED_DATA: self.associated_data}
        pairs = {key: b64encode(value).decode("ascii") for key, value in given.items() if value}
        return Context.reserved({NUMBER: f"v{number}", **pairs})


def sealed_numbered(
    kms: Kms, who: Principal, extra: Extra, seal: Callable[[Context], M], *, key_id: str
) -> tuple[M, int]:
    """The result of ``seal``, bound to the number of the version that made it, and this number.

    Raises what ``seal`` raises, InvalidRequest for the number of another version.
    """
    for _ in range(_TRIES):
        version, number = _current(kms, who, key_id)
        if number and extra.number not in {0, number}:
            raise InvalidRequest(f"key_version: version {number} is in use, and no other one encrypts")
        made = seal(extra.bound(number))
        if made.key.version == version:
            return made, number
    raise BackendUnavailable("The key was rotated during each of three attempts")


def decrypt_bound(kms: Kms, who: Principal, file: bytes, extra: Extra, *, key_id: str) -> bytes:
    """The plaintext of a file of this key and this API. Raises what ``Kms.decrypt`` raises."""
    try:
        return kms.decrypt(who, file, extra.bound(extra.number), key_id=key_id).plaintext
    except DecryptFailed as exc:
        if not kms.policy.sees(who, key_id) or key_id not in kms.keyring.keys:
            raise UnknownKey from exc  # says more: the path names the key
        raise


def rewrap_bound(kms: Kms, who: Principal, file: bytes, extra: Extra, *, key_id: str) -> tuple[Sealed, int]:
    """Rewrap to the version in use. Refuses a file of another key, which ``Kms.rewrap`` would accept."""
    old = extra.bound(extra.number)
    if _names_another(file, key_id):
        kms.raise_recorded(who, "rewrap", old, DecryptFailed())
    unnumbered = msgspec.structs.replace(extra, number=0)
    return sealed_numbered(
        kms,
        who,
        unnumbered,
        lambda new: kms.rewrap(who, file, old, new_context=new, key_id=key_id),
        key_id=key_id,
    )


def _current(kms: Kms, who: Principal, key_id: str) -> tuple[str, int]:
    """The version in use and its number; 0 where ``Kms`` will raise the reason why there is none.

    The time of the answer tells nothing of keys that the caller may not see: the policy is checked first, for
    every name, and the backend of an unseen key is not called.
    """
    sees, key = kms.policy.sees(who, key_id), kms.keyring.keys.get(key_id)
    if key is None or not sees:
        return "", 0
    try:
        version, numbers = key.backend.versions()[-1].version, key.numbers()
    except BackendUnavailable:
        return "", 0
    return (version, numbers[version]) if version in numbers else ("", 0)


def _names_another(file: bytes, key_id: str) -> bool:
    """Return whether a file of ours names another key. ``Kms`` refuses a file that cannot be read."""
    try:
        bound = binding.read(header.parse(file, header.SYNC_LIMITS).stanzas)
    except KmsError:
        return False
    return bound is not None and bound.key_id != key_id


@lru_cache(maxsize=256)
def _bare(number: int) -> Context:
    """The context of a call that binds nothing else, as most calls."""
    return Context.reserved({NUMBER: f"v{number}"})
