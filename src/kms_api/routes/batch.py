"""Many single calls in one request: answered at once, each with its own outcome."""

from dataclasses import replace
from typing import Final

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from kms_api import json_body
from kms_api.deps import Service, caller, service
from kms_api.openapi import describe
from kms_api.routing import ScopedRoute
from kms_core.auth.policy import Principal
from kms_core.jobs import authorization, bulk_lines
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import KmsError

router: Final = APIRouter(tags=["secrets"], route_class=ScopedRoute)
BATCHES: Final = "batch"
_EXAMPLE: Final = {
    "operation": "encrypt",
    "items": [{"plaintext": "SGVsbG8=", "context": "row=7", "reference": "salary"}],
}


@router.post(
    "/batch",
    **describe.described(
        "batch",
        body=describe.takes(wire.BatchIn, _EXAMPLE),
        answers={200: describe.gives(wire.BatchOut, "Each item has its own outcome")},
        refuses=describe.BODY,
    ),
)
async def batch(request: Request) -> Response:
    """Up to 1,000 calls of one kind. A refused item has an ``error`` and sinks no other.

    A caller to whom no scope gives the operation is answered 403, as to a single call.
    """
    built = service(request)
    body = await json_body.read(request, wire.BatchIn, built.settings.kms.limits.json_body_bytes)
    who = caller(request)
    limiter = built.limiter(BATCHES)
    return json_body.answer(await anyio.to_thread.run_sync(_run, built, who, body, limiter=limiter))


def _run(built: Service, who: Principal, body: wire.BatchIn) -> wire.BatchOut:
    admit_items(built, who, body.operation, len(body.items))
    built = replace(built, kms=built.kms.for_job())
    with built.kms.trail.together():
        results = [_one(built, who, body.operation, index, item) for index, item in enumerate(body.items)]
    return wire.BatchOut(results=results, failed=sum(result.error is not UNSET for result in results))


def admit_items(built: Service, who: Principal, operation: wire.JobKind, count: int) -> None:
    """Ask for a batch as a whole, then count its items; a batch that is denied costs its one request.

    Raises Forbidden, RateLimited, Unavailable, AuditUnavailable. May wait for the disk.
    """
    authorization.check_batch(built.kms, who, operation)
    built.requests.take_items(who.tenant, count)


def _one(
    built: Service, who: Principal, operation: wire.JobKind, index: int, item: wire.BatchItem
) -> wire.BatchResult:
    reference = item.reference if item.reference is not None else UNSET
    limit = built.settings.kms.limits.sync_plaintext_bytes
    try:
        single = wire.JobItem(plaintext=item.plaintext, ciphertext=item.ciphertext, context=item.context)
        bulk_lines.check_item(operation, index, single, limit)
        context = Context.parse(item.context)
        if operation == "encrypt":
            sealed = built.kms.encrypt(who, item.plaintext or b"", context, key_id=item.key_id)
        elif operation != "decrypt":
            move = built.kms.rewrap if operation == "rewrap" else built.kms.reseal
            sealed = move(who, item.ciphertext or b"", context, key_id=item.key_id)
        else:
            opened = built.kms.decrypt(who, item.ciphertext or b"", context, key_id=item.key_id)
            return wire.BatchResult(
                index=index,
                reference=reference,
                plaintext=opened.plaintext,
                key_id=opened.key.key_id,
                key_version=opened.key.version,
                backend=opened.key.backend,
                origin=opened.origin,
            )
    except KmsError as exc:
        return wire.BatchResult(index=index, reference=reference, error=wire.ErrorCode(code=exc.code))
    key = sealed.key
    return wire.BatchResult(
        index=index,
        reference=reference,
        ciphertext=sealed.ciphertext,
        key_id=key.key_id,
        key_version=key.version,
        backend=key.backend,
    )
