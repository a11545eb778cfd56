"""A codec server for Temporal: workflow data is sealed before it reaches Temporal, and opened after it.

The protocol is Temporal's (docs.temporal.io/codec-server): POST of payloads, and as many in the same order.
"""

from collections.abc import Callable
from typing import Final

import anyio.to_thread
import msgspec
from fastapi import APIRouter, Request, Response

from kms_api import json_body
from kms_api.deps import Service, caller, service
from kms_api.openapi import describe
from kms_api.routes.batch import BATCHES
from kms_api.routes.secrets import check_ciphertext, check_plaintext
from kms_api.routing import ScopedRoute
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import InvalidRequest

router: Final = APIRouter(tags=["secrets"], route_class=ScopedRoute)
SEALED: Final = b"binary/encrypted"  # Temporal's name for it, by which its own tools know such payloads
NAMESPACE: Final = "temporal:namespace"
_PLAIN: Final = {"payloads": [{"metadata": {"encoding": "anNvbi9wbGFpbg=="}, "data": "IkhlbGxvIg=="}]}
_NAMESPACE: Final = describe.header(
    "X-Namespace", {"type": "string"}, f"The Temporal namespace: bound as the context `{NAMESPACE}`"
)
_KEY_ID: Final = describe.header(
    "X-KMS-Key-Id",
    {"type": "string", "pattern": wire.KEY_ID_PATTERN},
    "The key id; absent means the default key",
)
_ANSWERS: Final = {200: describe.gives(wire.CodecOut, "As many payloads, in the same order")}
Move = Callable[[Kms, wire.Payload], wire.Payload]


@router.post(
    "/codec/encode",
    **describe.described(
        "codec_encode",
        body=describe.takes(wire.CodecIn, _PLAIN, required=False),
        parameters=(_NAMESPACE, _KEY_ID),
        answers=_ANSWERS,
        refuses=(*describe.BODY, *describe.SEALING),
    ),
)
async def encode(request: Request) -> Response:
    """Seal the payloads of Temporal. One that cannot be sealed refuses all."""
    built, who, context = service(request), caller(request), _context(request)
    key_id = request.headers.get("x-kms-key-id")

    def seal(kms: Kms, payload: wire.Payload) -> wire.Payload:
        plaintext = wire.encode(payload)
        check_plaintext(built, plaintext)
        sealed = kms.encrypt(who, plaintext, context, key_id=key_id)
        metadata = {"encoding": SEALED, "encryption-key-id": sealed.key.key_id.encode()}
        return wire.Payload(metadata=metadata, data=sealed.ciphertext)

    if key_id is not None:  # a wrong one is told of, even where there is nothing to seal
        built.kms.allow(who, "encrypt", key_id, context)
        built.kms.keyring.named(key_id)
    return await _moved(request, built, seal)


@router.post(
    "/codec/decode",
    **describe.described(
        "codec_decode",
        body=describe.takes(wire.CodecIn, _PLAIN, required=False),
        parameters=(_NAMESPACE,),
        answers=_ANSWERS,
        refuses=(*describe.BODY, *describe.OPENING),
    ),
)
async def decode(request: Request) -> Response:
    """Open payloads that ``/codec/encode`` has sealed; each names its key. Others stay as they are."""
    built, who, context = service(request), caller(request), _context(request)

    def open_(kms: Kms, payload: wire.Payload) -> wire.Payload:
        if payload.metadata.get("encoding") != SEALED:
            return payload
        check_ciphertext(built, payload.data)
        opened = kms.decrypt(who, payload.data, context)
        try:
            return msgspec.json.decode(opened.plaintext, type=wire.Payload)
        except wire.NOT_JSON:
            raise InvalidRequest("What is sealed there is no payload of Temporal") from None

    return await _moved(request, built, open_)


def _context(request: Request) -> Context:
    namespace = request.headers.get("x-namespace")
    return Context.parse(None if namespace is None else {NAMESPACE: namespace})


async def _moved(request: Request, built: Service, move: Move) -> Response:
    body = await json_body.read(request, wire.CodecIn, built.settings.kms.limits.json_body_bytes)

    def work() -> list[wire.Payload]:
        kms = built.kms.for_job()  # a peer that is away is asked a few times, not once a payload
        with built.kms.trail.together():
            return [move(kms, payload) for payload in body.payloads]

    moved = await anyio.to_thread.run_sync(work, limiter=built.limiter(BATCHES))
    return json_body.answer(wire.CodecOut(payloads=moved))
