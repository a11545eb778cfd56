"""The page for operators, as it is read: an overview, jobs, the audit trail, keys. Asks no other route.

Each page is one pass, in a thread, over what the routes of the API ask. What the caller may not do is left
out of the overview and of the forms; what a page is about is asked for by the table in ``routing.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, ParamSpec, TypeVar

import anyio.to_thread
import msgspec
from fastapi import APIRouter, Request, Response

from kms_api.deps import Service, caller, service
from kms_api.routes import audit, jobs, keys, operations
from kms_api.routing import UI
from kms_api.ui import TYPES, filters
from kms_api.ui.render import PageRoute, render, screen
from kms_core import audit as records
from kms_core.audit import query
from kms_core.audit.query import EventFilter, RecordedOperation
from kms_core.audit.retention import text_of
from kms_core.audit.verification import receipt
from kms_core.audit.verification.receipt import Receipt, UnknownRecord
from kms_core.audit.verification.report import ChainProblem
from kms_core.auth.policy import Principal, allows
from kms_core.jobs.model import DEAD
from kms_protocol import wire
from kms_protocol.errors import AuditUnavailable, InvalidRequest, JobsUnavailable, Missing, UnknownKey

P = ParamSpec("P")
R = TypeVar("R")

router: Final = APIRouter(prefix=UI, route_class=PageRoute, include_in_schema=False)
FILTERS: Final = ("operation", "result", "principal", "source", "key_id", "job_id", "request_id")
PERIODS: Final = {"1h": timedelta(hours=1), "24h": timedelta(days=1), "7d": timedelta(days=7), "all": None}
_THREADS: Final = "page"
_JOBS: Final = 50
_FEW: Final = 8
_EVENTS: Final = 100
_DAY: Final = timedelta(days=1)
_NEARLY_SPENT: Final = 0.7  # as the alert KmsKeyBudget


@dataclass(frozen=True, slots=True)
class Row:
    """A key, what it needs of an operator (nothing, as a rule), and whether the caller may rotate it."""

    key: wire.KeyOut
    needs: str
    may_rotate: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """What this process found by reading the trail back. Times are RFC 3339, empty before the first look."""

    problems: Sequence[ChainProblem]
    read_at: str
    newest: str
    lines: int
    anchors: Sequence[ChainProblem]
    not_compared: Mapping[str, str]


async def in_thread(request: Request, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What a page asks may wait for Redis, a backend or a disk: in threads that no call of the API needs."""
    limiter = service(request).limiter(_THREADS)
    return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=limiter)


# -- overview ------------------------------------------------------------------------------------------


@router.get("", response_model=None)
async def overview(request: Request) -> Response:
    """What is degraded, what runs, what was given up, which keys are due, and what was refused today."""
    return await in_thread(request, _overview, request)


def _overview(request: Request) -> Response:
    built, who = service(request), caller(request)
    policy = built.kms.policy
    found, dead = None, None
    if allows(policy, who, "jobs:read"):
        found, dead = _newest_jobs(built, who)
    recent, is_trail_away = None, False
    if allows(policy, who, "audit:read"):
        try:
            recent = _refusals(built, who)
        except AuditUnavailable:
            is_trail_away = True
    return render(
        request,
        "overview.html",
        status=operations.condition(built, who) if allows(policy, who, "status") else None,
        jobs=found,
        dead=dead,
        may_read_jobs=allows(policy, who, "jobs:read"),
        may_write_jobs=allows(policy, who, "jobs:write"),
        keys=_rows(built, who),
        trail=_verified(built) if allows(policy, who, "audit:read") else None,
        events=recent,
        is_trail_away=is_trail_away,
    )


def _newest_jobs(built: Service, who: Principal) -> tuple[list[wire.JobOut] | None, list[wire.JobOut] | None]:
    """None and None while Redis does not answer."""
    store = built.desk.store
    try:
        newest, _ = store.page(who.tenant, state=None, limit=_FEW, before=None)
        return [jobs.shape(job) for job in newest], [jobs.shape(job) for job in store.dead(who.tenant, _FEW)]
    except JobsUnavailable:
        return None, None


