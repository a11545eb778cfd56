"""The pages of jobs: the list, one job, and the forms that cancel and retry.

As in ``views``, a page or form runs as a whole in one thread, and leaves out what the caller may not do.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, get_args
from urllib.parse import quote, urlencode

from fastapi import Response

from kms_api.routes import audit, job_answers, job_options, jobs
from kms_api.routing import READ, UI, WRITE, Call, Router
from kms_api.ui.render import THREADS, Fields, form, render, to
from kms_core.jobs.model import DEAD, Job
from kms_core.jobs.spec import FilesJob, UploadJob
from kms_core.jobs.store import gauges, reader, workers
from kms_protocol import errors, wire
from kms_protocol.units import parse_time

router: Final = Router("pages", prefix=UI)
_JOBS: Final = 50
_DEAD: Final = 500
"""The newest dead jobs that are looked at, and retried at once."""
_OUTCOMES: Final = ("retried", "gone", "unsealed")
"""Of a retry: the job is queued; it is no dead letter any more; its record is not sealed by this service."""
_JOB_FILTERS: Final = ("state", "kind", "cause", "key", "by", "before", "search")
END: Final = "ffffffff-ffff-ffff-ffff-ffffffffffff"
"""Of the cursor of a time in a list of jobs."""
_BATCHES: Final = 4
_KINDS: Final = get_args(wire.JobKind)


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job, what it writes (empty for items), and for how long it has run, in seconds.

    ``took_s`` is None while it is queued, and if no attempt at it counts. ``record``: what else is known.
    """

    job: wire.JobOut
    target: str
    took_s: float | None
    record: Job | None = None

    @property
    def causes(self) -> tuple[str, ...]:
        """The code of its error, and that of the first failed item if items failed."""
        error = self.job.error
        return (error.code, *(each.code for each in (error.items or ())[:1])) if error else ()

    @property
    def failure(self) -> str:
        """Kind, key and causes of a job that failed, which equal failures have in common; else empty."""
        job = self.job
        return " ".join((job.kind, job.key_id or "", *self.causes)) if job.state == "failed" else ""


def job_row(job: Job) -> JobRow:
    """A job as pages show it."""
    target = "a download" if isinstance(job.accepted, UploadJob) else ""
    if isinstance(job.accepted, FilesJob):
        target = job.accepted.target
    is_timed = job.started_at and job.attempt and job.state != "queued"
    took_s = (job.ended_at or time.time()) - job.started_at if is_timed else None
    return JobRow(job_answers.shape(job), target, took_s, job)


def folded(rows: Iterable[JobRow]) -> list[list[JobRow]]:
    """The rows in their order, with equal failures together where the first of them is."""
    found = defaultdict[str, list[JobRow]](list)
    for row in rows:
        found[row.failure or row.job.job_id].append(row)
    return list(found.values())


@router.read("/jobs", READ, audit.SEARCHES)
def job_list(call: Call[None]) -> Response:
    """Jobs of this tenant, newest first, by the filters of the page; equal failures are folded.

    State ``dead``: failed, without attempts left. ``search`` is a label as name=value, or the id of a job,
    whose page is shown. ``before`` is a time of submission, in UTC without an offset. After dead letters were
    retried the numbers of ``_OUTCOMES`` say what came of it.
    """
    given = _given(call.query)
    state, before, search = given["state"], given["before"], given["search"]
    store, tenant, cursor = call.service.submitter.store, call.caller.tenant, call.query.get("cursor", "")
    job_options.one_of("state", state, ("", "dead", *wire.STATES))
    job_options.one_of("kind", given["kind"], ("", *_KINDS))
    if search and "=" not in search:
        return to(f"/jobs/{quote(search, safe='')}")
    labels, is_first = job_options.labels_of([search] if search else []), not cursor
    if before and is_first:
        cursor = f"{parse_time(audit.time_of('before', f'{before}Z')).timestamp():.0f}-{END}"
    call.service.answering()
    dead = _retryable(call, given)
    if state == "dead":
        rows, following = dead, None
    else:
        matches = partial(_is_sought, given, labels)
        page = partial(store.page, tenant, state=state or None, limit=_JOBS, labels=labels, matches=matches)
        rows, following = _rows(page, cursor or None)
    counts = store.states(tenant)
    return render(
        call.request,
        "jobs.html",
        jobs=folded(rows),
        dead=len(dead),
        most_dead=_DEAD,
        outcome={name: call.number(name, 0, 0, _DEAD) for name in _OUTCOMES},
        given=given,
        **given,
        kinds=_KINDS,
        sought=urlencode({name: value for name, value in given.items() if value and name != "state"}),
        most=reader.MOST_SEEN,
        is_cut=following and len(rows) % _JOBS,
        counts=counts,
        total=sum(counts[name] for name in wire.STATES),
        following=following,
        is_first=is_first,
        done=call.query.get("done", ""),
    )


