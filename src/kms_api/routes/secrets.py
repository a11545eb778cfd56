"""Single calls on bytes: encrypt, decrypt, rewrap, data keys, and file keys for age tools."""

from typing import Final, TypeVar

from msgspec import UNSET

from kms_api.deps import Pool
from kms_api.json_body import JsonBody
from kms_api.openapi import describe
from kms_api.routing import CALLER, Call, Router
from kms_core.envelope.binding import KeyRef
from kms_core.jobs.bulk_lines import CIPHERTEXT_BYTES, PLAINTEXT_BYTES
from kms_core.operation import Sealed
from kms_protocol import errors, wire
from kms_protocol.context import Context
from kms_protocol.errors import DataKeysUnsupported, InvalidRequest, TooLarge

U = TypeVar("U", bound=wire.UsedKey)
router: Final = Router("secrets")
_WRAP_BYTES: Final = 128 * 1024  # the largest header of a single call, in base64, and a context


def _opening(call: Call[wire.DecryptIn | wire.RewrapIn]) -> Pool | None:
    seals = isinstance(call.body, wire.RewrapIn)
    return call.key_pool(call.body.key_id, file=call.body.ciphertext, seals=seals)


@router.call(
    "POST",
    "/wrap",
    CALLER,
    JsonBody(wire.WrapIn, _WRAP_BYTES),
    lambda call: call.key_pool(call.body.key_id, seals=True),
    gives="Wrapped, as one stanza for the header",
    refuses=describe.SEALING,
)
def wrap(call: Call[wire.WrapIn]) -> wire.WrapOut:
    """Wrap the 16-byte file key of an age file that the caller makes. A scope must name `wrap`."""
    body = call.body
    made = call.service.kms.wrap(call.caller, body.file_key, Context.parse(body.context), key_id=body.key_id)
    return of_key(wire.WrapOut, made.key, stanza=made.stanza)


@router.call(
    "POST",
    "/unwrap",
    CALLER,
    JsonBody(wire.UnwrapIn, _WRAP_BYTES),
    lambda call: call.key_pool(call.body.key_id, file=call.body.stanzas),
    gives="The file key; the header's MAC is the caller's to check",
    refuses=(
        errors.InvalidContext,
        errors.DecryptFailed,
        errors.ForeignRefused,
        errors.UnknownKey,
        errors.BackendUnavailable,
    ),
)
def unwrap(call: Call[wire.UnwrapIn]) -> wire.UnwrapOut:
    """Unwrap the file key of an age file, given the stanzas of its header. A scope must name `unwrap`."""
    body = call.body
    context, nonce = Context.parse(body.context), body.nonce or b""
    found = call.service.kms.unwrap(call.caller, body.stanzas, context, key_id=body.key_id, nonce=nonce)
    return of_key(wire.UnwrapOut, found.key, file_key=found.file_key, origin=found.origin)


@router.call(
    "POST",
    "/encrypt",
    CALLER,
    JsonBody(wire.EncryptIn),
    lambda call: call.key_pool(call.body.key_id, size_bytes=len(call.body.plaintext), seals=True),
    gives="Sealed",
    refuses=describe.SEALING,
)
def encrypt(call: Call[wire.EncryptIn]) -> wire.EncryptOut:
    """Seal up to 1 MiB. The answer is a complete age file, bound to the context."""
    body = call.body
    check_plaintext(body.plaintext)
    context = Context.parse(body.context)
    return _sealed(call.service.kms.encrypt(call.caller, body.plaintext, context, key_id=body.key_id))


@router.call(
    "POST",
    "/decrypt",
    CALLER,
    JsonBody(wire.DecryptIn),
    _opening,
    gives="The authenticated plaintext",
    refuses=describe.OPENING,
)
def decrypt(call: Call[wire.DecryptIn]) -> wire.DecryptOut:
    """Open a ciphertext with the context it was sealed with; the file names its key."""
    body = call.body
    check_ciphertext(body.ciphertext)
    context = Context.parse(body.context)
    opened = call.service.kms.decrypt(call.caller, body.ciphertext, context, key_id=body.key_id)
    return of_key(
        wire.DecryptOut, opened.key, plaintext=opened.plaintext, origin=opened.origin, file_id=opened.file_id
    )


@router.call(
    "POST",
    "/generate-key",
    CALLER,
    JsonBody(wire.GenerateKeyIn),
    lambda call: call.key_pool(call.body.key_id, seals=True),
    gives="A new data key",
    refuses=(*describe.SEALING, DataKeysUnsupported),
)
def generate_key(call: Call[wire.GenerateKeyIn]) -> wire.GenerateKeyOut:
    """A data key: random bytes in clear and sealed, where the key's settings allow it."""
    body = call.body
    spec, size = _data_key_size(body)
    context = Context.parse(body.context)
    made = call.service.kms.generate_data_key(call.caller, size, context, key_id=body.key_id)
    return of_key(
        wire.GenerateKeyOut,
        made.key,
        plaintext=UNSET if body.without_plaintext else made.plaintext,
        ciphertext=made.ciphertext,
        key_spec=spec,
        file_id=made.file_id,
    )


@router.call(
    "POST",
    "/rewrap",
    CALLER,
    JsonBody(wire.RewrapIn),
    _opening,
    gives="The same payload under its new header",
    refuses=(*describe.OPENING, *describe.SEALING),
)
def rewrap(call: Call[wire.RewrapIn]) -> wire.EncryptOut:
    """A new header around the same payload, for another key or context. Old copies stay readable."""
    body = call.body
    check_ciphertext(body.ciphertext)
    context = Context.parse(body.context)
    new_context = None if body.new_context is None else Context.parse(body.new_context)
    kms, who = call.service.kms, call.caller
    return _sealed(kms.rewrap(who, body.ciphertext, context, new_context=new_context, key_id=body.key_id))


def check_plaintext(plaintext: bytes) -> None:
    """Raise TooLarge for a plaintext above the limit of single calls."""
    if len(plaintext) > PLAINTEXT_BYTES:
        raise TooLarge(
            f"The plaintext is above {PLAINTEXT_BYTES} bytes: upload it to {wire.PREFIX}/files/encrypt"
        )


def check_ciphertext(ciphertext: bytes) -> None:
    """Raise TooLarge for a ciphertext above the limit of single calls."""
    if len(ciphertext) > CIPHERTEXT_BYTES:
        raise TooLarge(
            f"The ciphertext is above {CIPHERTEXT_BYTES} bytes: upload it to {wire.PREFIX}/files/decrypt"
        )


def of_key(shape: type[U], key: KeyRef, **fields: object) -> U:
    """An answer that names the key and has these fields."""
    return shape(key_id=key.key_id, key_version=key.version, backend=key.backend, **fields)


def _sealed(made: Sealed) -> wire.EncryptOut:
    return of_key(wire.EncryptOut, made.key, ciphertext=made.ciphertext, file_id=made.file_id)


def _data_key_size(body: wire.GenerateKeyIn) -> tuple[str, int]:
    if body.number_of_bytes is not None and body.key_spec is not None:
        raise InvalidRequest("Give key_spec or number_of_bytes, not both")
    if body.number_of_bytes is not None:
        return f"BYTES_{body.number_of_bytes}", body.number_of_bytes
    spec = body.key_spec or "AES_256"
    return spec, wire.KEY_SPEC_BYTES[spec]