def _refusals(built: Service, who: Principal) -> list[RecordedOperation]:
    since = text_of(datetime.now(UTC) - _DAY)
    wanted = EventFilter(equal=(("tenant", who.tenant),), result="failed", since=since)
    found = _newest(built, wanted, _FEW)
    records.read(built.kms.trail, who, {"result": "failed", "period": "24h"}, len(found))
    return found


# -- jobs ----------------------------------------------------------------------------------------------


@router.get("/jobs", response_model=None)
async def job_list(request: Request, state: str = "", cursor: str = "", done: str = "") -> Response:
    """Jobs of this tenant, newest first, by state; ``dead`` is dead letters."""
    if state not in {"", "dead", *wire.STATES}:
        raise InvalidRequest(f"state is one of dead, {', '.join(wire.STATES)}")
    return await in_thread(request, _job_list, request, state, cursor, done)


def _job_list(request: Request, state: str, cursor: str, done: str) -> Response:
    built, who = service(request), caller(request)
    store, following = built.desk.store, None
    if state == "dead":
        found = store.dead(who.tenant, _JOBS)
    else:
        found, following = store.page(who.tenant, state=state or None, limit=_JOBS, before=cursor or None)
    return render(
        request,
        "jobs.html",
        jobs=[jobs.shape(job) for job in found],
        state=state,
        states=wire.STATES,
        following=following,
        is_first=not cursor,
        may_write_jobs=allows(built.kms.policy, who, "jobs:write"),
        done=done,
    )


@router.get("/jobs/{job_id}", response_model=None)
async def job(request: Request, job_id: str, done: str = "") -> Response:
    """One job: state and progress, and what may be done with it."""
    found = await jobs.found(request, job_id)
    return await in_thread(request, _job, request, jobs.shape(found), done)


def _job(request: Request, shape: wire.JobOut, done: str) -> Response:
    return render(
        request,
        "job.html",
        job=shape,
        is_dead=shape.error is not None and shape.error.code in DEAD,
        has_ended=shape.state in wire.ENDED,
        may_write_jobs=allows(service(request).kms.policy, caller(request), "jobs:write"),
        done=done,
    )


@router.get("/jobs/{job_id}/events", response_model=None)
async def events(request: Request, job_id: str) -> Response:
    """The events of the API, here because the cookie of a session is not taken there."""
    return await jobs.events(request, job_id)


# -- audit ---------------------------------------------------------------------------------------------


@router.get("/audit", response_model=None)
async def trail(request: Request, period: str = "24h", until: str = "") -> Response:
    """Operations of this tenant, newest first, by filter and period."""
    if period not in PERIODS:
        raise InvalidRequest(f"period is one of {', '.join(PERIODS)}")
    return await in_thread(request, _trail, request, period, until)


def _trail(request: Request, period: str, until: str) -> Response:
    built, who = service(request), caller(request)
    given = {name: request.query_params.get(name, "").strip() for name in FILTERS}
    equal = [(name, value) for name, value in given.items() if value and name != "result"]
    ago = PERIODS[period]
    wanted = EventFilter(
        equal=(("tenant", who.tenant), *equal),
        result=given["result"],
        since="" if ago is None else text_of(datetime.now(UTC) - ago),
        until=audit.time_of("until", until or None),
    )
    found, writable = _newest(built, wanted, _EVENTS), True
    try:
        records.read(built.kms.trail, who, {**given, "period": period, "until": until}, len(found))
    except AuditUnavailable:
        found, writable = [], False
    return render(
        request,
        "audit.html",
        events=found,
        given=given,
        period=period,
        periods=PERIODS,
        older=found[-1].time if len(found) == _EVENTS else None,
        is_first=not until,
        is_writable=writable,
        trail=_verified(built),
        most=query.MOST_SCANNED,
    )


