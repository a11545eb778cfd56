"""encrypt, decrypt, rewrap and data keys, one or many at a time."""

from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from typing import Final

import anyio.to_thread
import msgspec
from starlette.responses import Response

from kms_api.deps import Service, call
from kms_api.errors import vault
from kms_api.routes.batch import BATCHES, admit_items
from kms_api.routes.secrets import check_ciphertext, check_plaintext
from kms_api.vault_api import models, service
from kms_api.vault_api.models import BoundFields, DataKeyIn, Item, VaultCall, VaultCiphertext, VaultPlaintext
from kms_api.vault_api.request import VaultRequest, answer
from kms_api.vault_api.service import Extra
from kms_protocol.errors import InvalidRequest, KmsError, TooLarge, Unavailable
from kms_protocol.wire import JobKind

TYPES: Final = frozenset({"chacha20-poly1305", "aes256-gcm96"})
"""What may be asked for: what the payload is, and the default of clients, which is as strong."""
_BITS: Final = frozenset({128, 256, 512})
_CODES: Final = frozenset(range(200, 600)) - {204, 205, 304}  # these have no body to put outcomes into
Work = Callable[[VaultRequest, VaultCall], Item]


async def encrypt(asked: VaultRequest) -> Response:
    """``plaintext`` to ``ciphertext``. A key that is not there is not made."""
    body = await asked.body(VaultCall)
    if body.batch_input is not None:
        return await _many(asked, body, "encrypt", _encrypt_item)
    plaintext = _plaintext(asked.built, body)
    sealed, number = await call(
        asked.built,
        service.encrypt,
        asked.built.kms,
        asked.who,
        plaintext,
        _extra(body),
        key_id=asked.key_id,
    )
    return answer(VaultCiphertext(models.render(number, sealed.ciphertext), number))


async def decrypt(asked: VaultRequest) -> Response:
    """``ciphertext`` to ``plaintext``; the number in its prefix is authenticated."""
    body = await asked.body(VaultCall)
    if body.batch_input is not None:
        return await _many(asked, body, "decrypt", _decrypt_item)
    file, extra = _file(asked.built, body)
    plaintext = await call(
        asked.built, service.decrypt, asked.built.kms, asked.who, file, extra, key_id=asked.key_id
    )
    return answer(VaultPlaintext(plaintext))


async def rewrap(asked: VaultRequest) -> Response:
    """The same payload under the version in use, bound as it was."""
    body = await asked.body(VaultCall)
    if body.batch_input is not None:
        return await _many(asked, body, "rewrap", _rewrap_item)
    file, extra = _file(asked.built, body)
    sealed, number = await call(
        asked.built, service.rewrap, asked.built.kms, asked.who, file, extra, key_id=asked.key_id
    )
    return answer(VaultCiphertext(models.render(number, sealed.ciphertext), number))


async def data_key(asked: VaultRequest) -> Response:
    """Random bytes, in clear and sealed."""
    return await _data_key(asked, in_clear=True)


async def wrapped_data_key(asked: VaultRequest) -> Response:
    """Random bytes, sealed alone."""
    return await _data_key(asked, in_clear=False)


async def _data_key(asked: VaultRequest, *, in_clear: bool) -> Response:
    body = await asked.body(DataKeyIn)
    bits = 256 if body.bits is None else body.bits
    if bits not in _BITS:
        raise InvalidRequest("bits: expected 128, 256 or 512")
    made, number = await call(
        asked.built,
        service.data_key,
        asked.built.kms,
        asked.who,
        bits // 8,
        _extra(body),
        key_id=asked.key_id,
    )
    text = models.render(number, made.ciphertext)
    return answer(
        VaultCiphertext(text, number, made.plaintext) if in_clear else VaultCiphertext(text, number)
    )


# -- many ----------------------------------------------------------------------------------------------


async def _many(asked: VaultRequest, body: VaultCall, operation: JobKind, work: Work) -> Response:
    """Every item's outcome, in order; 400 if any was refused, since clients look at the status alone."""
    items, code = body.batch_input or [], body.partial_failure_response_code
    if _extra(body) is not _NOTHING:
        raise InvalidRequest(
            "context, associated_data, key_version: write them into each item of batch_input"
        )
    if not items:
        raise InvalidRequest("missing batch input to process: batch_input is empty")
    if len(items) > models.MAX_ITEMS:
        raise TooLarge(f"batch_input has at most {models.MAX_ITEMS} items: send several requests")
    if code is not None and code not in _CODES:
        raise InvalidRequest("partial_failure_response_code: expected 200 to 599, of an answer with a body")
    limiter = asked.built.limiter(BATCHES)
    results = await anyio.to_thread.run_sync(_run, asked, items, operation, work, limiter=limiter)
    failed = sum(result.error is not msgspec.UNSET for result in results)
    status: int = HTTPStatus.OK
    if failed:
        status = code if code and failed < len(results) else HTTPStatus.BAD_REQUEST
    return answer(models.Results(results), status)


def _run(asked: VaultRequest, items: list[msgspec.Raw], operation: JobKind, work: Work) -> list[Item]:
    """Raises Unavailable if one item could not be done now: to try all again is harmless."""
    admit_items(asked.built, asked.who, operation, len(items))
    built = replace(asked.built, kms=asked.built.kms.for_job())
    with built.kms.trail.together():
        return [_one(replace(asked, built=built), item, work) for item in items]


def _one(asked: VaultRequest, raw: msgspec.Raw, work: Work) -> Item:
    reference = ""
    try:
        item = models.read(raw, VaultCall)
        reference = item.reference or ""
        return msgspec.structs.replace(work(asked, item), reference=reference)
    except Unavailable:
        raise
    except KmsError as exc:
        return Item(reference, error=vault.text(exc))


def _encrypt_item(asked: VaultRequest, item: VaultCall) -> Item:
    plaintext = _plaintext(asked.built, item)
    sealed, number = service.encrypt(asked.built.kms, asked.who, plaintext, _extra(item), key_id=asked.key_id)
    return Item(ciphertext=models.render(number, sealed.ciphertext), key_version=number)


def _decrypt_item(asked: VaultRequest, item: VaultCall) -> Item:
    file, extra = _file(asked.built, item)
    return Item(plaintext=service.decrypt(asked.built.kms, asked.who, file, extra, key_id=asked.key_id))


def _rewrap_item(asked: VaultRequest, item: VaultCall) -> Item:
    file, extra = _file(asked.built, item)
    sealed, number = service.rewrap(asked.built.kms, asked.who, file, extra, key_id=asked.key_id)
    return Item(ciphertext=models.render(number, sealed.ciphertext), key_version=number)


# -- what was given --------------------------------------------------------------------------------------


def _plaintext(built: Service, body: VaultCall) -> bytes:
    if body.plaintext is None:
        raise InvalidRequest("missing plaintext to encrypt: send it in base64; an empty one as an empty text")
    plaintext = models.octets(body.plaintext, "plaintext")
    check_plaintext(built, plaintext)
    return plaintext


def _file(built: Service, body: VaultCall) -> tuple[bytes, Extra]:
    if not body.ciphertext:
        raise InvalidRequest("missing ciphertext: send what encrypt gave, with its prefix")
    number, file = models.parse(body.ciphertext)
    check_ciphertext(built, file)
    return file, replace(_extra(body), number=number)


def _extra(body: BoundFields) -> Extra:
    """Raises InvalidRequest for what this service does not do, or would do otherwise than asked."""
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


_NOTHING: Final = Extra()
