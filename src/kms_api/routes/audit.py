"""The audit trail of the caller's tenant, page by page, as this install has recorded it."""

from datetime import UTC, datetime
from typing import Final

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from kms_api import json_body
from kms_api.deps import caller, service
from kms_api.openapi import describe
from kms_api.routing import ScopedRoute
from kms_core import audit as records
from kms_core.audit import query
from kms_core.audit.query import EventFilter, EventPage, RecordedOperation
from kms_core.audit.retention import text_of
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest

router: Final = APIRouter(tags=["audit"], route_class=ScopedRoute)
FIELDS: Final = (
    "operation",
    "principal",
    "credential",
    "source",
    "key_id",
    "backend",
    "request_id",
    "job_id",
    "effect",
)
_FILTERS: Final = frozenset({*FIELDS, "result", "since", "until"})
_PARAMETERS: Final = _FILTERS | {"after", "limit"}
_PAGE: Final = 100
_MOST: Final = 1000
_LIMITER: Final = "audit"


_TEXT: Final = {"type": "string"}
_TIME: Final = {"type": "string", "format": "date-time"}
_QUERY: Final = (
    describe.query("after", _TEXT, "`next` of the page before"),
    describe.query("limit", describe.whole(1, _MOST, _PAGE), "Events of this page at most"),
    describe.query("result", _TEXT, "`ok`, `failed` for all others, or an error code"),
    describe.query("since", _TIME, "RFC 3339, with an offset"),
    describe.query("until", _TIME, "RFC 3339, with an offset"),
    *(describe.query(name, _TEXT, "Events whose field is exactly this") for name in FIELDS),
)


@router.get(
    "/audit",
    **describe.described(
        "audit",
        parameters=_QUERY,
        answers={200: describe.gives(wire.AuditOut, "A page of events")},
        refuses=(InvalidRequest,),
    ),
)
async def audit(request: Request) -> Response:
    """Operations of this tenant, oldest first.

    ``after`` is the ``next`` of the page before. Filters: operation, principal, credential, source, key_id,
    backend, request_id, job_id, effect, result (``ok``, ``failed`` for all others, or an error code), since
    and until (RFC 3339 with an offset). Each page that is read is on record itself, as ``audit.read``.
    """
    built, who, given = service(request), caller(request), request.query_params
    if given.keys() - _PARAMETERS:
        raise InvalidRequest(f"The parameters of this call are {', '.join(sorted(_PARAMETERS))}")
    wanted = EventFilter(
        equal=(("tenant", who.tenant), *((name, given[name]) for name in FIELDS if name in given)),
        result=given.get("result", ""),
        since=time_of("since", given.get("since")),
        until=time_of("until", given.get("until")),
    )
    limit = _limit(given.get("limit"))

    def recorded() -> EventPage:
        page = query.page(built.settings.kms.audit.path, wanted, given.get("after"), limit)
        asked = {name: value for name, value in given.items() if name in _FILTERS}
        records.read(built.kms.trail, who, asked, len(page.events))
        return page

    page = await anyio.to_thread.run_sync(recorded, limiter=built.limiter(_LIMITER))
    events = [shape(event) for event in page.events]
    return json_body.answer(wire.AuditOut(events=events, next=page.following, more=page.more))


def shape(event: RecordedOperation) -> wire.AuditEvent:
    return wire.AuditEvent(
        id=event.id,
        time=event.time,
        operation=event.operation,
        stage=event.stage or UNSET,
        effect=event.effect or UNSET,
        route=event.route or UNSET,
        filter=event.filter or UNSET,
        source=event.source or UNSET,
        principal=event.principal,
        credential=event.credential,
        request_id=event.request_id or UNSET,
        job_id=event.job_id or UNSET,
        key_id=event.key_id or UNSET,
        key_version=event.key_version or UNSET,
        backend=event.backend or UNSET,
        origin=event.origin or UNSET,
        context=event.context,
        new_context=event.new_context or UNSET,
        bytes_in=event.bytes_in,
        bytes_out=event.bytes_out,
        result=event.result or UNSET,
        duration_us=event.duration_us,
        count=event.count or UNSET,
    )


def _limit(text: str | None) -> int:
    if text is None:
        return _PAGE
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(_MOST)) else 0
    if not 1 <= number <= _MOST:
        raise InvalidRequest(f"limit is a number from 1 to {_MOST}")
    return number


def time_of(name: str, text: str | None) -> str:
    """As records hold it; empty for none. Raises InvalidRequest."""
    if text is None:
        return ""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"{name} is an RFC 3339 time, as 2027-01-31T12:00:00Z") from None
    if at.tzinfo is None:
        raise InvalidRequest(f"{name} needs an offset, as 2027-01-31T12:00:00Z")
    return text_of(at.astimezone(UTC))
