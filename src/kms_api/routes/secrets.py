"""Single calls on bytes: encrypt, decrypt, data keys, rewrap."""

from typing import Final

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from kms_api import json_body
from kms_api.deps import Service, call, caller, service
from kms_api.openapi import describe
from kms_api.routing import ScopedRoute
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import DataKeysUnsupported, InvalidRequest, TooLarge

router: Final = APIRouter(tags=["secrets"], route_class=ScopedRoute)
_EXAMPLE: Final = {"plaintext": "SGVsbG8sIFdvcmxkIQ==", "context": "env=prod,service=api"}
_OPENING: Final = {
    "decrypt": {
        "operationId": "decrypt",
        "requestBody": {
            "ciphertext": "$response.body#/ciphertext",
            "context": "$request.body#/context",
        },
    }
}
_A_PART: Final = "YWdlLWVuY3J5cHRpb24ub3JnL3YxCg=="  # of a ciphertext


@router.post(
    "/encrypt",
    **describe.described(
        "encrypt",
        body=describe.takes(wire.EncryptIn, _EXAMPLE),
        answers={200: {**describe.gives(wire.EncryptOut, "Sealed"), "links": _OPENING}},
        refuses=(*describe.BODY, *describe.SEALING),
    ),
)
async def encrypt(request: Request) -> Response:
    """Seal up to 1 MiB. The answer is a complete age file, bound to the context."""
    built = service(request)
    body = await json_body.read(request, wire.EncryptIn, built.settings.kms.limits.json_body_bytes)
    check_plaintext(built, body.plaintext)
    context = Context.parse(body.context)
    sealed = await call(
        built, built.kms.encrypt, caller(request), body.plaintext, context, key_id=body.key_id
    )
    key = sealed.key
    return json_body.answer(
        wire.EncryptOut(
            ciphertext=sealed.ciphertext, key_id=key.key_id, key_version=key.version, backend=key.backend
        )
    )


@router.post(
    "/decrypt",
    **describe.described(
        "decrypt",
        body=describe.takes(wire.DecryptIn, {"ciphertext": _A_PART, "context": "env=prod,service=api"}),
        answers={200: describe.gives(wire.DecryptOut, "Opened, and nothing of it was changed")},
        refuses=(*describe.BODY, *describe.OPENING),
    ),
)
async def decrypt(request: Request) -> Response:
    """Open a ciphertext with the context it was sealed with; the file names its key."""
    built = service(request)
    body = await json_body.read(request, wire.DecryptIn, built.settings.kms.limits.json_body_bytes)
    check_ciphertext(built, body.ciphertext)
    context = Context.parse(body.context)
    opened = await call(
        built, built.kms.decrypt, caller(request), body.ciphertext, context, key_id=body.key_id
    )
    key = opened.key
    return json_body.answer(
        wire.DecryptOut(
            plaintext=opened.plaintext,
            key_id=key.key_id,
            key_version=key.version,
            backend=key.backend,
            origin=opened.origin,
        )
    )


@router.post(
    "/generate-key",
    **describe.described(
        "generate_key",
        body=describe.takes(wire.GenerateKeyIn, {"key_spec": "AES_256"}, required=False),
        answers={200: describe.gives(wire.GenerateKeyOut, "A new data key")},
        refuses=(*describe.BODY, *describe.SEALING, DataKeysUnsupported),
    ),
)
async def generate_key(request: Request) -> Response:
    """A data key: random bytes in clear and sealed, where the key's settings allow it."""
    built = service(request)
    body = await json_body.read(request, wire.GenerateKeyIn, built.settings.kms.limits.json_body_bytes)
    spec, size = _data_key_size(body)
    context = Context.parse(body.context)
    made = await call(built, built.kms.generate_data_key, caller(request), size, context, key_id=body.key_id)
    return json_body.answer(
        wire.GenerateKeyOut(
            plaintext=UNSET if body.without_plaintext else made.plaintext,
            ciphertext=made.ciphertext,
            key_spec=spec,
            key_id=made.key.key_id,
            key_version=made.key.version,
            backend=made.key.backend,
        )
    )


@router.post(
    "/rewrap",
    **describe.described(
        "rewrap",
        body=describe.takes(wire.RewrapIn, {"ciphertext": _A_PART, "key_id": "default"}),
        answers={200: describe.gives(wire.EncryptOut, "The same payload under its new header")},
        refuses=(*describe.BODY, *describe.OPENING, *describe.SEALING),
    ),
)
async def rewrap(request: Request) -> Response:
    """A new header around the same payload, for another key or context. It revokes nobody."""
    built = service(request)
    body = await json_body.read(request, wire.RewrapIn, built.settings.kms.limits.json_body_bytes)
    check_ciphertext(built, body.ciphertext)
    context = Context.parse(body.context)
    new_context = None if body.new_context is None else Context.parse(body.new_context)
    sealed = await call(
        built,
        built.kms.rewrap,
        caller(request),
        body.ciphertext,
        context,
        new_context=new_context,
        key_id=body.key_id,
    )
    key = sealed.key
    return json_body.answer(
        wire.EncryptOut(
            ciphertext=sealed.ciphertext, key_id=key.key_id, key_version=key.version, backend=key.backend
        )
    )


def check_plaintext(built: Service, plaintext: bytes) -> None:
    limit = built.settings.kms.limits.sync_plaintext_bytes
    if len(plaintext) > limit:
        raise TooLarge(f"The plaintext is above {limit} bytes: upload it to {wire.PREFIX}/files/encrypt")


def check_ciphertext(built: Service, ciphertext: bytes) -> None:
    limit = built.settings.kms.limits.sync_ciphertext_bytes
    if len(ciphertext) > limit:
        raise TooLarge(f"The ciphertext is above {limit} bytes: upload it to {wire.PREFIX}/files/decrypt")


def _data_key_size(body: wire.GenerateKeyIn) -> tuple[str, int]:
    if body.number_of_bytes is not None and body.key_spec is not None:
        raise InvalidRequest("Give key_spec or number_of_bytes, not both")
    if body.number_of_bytes is not None:
        return f"BYTES_{body.number_of_bytes}", body.number_of_bytes
    spec = body.key_spec or "AES_256"
    return spec, wire.KEY_SPEC_BYTES[spec]
