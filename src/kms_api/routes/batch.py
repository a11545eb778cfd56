"""Many single calls in one request: batches, each item with its own outcome, and Temporal's payloads.

The codec server seals workflow data before it reaches Temporal and opens it afterwards. The protocol is
Temporal's (docs.temporal.io/codec-server): POST of payloads, answered with as many in the same order.
"""

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import UNSET

from kms_api.deps import Pool, Service
from kms_api.json_body import JsonBody
from kms_api.openapi import describe
from kms_api.routes.secrets import check_ciphertext, check_plaintext
from kms_api.routing import CALLER, Call, Router
from kms_core.auth.policy import Principal
from kms_core.jobs import authorization, bulk_lines
from kms_core.operation import Opened, Sealed
from kms_core.service import Kms
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import InvalidRequest, KmsError

router: Final = Router("secrets")
SEALED: Final = b"binary/encrypted"  # Temporal's name for it, by which its own tools know such payloads
NAMESPACE: Final = "temporal:namespace"
_NAMESPACE: Final = describe.header(
    "X-Namespace", {"type": "string"}, f"The Temporal namespace: bound as the context `{NAMESPACE}`"
)


def _pool(call: Call[wire.BatchIn]) -> Pool:
    files = (item.ciphertext or b"" for item in call.body.items)
    return call.service.batch_pool(call.caller, (item.key_id for item in call.body.items), files)


@router.call(
    "POST",
    "/batch",
    CALLER,
    JsonBody(wire.BatchIn),
    _pool,
    gives="Each item has its own outcome",
)
def batch(call: Call[wire.BatchIn]) -> wire.BatchOut:
    """Up to 1,000 calls of one kind. A refused item has an ``error``; the others are not affected.

    A caller without a scope for the operation gets 403, as for a single call.
    """
    service, body = call.service, call.body
    wait_s = admit_items(service, call.caller, body.operation, len(body.items))
    kms = service.kms.for_job()
    with kms.audit_log.together():
        results = [_one(call, kms, index, item) for index, item in enumerate(body.items)]
    failed = sum(result.error is not UNSET for result in results)
    return wire.BatchOut(results=results, failed=failed, retry_after_s=round(wait_s, 1) or UNSET)


def admit_items(service: Service, who: Principal, operation: wire.JobKind, count: int) -> float:
    """Authorize a batch as a whole, then count its items; a denied batch counts as one request.

    Returns the seconds until the tenant's next request is allowed. Raises Forbidden, RateLimited,
    Unavailable, AuditUnavailable. May wait for the disk.
    """
    authorization.check_batch(service.kms, who, operation)
    return service.requests.take_items(who.tenant, count)


def _one(call: Call[wire.BatchIn], kms: Kms, index: int, item: wire.BatchItem) -> wire.BatchResult:
    operation, reference = call.body.operation, UNSET if item.reference is None else item.reference
    try:
        single = wire.JobItem(plaintext=item.plaintext, ciphertext=item.ciphertext, context=item.context)
        bulk_lines.check_item(operation, index, single)
        data, context = item.plaintext or item.ciphertext or b"", Context.parse(item.context)
        made = kms.run(operation, call.caller, data, context, key_id=item.key_id)
    except KmsError as exc:
        return wire.BatchResult(index=index, reference=reference, error=wire.ErrorCode(code=exc.code))
    opened = made if isinstance(made, Opened) else None
    return wire.BatchResult(
        index=index,
        reference=reference,
        plaintext=opened.plaintext if opened else UNSET,
        ciphertext=made.ciphertext if isinstance(made, Sealed) else UNSET,
        key_id=made.key.key_id,
        key_version=made.key.version,
        backend=made.key.backend,
        origin=opened.origin if opened else UNSET,
        file_id=made.file_id,
    )


@router.call(
    "POST",
    "/codec/encode",
    CALLER,
    JsonBody(wire.CodecIn),
    lambda call: call.service.batch_pool(call.caller, [call.headers.get("x-kms-key-id")]),
    parameters=(_NAMESPACE, describe.KEY_ID),
    gives="As many payloads, in the same order",
    refuses=describe.SEALING,
)
def codec_encode(call: Call[wire.CodecIn]) -> wire.CodecOut:
    """Seal payloads of Temporal. One that cannot be sealed refuses the whole request."""
    service, who, context = call.service, call.caller, _context(call)
    key_id = call.headers.get("x-kms-key-id")

    def seal(kms: Kms, payload: wire.Payload) -> wire.Payload:
        plaintext = wire.encode(payload)
        check_plaintext(plaintext)
        sealed = kms.encrypt(who, plaintext, context, key_id=key_id)
        metadata = {"encoding": SEALED, "encryption-key-id": sealed.key.key_id.encode()}
        return wire.Payload(metadata=metadata, data=sealed.ciphertext)

    if key_id is not None:  # a wrong key id is refused even if there is nothing to seal
        service.kms.require(who, "encrypt", key_id, context)
        service.kms.keyring.named(key_id)
    return _coded(call, seal)


@router.call(
    "POST",
    "/codec/decode",
    CALLER,
    JsonBody(wire.CodecIn),
    lambda call: call.service.batch_pool(call.caller, (), (payload.data for payload in call.body.payloads)),
    parameters=(_NAMESPACE,),
    gives="As many payloads, in the same order",
    refuses=describe.OPENING,
)
def codec_decode(call: Call[wire.CodecIn]) -> wire.CodecOut:
    """Open payloads that ``/codec/encode`` has sealed; each names its key. Others are returned unchanged."""
    who, context = call.caller, _context(call)

    def open_(kms: Kms, payload: wire.Payload) -> wire.Payload:
        if payload.metadata.get("encoding") != SEALED:
            return payload
        check_ciphertext(payload.data)
        opened = kms.decrypt(who, payload.data, context)
        try:
            return msgspec.json.decode(opened.plaintext, type=wire.Payload)
        except wire.NOT_JSON:
            raise InvalidRequest("The plaintext is not a payload of Temporal") from None

    return _coded(call, open_)


def _context(call: Call[wire.CodecIn]) -> Context:
    namespace = call.headers.get("x-namespace")
    return Context.parse(None if namespace is None else {NAMESPACE: namespace})


def _coded(call: Call[wire.CodecIn], code: Callable[[Kms, wire.Payload], wire.Payload]) -> wire.CodecOut:
    kms = call.service.kms.for_job()  # calls an unreachable peer a few times, not once a payload
    with call.service.kms.audit_log.together():
        return wire.CodecOut(payloads=[code(kms, payload) for payload in call.body.payloads])