def _verified(built: Service) -> Verified:
    found = built.watch.condition
    read_at = text_of(datetime.fromtimestamp(found.read_at, UTC)) if found.read_at else ""
    return Verified(found.problems, read_at, found.newest, found.lines, found.anchors, found.not_compared)


def _newest(built: Service, wanted: EventFilter, limit: int) -> list[RecordedOperation]:
    """The newest first. Raises AuditUnavailable."""
    try:
        return query.newest(built.settings.kms.audit.path, wanted, limit, query.MOST_SCANNED)[::-1]
    except OSError as exc:
        raise AuditUnavailable("The audit trail cannot be read") from exc


@router.get("/audit/{audit_id}/receipt", response_model=None)
async def receipt_of(request: Request, audit_id: str) -> Response:
    """The proof that one operation of this tenant was recorded, as a file."""
    made = await in_thread(request, _receipt, service(request), caller(request), audit_id)
    named = f'attachment; filename="receipt-{made.id.replace(":", "-")}.json"'
    body = msgspec.json.encode(made)
    return Response(body, media_type="application/json", headers={"Content-Disposition": named})


def _receipt(built: Service, who: Principal, audit_id: str) -> Receipt:
    """Raises UnknownRecord also for a line that is no operation of this tenant."""
    try:
        made = receipt.make(built.settings.kms.audit.path, audit_id)
    except OSError as exc:
        raise UnknownRecord from exc
    event = msgspec.json.decode(made.line, type=RecordedOperation)
    if event.kind or event.tenant != who.tenant:
        raise UnknownRecord
    records.read(built.kms.trail, who, {"receipt": made.id}, 1)
    return made


# -- keys ----------------------------------------------------------------------------------------------


@router.get("/keys", response_model=None)
async def key_list(request: Request, done: str = "") -> Response:
    """The keys that the caller may use: versions, their age, what they have sealed, when the next is due."""
    return await in_thread(request, _key_list, request, done)


def _key_list(request: Request, done: str) -> Response:
    built, who = service(request), caller(request)
    may_count = allows(built.kms.policy, who, "metrics")
    return render(request, "keys.html", keys=_rows(built, who), may_count=may_count, done=done)


@router.get("/keys/{key_id}/rotate", response_model=None)
async def rotation(request: Request, key_id: str) -> Response:
    """What a rotation does, and a button for it."""
    return await in_thread(request, _rotation, request, key_id)


def _rotation(request: Request, key_id: str) -> Response:
    for row in _rows(service(request), caller(request)):
        if row.key.id == key_id:
            return render(request, "rotate.html", row=row)
    raise UnknownKey


def _rows(built: Service, who: Principal) -> list[Row]:
    policy, now = built.kms.policy, datetime.now(UTC)
    return [
        Row(shape, _needs(shape, now), allows(policy, who, "rotate", shape.id))
        for shape in keys.visible(built, who)
    ]


def _needs(key: wire.KeyOut, now: datetime) -> str:
    if key.current_version is None:
        return "its backend does not answer"
    if key.rotate_at is not None and datetime.fromisoformat(key.rotate_at) <= now:
        return "a new version is due by age"
    if key.budget is not None and key.budget >= _NEARLY_SPENT:
        return f"{filters.percent(key.budget)} of what one version may seal is spent"
    return ""


# -- runbooks ------------------------------------------------------------------------------------------


@router.get("/runbooks", response_model=None)
async def runbook_list(request: Request) -> Response:
    """What each alert means, where to look and what to do: where alerts and dashboards lead."""
    return render(request, "runbooks.html", runbooks=screen(request).runbooks)


# -- files ---------------------------------------------------------------------------------------------


@router.get("/static/{name}", response_model=None)
async def static(request: Request, name: str) -> Response:
    """The style, the script and the icon."""
    if name not in TYPES:
        raise Missing
    return Response(screen(request).files[name], media_type=TYPES[name])
