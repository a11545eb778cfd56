"""The pages of the audit log, keys and runbooks, and the API viewer at ``/docs``.

A page or form runs as a whole in one thread. It leaves out what the caller may not read or do.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from fastapi import Response
from starlette.responses import FileResponse

from kms_api.deps import Service
from kms_api.routes import audit, job_options, keys
from kms_api.routing import CALLER, DOCS, OPEN, UI, Call, Router
from kms_api.ui.render import STATIC, STATIC_FILES, THREADS, Fields, form, percent, render, screen, to
from kms_core import audit as records
from kms_core.audit import query
from kms_core.audit.chain import text_of
from kms_core.audit.hosts import HostLog
from kms_core.audit.query import EventFilter, RecordedOperation
from kms_core.audit.verification import receipt
from kms_core.audit.verification.receipt import Receipt, UnknownRecord
from kms_core.auth.policy import Principal, allows
from kms_core.observability.degraded import DEGRADED
from kms_protocol import admin
from kms_protocol.errors import AuditUnavailable, Missing, UnknownKey
from kms_protocol.units import parse_time

router: Final = Router("pages", prefix=UI)
docs: Final = Router("pages")
_FIELDS: Final = ("operation", "result", "principal", "source", "key_id", "file_id", "job_id", "request_id")
_PERIODS: Final = {"1h": timedelta(hours=1), "24h": timedelta(days=1), "7d": timedelta(days=7), "all": None}
_EVENTS: Final = 100
DAY: Final = timedelta(days=1)
_NEARLY_SPENT: Final = 0.7  # as the alert KmsKeyBudget


@dataclass(frozen=True, slots=True)
class Row:
    """A key, its problem (empty for none), and whether the caller may rotate it."""

    key: admin.KeyOut
    problem: str
    may_rotate: bool


# -- audit ---------------------------------------------------------------------------------------------


@router.read("/audit", audit.SCOPE, audit.SEARCHES)
def audit_log(call: Call[None]) -> Response:
    """Operations of this tenant, newest first, by filter and period."""
    period = job_options.one_of("period", call.query.get("period", "24h"), _PERIODS)
    until, host = call.query.get("until", ""), call.query.get("host", "")
    service, caller = call.service, call.caller
    given = {name: call.query.get(name, "").strip() for name in _FIELDS}
    logs, unread = audit.logs_of(service, host)
    equal = [(name, value) for name, value in given.items() if value and name != "result"]
    ago = _PERIODS[period]
    wanted = EventFilter(
        equal=(("tenant", caller.tenant), *equal),
        result=given["result"],
        since="" if ago is None else text_of(datetime.now(UTC) - ago),
        until=audit.time_of("until", until or None),
    )
    found, writable = newest_events(logs, wanted, _EVENTS, unread), True
    asked = {**given, "host": host, "period": period, "until": until}
    try:
        records.read(service.kms.audit_log, caller, asked, len(found))
    except AuditUnavailable:
        found, writable = [], False
    return render(
        call.request,
        "audit.html",
        events=found,
        given=given,
        host=host,
        hosts=audit.hosts(audit.logs_of(service)),
        unread=unread,
        period=period,
        periods=_PERIODS,
        older=found[-1].time if len(found) == _EVENTS else None,
        is_first=not until,
        is_writable=writable,
        audit_log=service.audit_monitor.condition,
        most=query.MOST_SCANNED,
    )


def newest_events(
    logs: Sequence[HostLog], wanted: EventFilter, limit: int, unread: dict[str, str]
) -> list[RecordedOperation]:
    """At most ``limit`` operations, newest first. Raises AuditUnavailable.

    Adds to ``unread`` the reason for each host whose copy could not be read.
    """
    try:
        return query.newest(logs, wanted, limit, query.MOST_SCANNED, unread)[::-1]
    except OSError as exc:
        raise AuditUnavailable("The audit log cannot be read") from exc


@router.read("/audit/{audit_id}/receipt", audit.SCOPE, audit.SEARCHES)
def receipt_of(call: Call[None]) -> Response:
    """Proof that an operation of this tenant was recorded, as a file.

    Raises UnknownRecord, also for a record that is not an operation of this tenant.
    """
    service, caller, host = call.service, call.caller, call.query.get("host", "")
    made = _receipt(audit.logs_of(service, host).logs, call.path("audit_id"))
    event = msgspec.json.decode(made.line, type=RecordedOperation)
    if event.kind or event.tenant != caller.tenant:
        raise UnknownRecord
    records.read(service.kms.audit_log, caller, {"receipt": made.id, "host": host}, 1)
    named = f'attachment; filename="receipt-{made.id.replace(":", "-")}.json"'
    body = msgspec.json.encode(made)
    return Response(body, media_type="application/json", headers={"Content-Disposition": named})


def _receipt(logs: Iterable[HostLog], audit_id: str) -> Receipt:
    """The receipt from the first log that has the record. Raises UnknownRecord."""
    for log in logs:
        with suppress(OSError, UnknownRecord):
            return receipt.make(log.folder, audit_id)
    raise UnknownRecord


# -- keys ----------------------------------------------------------------------------------------------


@router.read("/keys", CALLER, THREADS)
def key_list(call: Call[None]) -> Response:
    """The keys that the caller may use: versions, ages, numbers of encryptions, next rotation."""
    rows, done = rows_of(call.service, call.caller), call.query.get("done", "")
    return render(call.request, "keys.html", keys=rows, done=done)


@router.read("/keys/{key_id}/rotate", CALLER, THREADS)
def rotation(call: Call[None]) -> Response:
    """The effects of a rotation, and a form to confirm it. Raises UnknownKey."""
    for row in rows_of(call.service, call.caller):
        if row.key.id == call.path("key_id"):
            return render(call.request, "rotate.html", row=row)
    raise UnknownKey


def rows_of(service: Service, caller: Principal) -> list[Row]:
    """The keys that the caller may use."""
    policy, now = service.kms.policy, datetime.now(UTC)
    return [
        Row(shape, _problem(shape, now), allows(policy, caller, "rotate", shape.id))
        for shape in keys.visible(service, caller)
    ]


def _problem(key: admin.KeyOut, now: datetime) -> str:
    if key.current_version is None:
        return "its backend does not answer"
    if key.rotate_at is not None and parse_time(key.rotate_at) <= now:
        return "a new version is due"
    if key.budget is not None and key.budget >= _NEARLY_SPENT:
        return f"{percent(key.budget)} of the encryptions allowed for one version are used"
    return ""


# -- runbooks ------------------------------------------------------------------------------------------


@router.read("/runbooks", CALLER, THREADS)
def runbook_list(call: Call[None]) -> Response:
    """The runbook of each alert. Alerts and dashboards link here."""
    texts = screen(call.request).runbooks
    return render(call.request, "runbooks.html", runbooks=texts, known=DEGRADED)


# -- files ---------------------------------------------------------------------------------------------


@router.stream("GET", "/static/{name}", OPEN)
async def static(call: Call[None]) -> Response:
    """Styles, scripts and the icon; ``.gz`` files are sent compressed. Raises Missing."""
    name = call.path("name")
    if name not in STATIC_FILES:
        raise Missing
    headers = {"Content-Encoding": "gzip"} if name.endswith(".gz") else None
    return FileResponse(STATIC / name, headers=headers, media_type=STATIC_FILES[name])


@docs.stream("GET", DOCS, OPEN)
async def api(call: Call[None]) -> Response:
    """The API in Swagger UI."""
    del call
    return FileResponse(STATIC / "docs.html")


@router.call(
    "POST",
    "/keys/{key_id}/rotate",
    CALLER,
    form,
    lambda call: call.service.rotation_pool(call.path("key_id")),
)
def rotate(call: Call[Fields]) -> Response:
    """Rotate a key: ``POST /keys/{id}/rotate`` for the page."""
    call.service.kms.rotate(call.caller, key_id=call.path("key_id"))
    return to("/keys", done="rotated")
