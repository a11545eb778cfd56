"""encrypt, decrypt, rewrap and data keys of the Vault API, one call or a batch."""

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Final

import msgspec

from kms_api import json_body, problems
from kms_api.deps import Pool
from kms_api.routes.batch import admit_items
from kms_api.routes.secrets import check_ciphertext, check_plaintext
from kms_api.routing import Call
from kms_api.vault_api import models
from kms_api.vault_api.bound import Extra, decrypt_bound, rewrap_bound, sealed_numbered
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
from kms_core.service import Kms
from kms_protocol.errors import InvalidRequest, KmsError, TooLarge, Unavailable
from kms_protocol.wire import JobKind

TYPES: Final = frozenset({"chacha20-poly1305", "aes256-gcm96"})
"""Accepted key types: that of the payload, and the default of clients, which is as strong."""
_NOTHING: Final = Extra()
_BITS: Final = frozenset({128, 256, 512})
_CODES: Final = frozenset(range(200, 600)) - {204, 205, 304}  # answers that have no body
routes: Final = VaultRoutes()
Work = Callable[[Call[TransitIn], Kms, TransitItem], VaultCiphertext | VaultPlaintext]


def _data_key_pool(call: Call[BoundFields]) -> Pool | None:
    """The threads in which a data key is sealed under the key in the path."""
    return call.key_pool(call.path("name"), seals=True)


def _transit_pool(call: Call[TransitIn], *, seals: bool = True) -> Pool | None:
    """The threads of a call: those of batches, or those of the key in the path."""
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


@routes.write("{mount}/datakey/plaintext/{name}", DataKeyIn, _data_key_pool)
def data_key(call: Call[DataKeyIn]) -> VaultCiphertext:
    """Random bytes, in clear and sealed."""
    bits = 256 if call.body.bits is None else call.body.bits
    if bits not in _BITS:
        raise InvalidRequest("bits: expected 128, 256 or 512")
    kms, key_id = call.service.kms, call.path("name")
    generate = partial(kms.generate_data_key, call.caller, bits // 8, key_id=key_id)
    made, number = sealed_numbered(kms, call.caller, _extra(call.body), generate, key_id=key_id)
    return VaultCiphertext(models.render(number, made.ciphertext), number, made.plaintext)


@routes.write("{mount}/datakey/wrapped/{name}", DataKeyIn, _data_key_pool)
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
    seal = partial(kms.encrypt, call.caller, plaintext, key_id=key_id)
    sealed, number = sealed_numbered(kms, call.caller, _extra(body), seal, key_id=key_id)
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
    return file, msgspec.structs.replace(_extra(body), number=number)


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
