"""The overview with its charts, which tells what is degraded, waits, fails or is due; the page of workers.

As in ``views``, a page runs as a whole in one thread, and leaves out what the caller may not see.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from fastapi import Response

from kms_api.deps import Service
from kms_api.routes import audit, job_options, operations
from kms_api.routing import CALLER, UI, Call, Router, Rule
from kms_api.ui.render import number, render, took
from kms_api.ui.views import DAY, END, JobRow, folded, job_row, newest_events, rows_of
from kms_core import audit as records
from kms_core.audit.chain import text_of
from kms_core.audit.query import EventFilter, RecordedOperation
from kms_core.auth.policy import Principal, allows
from kms_core.jobs.store import charts, gauges, tenants, workers
from kms_core.jobs.store.charts import SAMPLE, Interval, OperationInterval
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.store.tenants import TenantJobs
from kms_core.jobs.store.workers import Activity
from kms_core.observability.degraded import DEGRADED
from kms_core.settings.lint import unaccepted
from kms_protocol.errors import AuditUnavailable, JobsUnavailable

# Charts of the jobs and operations of the last hours: stacked bars as SVG, and the same figures as a table.
#
# All is drawn on the server, in units of a picture that ``page.css`` stretches to the page; text is HTML.

PERIODS: Final = {"1h": (300, 12, "hour"), "6h": (900, 24, "6 hours"), "24h": (3600, 24, "24 hours")}
"""Seconds of one interval, the number of intervals, and the period in words."""
HEIGHT: Final = 100
"""Of the picture, in which an interval is 10 wide."""
_OPEN: Final = ("queued", "running", "committing")
_TOPS: Final = (0.002, 0.01, 0.02, 0.1, 0.2, 1, 2, 10, 20, 60, 120, 600, 1200, 3600, 7200, 36_000, 86_400)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a bar: its colour, named for a series, its place from the top, and its height."""

    series: str
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Bar:
    """An interval: its time, the cursor of the list of jobs up to its end, and the text of each series."""

    time: str
    cursor: str
    texts: Mapping[str, str]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """``series`` has the label of each, from the axis upwards; ``ticks`` are the top and middle of the axis.

    ``summary`` says in a sentence what the picture shows. Without bars there is nothing to draw.
    """

    name: str
    title: str
    summary: str
    series: Mapping[str, str]
    ticks: tuple[str, str]
    bars: tuple[Bar, ...]


def jobs_chart(intervals: Sequence[Interval], words: str) -> Chart:
    """Jobs by when they were submitted, and by the state that they are in now."""
    rows = [
        {
            "failed": each.counts["failed"],
            "succeeded": each.counts["succeeded"],
            "cancelled": each.counts["cancelled"],
            "open": sum(each.counts[state] for state in _OPEN),
        }
        for each in intervals
    ]
    return _counts_chart(("jobs", "Jobs by time of submission"), "jobs submitted", intervals, rows, words)


def operations_chart(intervals: Sequence[OperationInterval], words: str) -> Chart:
    """Operations of all tenants by outcome; those that were refused have failed."""
    rows = [{"failed": each.failed, "succeeded": each.succeeded} for each in intervals]
    return _counts_chart(("operations", "Operations of all tenants"), "operations", intervals, rows, words)


def _counts_chart(
    names: tuple[str, str],
    counted: str,
    intervals: Sequence[Interval | OperationInterval],
    rows: Sequence[Mapping[str, int]],
    words: str,
) -> Chart:
    """``names``: of the chart, and its title. ``counted``: what the summary says that it counts."""
    sums = {series: sum(row[series] for row in rows) for series in rows[0]}
    told = ", ".join(f"{number(count)} {series}" for series, count in sums.items())
    labels = {series: f"{series} {number(count)}" for series, count in sums.items()}
    most = max(sum(row.values()) for row in rows)
    top = next(digit * 10**power for power in range(19) for digit in (2, 4, 10) if digit * 10**power >= most)
    summary = f"Of the {number(sum(sums.values()))} {counted} in the last {words}: {told}."
    summary = summary if most else f"No {names[0]} in the last {words}."
    return _chart((*names, summary), labels, intervals, rows, (top, number))


def durations_chart(intervals: Sequence[Interval], words: str) -> Chart:
    """Means for how long jobs waited and ran."""
    rows = [{"ran": each.ran_s or 0.0, "waited": each.waited_s or 0.0} for each in intervals]
    found = [row for row, each in zip(rows, intervals, strict=True) if each.ran_s is not None]
    means = {name: sum(row[name] for row in found) / max(1, len(found)) for name in rows[0]}
    labels = {name: f"{name} {took(seconds)}" for name, seconds in means.items()}
    most = max(sum(row.values()) for row in rows)
    top = next((top for top in _TOPS if top >= most), most)
    summary = (
        f"Jobs that succeeded in the last {words} waited {took(means['waited'])} and ran "
        f"{took(means['ran'])} on average, of up to {SAMPLE} jobs of each interval."
    )
    summary = summary if found else f"No job of the last {words} has succeeded."
    return _chart(
        ("durations", "Time from submission to end", summary), labels, intervals, rows, (float(top), took)
    )


def _chart(
    names: tuple[str, str, str],
    labels: Mapping[str, str],
    intervals: Sequence[Interval | OperationInterval],
    rows: Sequence[Mapping[str, float]],
    axis: tuple[float, Callable[..., str]],
) -> Chart:
    (top, text), every_s = axis, intervals[1].start - intervals[0].start
    bars = tuple(
        Bar(
            f"{datetime.fromtimestamp(each.start, UTC):%H:%M}",
            f"{each.start + every_s:.0f}-{END}",
            {series: text(value) for series, value in row.items() if value},
            tuple(_parts(row, top)),
        )
        for each, row in zip(intervals, rows, strict=True)
    )
    is_empty = not any(bar.parts for bar in bars)
    return Chart(*names, labels, (text(top), text(type(top)(top / 2))), () if is_empty else bars)


def _parts(row: Mapping[str, float], top: float) -> list[Part]:
    """The parts of a bar, one on the other; one that is not 0 is high enough to be seen."""
    made, y = [], float(HEIGHT)
    for series, value in row.items():
        if value:
            height = max(1.0, value / top * HEIGHT)
            y -= height
            made.append(Part(series, round(y, 2), round(height, 2)))
    return made


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
