"""File keys of age tools: their plugin has them wrapped and unwrapped, the tool does the rest of the file."""

from typing import Final

from fastapi import APIRouter, Request, Response

from kms_api import json_body
from kms_api.deps import call, caller, service
from kms_api.openapi import describe
from kms_api.routing import ScopedRoute
from kms_protocol import errors, wire
from kms_protocol.context import Context

router: Final = APIRouter(tags=["secrets"], route_class=ScopedRoute)
_BODY_BYTES: Final = 128 * 1024  # the largest header of the sync path, in base64, and a context
_CONTEXT: Final = "env=prod,service=api"


@router.post(
    "/wrap",
    **describe.described(
        "wrap",
        body=describe.takes(wire.WrapIn, {"file_key": "AAECAwQFBgcICQoLDA0ODw==", "context": _CONTEXT}),
        answers={200: describe.gives(wire.WrapOut, "Wrapped, as one stanza for the header")},
        refuses=(*describe.BODY, *describe.SEALING),
    ),
)
async def wrap(request: Request) -> Response:
    """Wrap the 16-byte file key of an age file that the caller makes. A scope has to name `wrap`."""
    built = service(request)
    body = await json_body.read(request, wire.WrapIn, _BODY_BYTES)
    context = Context.parse(body.context)
    made = await call(built, built.kms.wrap, caller(request), body.file_key, context, key_id=body.key_id)
    key = made.key
    return json_body.answer(
        wire.WrapOut(stanza=made.stanza, key_id=key.key_id, key_version=key.version, backend=key.backend)
    )


@router.post(
    "/unwrap",
    **describe.described(
        "unwrap",
        body=describe.takes(
            wire.UnwrapIn, {"stanzas": "LT4ga21zLXNlcnZpY2UvYnVuZGxlIDEK", "context": _CONTEXT}
        ),
        answers={
            200: describe.gives(wire.UnwrapOut, "The file key; the header's MAC is the caller's to check")
        },
        refuses=(
            *describe.BODY,
            errors.InvalidContext,
            errors.DecryptFailed,
            errors.ForeignRefused,
            errors.UnknownKey,
            errors.BackendUnavailable,
        ),
    ),
)
async def unwrap(request: Request) -> Response:
    """The file key of an age file, from the stanzas of its header. A scope has to name `unwrap`."""
    built = service(request)
    body = await json_body.read(request, wire.UnwrapIn, _BODY_BYTES)
    context = Context.parse(body.context)
    found = await call(built, built.kms.unwrap, caller(request), body.stanzas, context, key_id=body.key_id)
    key = found.key
    return json_body.answer(
        wire.UnwrapOut(
            file_key=found.file_key,
            key_id=key.key_id,
            key_version=key.version,
            backend=key.backend,
            origin=found.origin,
        )
    )
