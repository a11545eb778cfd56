"""encrypt, decrypt, rewrap and data keys of the Vault API, one call or a batch."""

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Final, TypeVar

import msgspec

from kms_api import json_body, problems
from kms_api.deps import Pool
from kms_api.routes.batch import admit_items
from kms_api.routes.secrets import check_ciphertext, check_plaintext
from kms_api.routing import Call
from kms_api.vault_api import models
from kms_api.vault_api.models import (
    BoundFields,
    DataKeyIn,
    Item,
    TransitIn,
    TransitItem,
    VaultCiphertext,
    VaultPlaintext,
    answer,
)
from kms_api.vault_api.routing import VaultRoutes
from kms_core.age import header
from kms_core.auth.policy import Principal
from kms_core.envelope import binding
from kms_core.operation import DataKey, Sealed
from kms_core.service import Kms
from kms_protocol.context import NUMBER, Context
from kms_protocol.errors import (
    BackendUnavailable,
    DecryptFailed,
    InvalidRequest,
    KmsError,
    TooLarge,
    Unavailable,
    UnknownKey,
)
from kms_protocol.wire import JobKind

# Calls of the Vault API into ``Kms``: their contexts, and the numbers of key versions.
#
# Every ciphertext of this API is bound to the pair ``kms:transit=v<number>``, and to the caller's
# ``context`` and ``associated_data``. Other APIs accept no pairs with such keys, so they open none of these
# files, and this one opens none of theirs. The bound number stays true even if older versions are removed.

CONTEXT: Final = "kms:transit.context"
ASSOCIATED_DATA: Final = "kms:transit.associated_data"
_TRIES: Final = 3
M = TypeVar("M", Sealed, DataKey)


@dataclass(frozen=True, slots=True)
class Extra:
    """The caller's data to be bound; empty is the same as none.

    ``number`` is that of the ciphertext's prefix, or of the version to seal with, where 0 is any.
    """

    context: bytes = b""
    associated_data: bytes = b""
    number: int = 0

    def __repr__(self) -> str:
        return "Extra(…)"

    def bound(self, number: int) -> Context:
        """The context for this version. Raises InvalidContext if it is too long."""
        if not self.context and not self.associated_data:
            return _bare(number)
        given = {CONTEXT: self.context, ASSOCIATED_DATA: self.associated_data}
        pairs = {key: b64encode(value).decode("ascii") for key, value in given.items() if value}
        return Context.reserved({NUMBER: f"v{number}", **pairs})


def encrypt_bound(
    kms: Kms, who: Principal, plaintext: bytes, extra: Extra, *, key_id: str
) -> tuple[Sealed, int]:
    """The file and the number of its key version. Raises what ``Kms.encrypt`` raises, InvalidRequest."""
    return _numbered(
        kms, who, extra, key_id, lambda context: kms.encrypt(who, plaintext, context, key_id=key_id)
    )


def data_key_bound(
    kms: Kms, who: Principal, size_bytes: int, extra: Extra, *, key_id: str
) -> tuple[DataKey, int]:
    """Generate a data key, and encrypt it as ``encrypt_bound`` does."""
    return _numbered(
        kms,
        who,
        extra,
        key_id,
        lambda context: kms.generate_data_key(who, size_bytes, context, key_id=key_id),
    )


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
    """The result, bound to the number of the version that made it."""
    for _ in range(_TRIES):
        version, number = _current(kms, who, key_id)
        if number and extra.number not in {0, number}:
            raise InvalidRequest(f"key_version: version {number} is in use, and no other one encrypts")
        made = make(extra.bound(number))
        if made.key.version == version:
            return made, number
    raise BackendUnavailable("The key was rotated during each of three attempts")


