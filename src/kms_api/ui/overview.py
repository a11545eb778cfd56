"""The overview, which tells at a glance what is degraded, waits, fails or is due; and the page of workers.

As in ``views``, a page runs as a whole in one thread, and leaves out what the caller may not see.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

from fastapi import Response

from kms_api.deps import Service
from kms_api.routes import audit, operations
from kms_api.routing import CALLER, UI, Call, Router, Rule
from kms_api.ui import charts
from kms_api.ui.charts import Chart
from kms_api.ui.render import PageRoute, number, render
from kms_api.ui.views import DAY, THREADS, JobRow, Row, job_row, newest_events, rows_of
from kms_core import audit as records
from kms_core.audit.chain import text_of
from kms_core.audit.query import EventFilter, RecordedOperation
from kms_core.auth.policy import Principal, allows
from kms_core.jobs.store import activity, queue_stats
from kms_core.jobs.store.activity import Activity
from kms_core.settings.lint import unaccepted
from kms_protocol.errors import AuditUnavailable, InvalidRequest, JobsUnavailable
from kms_protocol.units import duration_text

router: Final = Router("pages", prefix=UI, kind=PageRoute)
_FEW: Final = 8
_OLD_S: Final = 600.0  # as the alert KmsQueueOld
_OF_OVERVIEW: Final = ("audit:read", "jobs:read", "metrics", "status")


# -- overview ------------------------------------------------------------------------------------------


@router.read("", CALLER, THREADS)
def overview(call: Call[None]) -> Response:
    """The state of the service, notices, charts of jobs, dead and newest jobs, and refusals of a day."""
    service, caller, period = call.service, call.caller, call.query.get("period", "6h")
    if period not in charts.PERIODS:
        raise InvalidRequest(f"period is one of {', '.join(charts.PERIODS)}")
    may = {name: allows(service.kms.policy, caller, name) for name in _OF_OVERVIEW}
    found = _Jobs()
    with suppress(JobsUnavailable):
        found = _jobs_of(service, caller, period) if may["jobs:read"] else found
        found.activity = activity.read(service.submitter.store) if may["metrics"] else None
    refusals, is_log_unreadable = None, False
    if may["audit:read"]:
        try:
            refusals = _refusals(service, caller)
        except AuditUnavailable:
            is_log_unreadable = True
    keys = rows_of(service, caller)
    return render(
        call.request,
        "overview.html",
        status=operations.condition(service, caller) if may["status"] else None,
        found=found,
        notices=[*_notices_of_jobs(found), *_notices_of_keys(keys), *_weak(service, is_told=may["metrics"])],
        period=period,
        periods=charts.PERIODS,
        audit_log=service.audit_monitor.condition if may["audit:read"] else None,
        events=refusals,
        is_log_unreadable=is_log_unreadable,
    )


@dataclass
class _Jobs:
    """Jobs as the overview shows them; None if the caller may not see them, or Redis is unreachable."""

    newest: list[JobRow] | None = None
    dead: list[JobRow] | None = None
    charts: list[Chart] | None = None
    activity: Activity | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that wants a decision, the page that helps, and the words of the link to it."""

    text: str
    page: str
    label: str


def _jobs_of(service: Service, caller: Principal, period: str) -> _Jobs:
    """The newest jobs, the newest dead ones, and the charts. Raises JobsUnavailable."""
    store, tenant, (every_s, count, words) = service.submitter.store, caller.tenant, charts.PERIODS[period]
    newest, _ = store.page(tenant, state=None, limit=_FEW, before=None)
    intervals = activity.intervals(store, tenant, every_s, count)
    return _Jobs(
        [job_row(job) for job in newest],
        [job_row(job) for job in store.dead(tenant, _FEW)],
        [charts.of_jobs(intervals, words), charts.of_durations(intervals, words)],
    )


def _notices_of_jobs(found: _Jobs) -> Iterator[Notice]:
    if found.dead:
        some = f"{len(found.dead)}{' or more' * (len(found.dead) == _FEW)}"
        yield Notice(
            f"Dead letters: {some}. They wait to be retried", f"{UI}/jobs?state=dead", "dead letters"
        )
    for queue in found.activity.queues if found.activity else ():
        if queue.is_unserved:
            count = "1 job waits" if queue.count == 1 else f"{number(queue.count)} jobs wait"
            text = f"{count} in {queue.name}, which no worker serves"
            yield Notice(text, f"{UI}/workers", "workers")
        elif queue.oldest_s > _OLD_S:
            text = f"The oldest job in {queue.name} has waited for {duration_text(queue.oldest_s)}"
            yield Notice(text, f"{UI}/runbooks#kmsqueueold", "KmsQueueOld")
    for worker in found.activity.workers if found.activity else ():
        if worker.state == "not seen" and worker.silent_s is not None:
            text = f"Worker {worker.name} ended without a word, {duration_text(worker.silent_s)} ago"
            yield Notice(text, f"{UI}/runbooks#kmsworkerlost", "KmsWorkerLost")


def _notices_of_keys(rows: Sequence[Row]) -> Iterator[Notice]:
    for row in rows:
        if row.problem and row.may_rotate and row.key.current_version:
            page = f"{UI}/keys/{quote(row.key.id, safe='')}/rotate"
            yield Notice(f"Key {row.key.id}, {row.problem}", page, f"rotate {row.key.id}")
        elif row.problem:
            yield Notice(f"Key {row.key.id}, {row.problem}", f"{UI}/keys", "keys")


def _weak(service: Service, *, is_told: bool) -> Iterator[Notice]:
    weak = sorted(unaccepted(service.settings)) if is_told else ()
    if weak:
        yield Notice(f"Weak settings: {', '.join(weak)}", f"{UI}/runbooks#kmsweaksetting", "KmsWeakSetting")


def _refusals(service: Service, caller: Principal) -> list[RecordedOperation]:
    since = text_of(datetime.now(UTC) - DAY)
    wanted = EventFilter(equal=(("tenant", caller.tenant),), result="failed", since=since)
    logs, unread = audit.logs_of(service)
    events = newest_events(logs, wanted, _FEW, unread)
    records.read(service.kms.audit_log, caller, {"result": "failed", "period": "24h"}, len(events))
    return events


# -- workers -------------------------------------------------------------------------------------------


@router.read("/workers", Rule("metrics"), THREADS)
def worker_list(call: Call[None]) -> Response:
    """Workers and what they do, queues, and the room for uploads and results; of all tenants.

    Jobs of other tenants are counted only. Raises JobsUnavailable.
    """
    store, spool = call.service.submitter.store, call.service.submitter.spool
    found, stats = activity.read(store), queue_stats.survey(store)
    named = {job_id for worker in found.workers for job_id in worker.jobs}
    may_read = allows(call.service.kms.policy, call.caller, "jobs:read")
    seen = store.many(sorted(named), call.caller.tenant) if may_read else []
    return render(
        call.request,
        "workers.html",
        found=found,
        stats=stats,
        jobs={job.job_id: job_row(job) for job in seen},
        tenants=Counter(stats.spooled).most_common(_FEW),
        use=spool.use(),
        nearly_full=operations.NEARLY_FULL,
        spool_max_bytes=call.service.settings.kms.jobs.spool_max_bytes,
    )