def _given(fields: Mapping[str, str]) -> dict[str, str]:
    return {name: fields.get(name, "").strip() for name in _JOB_FILTERS}


def _is_sought(given: Fields, labels: wire.Labels, job: Job) -> bool:
    """Return whether a job is one that the filters of the list want, whatever its state."""
    row, before = job_row(job), given["before"]
    own = {"kind": (job.kind,), "cause": row.causes, "key": (row.job.key_id,), "by": (row.job.submitter,)}
    is_sought = labels.items() <= job.labels.items() and (not before or row.job.created_at < before)
    return is_sought and all(given[name] in {"", *own[name]} for name in own)


def _retryable(call: Call[object], given: Fields) -> list[JobRow]:
    """The dead letters in a list with these filters, of the newest 500, which a retry of the list queues.

    None for a list that does not ask for dead letters, by state or by cause. Raises InvalidRequest.
    """
    has_dead = given["state"] == "dead" or (given["state"] in {"", "failed"} and given["cause"] in DEAD)
    labels = job_options.labels_of([given["search"]] if given["search"] else [])
    found = call.service.submitter.store.dead(call.caller.tenant, _DEAD) if has_dead else []
    return [job_row(job) for job in found if _is_sought(given, labels, job)]


def _rows(
    page: Callable[..., tuple[list[Job], str | None]], following: str | None
) -> tuple[list[JobRow], str | None]:
    """Rows of some pages, as many as fold to the length of one, and the cursor behind them."""
    rows: list[JobRow] = []
    for _ in range(_BATCHES):
        found, following = page(before=following)
        rows += map(job_row, found)
        if following is None or len(found) < _JOBS or len(folded(rows)) >= _JOBS:
            break
    return rows, following


@router.read("/jobs/{job_id}", READ, THREADS)
def job(call: Call[None]) -> Response:
    """State and progress of a job, and forms to cancel or retry it."""
    call.service.answering()
    store, waits, alike = call.service.submitter.store, None, 0
    row = job_row(store.get(call.path("job_id"), call.caller.tenant))
    error = row.job.error
    if error is not None and error.code in DEAD:
        alike = len(_retryable(call, _given({"state": "dead", "cause": error.code})))
    if row.job.state == "queued":
        waits = workers.read(store), gauges.survey_queues(store, call.caller.tenant)
    return render(
        call.request,
        "job.html",
        job=row.job,
        row=row,
        waits=waits,
        resources=store.resources(row.job.job_id) if waits else (),
        store=store,
        is_dead=error is not None and error.code in DEAD,
        alike=alike,
        most_dead=_DEAD,
        has_ended=row.job.state in wire.ENDED,
        done=call.query.get("done", ""),
    )


@router.stream("GET", "/jobs/{job_id}/state", READ)
async def job_state(call: Call[None]) -> Response:
    """The job as JSON, with ``?wait=`` (seconds), as at the API, which accepts no session cookie."""
    return await jobs.get_job(call)


@router.call("POST", "/jobs/{job_id}/cancel", WRITE, form, THREADS)
def cancel(call: Call[Fields]) -> Response:
    """Cancel a job: ``POST /jobs/{id}/cancel`` for the page."""
    job = jobs.withdraw(call.service, call.caller, call.path("job_id"))
    return to(f"/jobs/{job.job_id}", done="cancelled")


@router.call("POST", "/jobs/{job_id}/retry", WRITE, form, THREADS)
def retry(call: Call[Fields]) -> Response:
    """Retry a job: ``POST /jobs/{id}/retry`` for the page."""
    job = jobs.revive(call.service, call.caller, call.path("job_id"))
    return to(f"/jobs/{job.job_id}", done="retried")


@router.call("POST", "/jobs/retry", WRITE, form, THREADS)
def retry_all(call: Call[Fields]) -> Response:
    """Retry the dead letters in a list, all or those of one ``failure``, as `POST /jobs/{id}/retry` does."""
    given, failure = _given(call.body), call.body.get("failure", "")
    rows = [row for row in _retryable(call, given) if failure in {"", row.failure}]
    outcome = Counter(_outcome(call, row) for row in rows)
    shown = {name: value for name, value in given.items() if value}
    return to("/jobs", **shown, **{name: str(count) for name, count in outcome.items()}, done="retried_all")


def _outcome(call: Call[Fields], row: JobRow) -> str:
    """Retry a dead letter, and say what came of it: one of ``_OUTCOMES``."""
    try:
        jobs.revive(call.service, call.caller, row.job.job_id)
    except (errors.JobNotDead, errors.UnknownJob):  # another caller retried it, or it has expired
        return "gone" if row.record and row.record.accepted else "unsealed"
    return "retried"