def _current(kms: Kms, who: Principal, key_id: str) -> tuple[str, int]:
    """The version in use and its number; 0 where ``Kms`` will raise the reason why there is none.

    The time of the answer tells nothing of keys that the caller may not see: the policy is checked first, for
    every name, and the backend of an unseen key is not called.
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
    """Return whether a file of ours names another key. ``Kms`` refuses a file that cannot be read."""
    try:
        bound = binding.read(header.parse(file, header.SYNC_LIMITS))
    except KmsError:
        return False
    return bound is not None and bound.key_id != key_id


@lru_cache(maxsize=256)
def _bare(number: int) -> Context:
    """The context of a call that binds nothing else, as most calls."""
    return Context.reserved({NUMBER: f"v{number}"})


TYPES: Final = frozenset({"chacha20-poly1305", "aes256-gcm96"})
"""Accepted key types: that of the payload, and the default of clients, which is as strong."""
_NOTHING: Final = Extra()
_BITS: Final = frozenset({128, 256, 512})
_CODES: Final = frozenset(range(200, 600)) - {204, 205, 304}  # answers that have no body
routes: Final = VaultRoutes()


Work = Callable[[Call[TransitIn], Kms, TransitItem], VaultCiphertext | VaultPlaintext]


def _pool(call: Call[BoundFields]) -> Pool | None:
    """The threads of the key in the path, for a new ciphertext."""
    return call.key_pool(call.path("name"), seals=True)


def _transit_pool(call: Call[TransitIn], *, seals: bool = True) -> Pool | None:
    """The threads of batches, or of the key in the path."""
    body = call.body
    if body.batch_input is not None:
        return call.service.batch_pool(call.caller, [call.path("name")])
    size = max(len(body.plaintext or ""), len(body.ciphertext or "")) // 4 * 3
    return call.key_pool(
        call.path("name"), size_bytes=size, file=models.header_of(body.ciphertext or ""), seals=seals
    )


@routes.write("{mount}/encrypt/{name}", TransitIn, _transit_pool)
def encrypt(call: Call[TransitIn]) -> object:
    """``plaintext`` to ``ciphertext``. A key that does not exist is not made."""
    return _one_or_many(call, "encrypt", _encrypt)


@routes.write("{mount}/decrypt/{name}", TransitIn, partial(_transit_pool, seals=False))
def decrypt(call: Call[TransitIn]) -> object:
    """``ciphertext`` to ``plaintext``; the number in its prefix is authenticated."""
    return _one_or_many(call, "decrypt", _decrypt)


@routes.write("{mount}/rewrap/{name}", TransitIn, _transit_pool)
def rewrap(call: Call[TransitIn]) -> object:
    """Rewrap a ciphertext under the current version; payload and bound data stay."""
    return _one_or_many(call, "rewrap", _rewrap)


@routes.write("{mount}/datakey/plaintext/{name}", DataKeyIn, _pool)
def data_key(call: Call[DataKeyIn]) -> VaultCiphertext:
    """Random bytes, in clear and sealed."""
    bits = 256 if call.body.bits is None else call.body.bits
    if bits not in _BITS:
        raise InvalidRequest("bits: expected 128, 256 or 512")
    kms, key_id = call.service.kms, call.path("name")
    made, number = data_key_bound(kms, call.caller, bits // 8, _extra(call.body), key_id=key_id)
    return VaultCiphertext(models.render(number, made.ciphertext), number, made.plaintext)


@routes.write("{mount}/datakey/wrapped/{name}", DataKeyIn, _pool)
def wrapped_data_key(call: Call[DataKeyIn]) -> VaultCiphertext:
    """Random bytes, only sealed."""
    return msgspec.structs.replace(data_key(call), plaintext=msgspec.UNSET)


def _one_or_many(call: Call[TransitIn], operation: JobKind, work: Work) -> object:
    """The outcome of one call, or of every item of a batch in order.

    The status of a batch is 400 if an item was refused, since clients look only at the status.
    """
    kms = call.service.kms
    items, code = call.body.batch_input, call.body.partial_failure_response_code
    if items is None:
        return work(call, kms, call.body)
    if _extra(call.body) is not _NOTHING:
        raise InvalidRequest(
            "context, associated_data, key_version: write them into each item of batch_input"
        )
    if not items:
        raise InvalidRequest("missing batch input to process: batch_input is empty")
    if len(items) > models.MAX_ITEMS:
        raise TooLarge(f"batch_input has at most {models.MAX_ITEMS} items: send several requests")
    if code is not None and code not in _CODES:
        raise InvalidRequest("partial_failure_response_code: expected 200 to 599, of an answer with a body")
    admit_items(call.service, call.caller, operation, len(items))
    in_batch = kms.for_job()
    with kms.audit_log.together():
        results = [_item(call, in_batch, item, work) for item in items]
    failed = sum(result.error is not msgspec.UNSET for result in results)
    status: int = HTTPStatus.OK
    if failed:
        status = code if code and failed < len(results) else HTTPStatus.BAD_REQUEST
    return answer(models.Results(results), status)


def _item(call: Call[TransitIn], kms: Kms, raw: msgspec.Raw, work: Work) -> Item:
    """Raises Unavailable, which refuses the whole batch: to try all of it again is harmless."""
    reference = ""
    try:
        item = json_body.decode(raw, TransitItem, is_lenient=True)
        reference = item.reference or ""
        return Item(reference, **msgspec.structs.asdict(work(call, kms, item)))
    except Unavailable:
        raise
    except KmsError as exc:
        return Item(reference, error=problems.vault_text(exc))


def _encrypt(call: Call[TransitIn], kms: Kms, body: TransitItem) -> VaultCiphertext:
    if body.plaintext is None:
        raise InvalidRequest("missing plaintext to encrypt: send it in base64; an empty one as an empty text")
    plaintext = models.octets(body.plaintext, "plaintext")
    check_plaintext(plaintext)
    key_id = call.path("name")
    sealed, number = encrypt_bound(kms, call.caller, plaintext, _extra(body), key_id=key_id)
    return VaultCiphertext(models.render(number, sealed.ciphertext), number)


def _decrypt(call: Call[TransitIn], kms: Kms, body: TransitItem) -> VaultPlaintext:
    file, extra = _file(body)
    return VaultPlaintext(decrypt_bound(kms, call.caller, file, extra, key_id=call.path("name")))


def _rewrap(call: Call[TransitIn], kms: Kms, body: TransitItem) -> VaultCiphertext:
    file, extra = _file(body)
    sealed, number = rewrap_bound(kms, call.caller, file, extra, key_id=call.path("name"))
    return VaultCiphertext(models.render(number, sealed.ciphertext), number)


def _file(body: TransitItem) -> tuple[bytes, Extra]:
    if not body.ciphertext:
        raise InvalidRequest("missing ciphertext: send what encrypt gave, with its prefix")
    number, file = models.parse(body.ciphertext)
    check_ciphertext(file)
    return file, replace(_extra(body), number=number)


def _extra(body: BoundFields) -> Extra:
    """Raises InvalidRequest for features that this service lacks, or has in another form."""
    if body.convergent_encryption or body.nonce:
        raise InvalidRequest(
            "convergent encryption is not offered: equal plaintexts would show; leave nonce and "
            "convergent_encryption out"
        )
    if body.type is not None and body.type not in TYPES:
        raise InvalidRequest(
            f"type: keys here are of type {' or '.join(sorted(TYPES))}, and made by the operator"
        )
    if not body.context and not body.associated_data and not body.key_version:
        return _NOTHING
    context, data = (models.octets(getattr(body, name), name) for name in ("context", "associated_data"))
    return Extra(context, data, body.key_version or 0)
