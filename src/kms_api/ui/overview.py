"""The overview, which has what is degraded, waits, fails or is due; the page of workers.

As in ``views``, a page runs as a whole in one thread, and leaves out what the caller may not see.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from fastapi import Response

from kms_api.deps import Service
from kms_api.routes import audit, job_options, operations
from kms_api.routing import CALLER, UI, Call, Router, Rule
from kms_api.ui.charts import PERIODS, Chart, durations_chart, jobs_chart, operations_chart
from kms_api.ui.job_pages import JobRow, folded, job_row
from kms_api.ui.render import render
from kms_api.ui.views import DAY, newest_events, rows_of
from kms_core import audit as records
from kms_core.audit.chain import text_of
from kms_core.audit.query import EventFilter, RecordedOperation
from kms_core.auth.policy import Principal, allows
from kms_core.jobs.store import charts, gauges, tenants, workers
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.store.tenants import TenantJobs
from kms_core.jobs.store.workers import Activity
from kms_core.observability.degraded import DEGRADED
from kms_core.settings.lint import unaccepted
from kms_protocol.errors import AuditUnavailable, JobsUnavailable

router: Final = Router("pages", prefix=UI)
_FEW: Final = 8
_MANY: Final = 50
_MOST_FAILED: Final = 200
_HOUR_S: Final = 3600
_OLD_S: Final = 600.0  # as the alert KmsQueueOld
_OF_OVERVIEW: Final = ("audit:read", "jobs:read", "metrics", "status")


# -- overview ------------------------------------------------------------------------------------------


@router.read("", CALLER, audit.SEARCHES)
def overview(call: Call[None]) -> Response:
    """The state of the service, notices, charts, dead and newest jobs, and refusals of a day."""
    service, caller, store = call.service, call.caller, call.service.submitter.store
    period = job_options.one_of("period", call.query.get("period", "6h"), PERIODS)
    may = {name: allows(service.kms.policy, caller, name) for name in _OF_OVERVIEW}
    found = _Jobs()
    with suppress(JobsUnavailable):
        service.answering()
        found = _jobs_of(service, caller, period) if may["jobs:read"] else found
        if may["metrics"]:
            found.activity = workers.read(store)
            found.tenants = tenants.by_tenant(store, store.now() - _HOUR_S)
            every_s, count, words = PERIODS[period]
            found.charts.insert(1, operations_chart(charts.operations(store, every_s, count), words))
    refusals, is_log_unreadable = None, False
    if may["audit:read"] and "x-kms-refresh" not in call.headers:  # of page.js: each search is recorded
        try:
            refusals = _refusals(service, caller)
        except AuditUnavailable:
            is_log_unreadable = True
    return render(
        call.request,
        "overview.html",
        status=operations.condition(service, caller) if may["status"] else None,
        known=DEGRADED,
        found=found,
        due=[row for row in rows_of(service, caller) if row.problem],
        weak=sorted(unaccepted(service.settings)) if may["metrics"] else (),
        old_s=_OLD_S,
        period=period,
        periods=PERIODS,
        few=_FEW,
        many=_MANY,
        audit_log=service.audit_monitor.condition if may["audit:read"] else None,
        events=refusals,
        is_log_unreadable=is_log_unreadable,
    )


@dataclass
class _Jobs:
    """Jobs as the overview shows them; None if the caller may not see them, or Redis is unreachable.

    ``failed`` is the number of jobs that failed in the last hour, ``causes`` those of each, and ``submitted``
    the number of jobs of that hour. ``unseen`` older failed jobs were not looked at, although the newest 200
    all count. ``tenants`` are all, with the failures of that hour.
    """

    newest: list[list[JobRow]] | None = None
    dead: list[list[JobRow]] | None = None
    dead_count: int = 0
    failed: int = 0
    causes: Mapping[str, int] = field(default_factory=dict)
    submitted: int = 0
    unseen: int = 0
    charts: list[Chart] = field(default_factory=list)
    activity: Activity | None = None
    tenants: Sequence[TenantJobs] = ()


def _jobs_of(service: Service, caller: Principal, period: str) -> _Jobs:
    """The newest jobs, the newest dead ones, and the charts. Raises JobsUnavailable."""
    store, tenant, (every_s, count, words) = service.submitter.store, caller.tenant, PERIODS[period]
    newest, _ = store.page(tenant, state=None, limit=_MANY, before=None)
    dead, intervals = store.dead(tenant, _MANY), charts.intervals(store, tenant, every_s, count)
    counts = store.states(tenant)
    return _Jobs(
        folded(map(job_row, newest)),
        folded(map(job_row, dead)),
        counts["dead"],
        *_failures(store, tenant, counts["failed"]),
        [jobs_chart(intervals, words), durations_chart(intervals, words)],
    )


def _failures(store: JobStore, tenant: str, kept: int) -> tuple[int, Counter[str], int, int]:
    """``failed``, ``causes``, ``submitted`` and ``unseen`` of ``_Jobs``; ``kept`` jobs are listed as failed.

    Raises JobsUnavailable.
    """
    since = store.now() - _HOUR_S
    newest, _ = store.page(tenant, state="failed", limit=_MOST_FAILED, before=None)
    found = [job_row(job) for job in newest if job.ended_at >= since]
    causes = Counter((row.causes or ("unknown",))[-1] for row in found)
    unseen = max(0, kept - _MOST_FAILED) if len(found) == _MOST_FAILED else 0
    return len(found), causes, tenants.submitted_since(store, tenant, since), unseen


def _refusals(service: Service, caller: Principal) -> list[RecordedOperation]:
    since = text_of(datetime.now(UTC) - DAY)
    wanted = EventFilter(equal=(("tenant", caller.tenant),), result="failed", since=since)
    logs, unread = audit.logs_of(service)
    events = newest_events(logs, wanted, _FEW, unread)
    records.read(service.kms.audit_log, caller, {"result": "failed", "period": "24h"}, len(events))
    return events


# -- workers -------------------------------------------------------------------------------------------


@router.read("/workers", Rule("metrics"), audit.SEARCHES)
def worker_list(call: Call[None]) -> Response:
    """Workers and what they do, queues, and the room for uploads and results; of all tenants.

    Jobs of other tenants are counted only. Raises JobsUnavailable.
    """
    call.service.answering()
    store, spool = call.service.submitter.store, call.service.submitter.spool
    found, stats = workers.read(store), gauges.survey_queues(store)
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
