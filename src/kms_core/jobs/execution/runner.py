"""Runs one job once: claim, work, finish. Running the same job twice changes nothing the second time.

The worker that ends the last part of a job verifies the ends of all parts and signs that of the parent. A
part that succeeded, or whose items failed, counts with its signed end. Of a part that was given up, the files
in its signed checkpoint count as done, and all others as failed.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import structlog
from opentelemetry.trace import SpanKind

from kms_core import audit
from kms_core.backoff import jittered_wait_s
from kms_core.jobs import authorization
from kms_core.jobs.execution import one_file, tree
from kms_core.jobs.execution.lease import Chore, FoundLarge, HandedBack, Lease, WorkerContext
from kms_core.jobs.execution.tree import FileOutcome, OutcomeCounts
from kms_core.jobs.model import REFUSED, Attempt, Following, Job, LeaseLost
from kms_core.jobs.spec import (
    ITEMS_FAILED,
    MOST_FAILURES,
    AnyJob,
    FileJob,
    FirstFailures,
    ItemsJob,
    JobSpec,
    SignedEnd,
    SignedSplit,
    TreeJob,
    TreePart,
    UploadJob,
    spec_digest,
)
from kms_core.jobs.store.reader import PartRecord, parts_digest
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics, tracing
from kms_protocol.errors import (
    DurabilityUnconfirmed,
    JobCancelled,
    JobsUnavailable,
    KmsError,
    RecordRefused,
    RedisFull,
    Unavailable,
    UnknownJob,
)
from kms_protocol.wire import JobState

_FIRST_DELAY_S: Final = 1.0
_LONGEST_DELAY_S: Final = 60.0
_log = structlog.get_logger(__name__)


def end_parent(job: Job, store: JobStore) -> Job:
    """End a job whose parts have all ended, and return it in its new state.

    ``record_refused`` if a part cannot prove how it ended, or is not the one that the job was cut into. A
    worker that does so at the same time comes to the same. Raises JobsUnavailable, UnknownJob.
    """
    spec = b""
    try:
        split, spec = store.split_of(job.job_id)
        found = _end_of(job, split, store)
    except UnknownJob:
        found = SignedEnd(fence=job.fence, attempt=job.attempt, state="failed", error=REFUSED, kept_until=0.0)
    store.end_parent(job, found, spec)
    return store.get(job.job_id, job.tenant)


def _end_of(job: Job, split: SignedSplit, store: JobStore) -> SignedEnd:
    """The end of a job by those of its parts. Raises UnknownJob."""
    if not job.accepted:
        raise UnknownJob("This job was not sealed by this service")
    parts = list(store.parts_of(job.job_id, split.parts))
    if spec_digest(*(part.sealed for part in parts)) != split.digest:
        raise UnknownJob("The parts of this job are not those that it was cut into")
    tallies, failures = Counter[str](), FirstFailures()
    items = failed = size_bytes = 0
    for end in map(_end_of_part, parts):
        items, failed, size_bytes = items + end.items, failed + end.items_failed, size_bytes + end.size_bytes
        tallies.update(end.tallies)
        for failure in end.failures:
            failures.add(*failure)
    return SignedEnd(
        fence=job.fence,
        attempt=job.attempt,
        attempt_id=job.attempt_id,
        state="failed" if failed else "succeeded",
        error=ITEMS_FAILED if failed else "",
        items=items,
        items_done=items,
        items_failed=failed,
        size_bytes=size_bytes,
        bytes_done=size_bytes,
        parts=split.parts,
        tallies=dict(tallies),
        failures=tuple(failures),
        result_digest=parts_digest(part.mark for part in parts),
        kept_until=job.accepted.result_until(store.now()) + store.rules.result_ttl_s,
    )


def _end_of_part(part: PartRecord) -> SignedEnd:
    """The signed end of a part, or of one that was given up what its signed checkpoint says.

    UnknownJob if it has not ended, or cannot prove how.
    """
    job, given_up = part.job, part.job.accepted
    if part.is_unproven or not job.ended:
        raise UnknownJob("A part of this job cannot prove how it ended")
    if job.end:
        return job.end
    if given_up is None:
        raise UnknownJob("A part of this job was not sealed by this service")
    settled = [FileOutcome.parse(word) for word in part.log.settled]
    tally = OutcomeCounts(settled)
    first = given_up.first if isinstance(given_up, TreePart | ItemsJob) else 0
    codes = [each.code for each in settled] + [job.error] * min(given_up.items - len(settled), MOST_FAILURES)
    return SignedEnd(
        fence=job.fence,
        attempt=job.attempt,
        state="failed",
        items=given_up.items,
        items_failed=given_up.items - tally.done,
        size_bytes=given_up.size_bytes,
        tallies=tally.counts(given_up),
        failures=tuple((first + at, code) for at, code in enumerate(codes) if code),
        kept_until=0.0,
    )


def run_next(worker_context: WorkerContext, following: Following, *, woken: bool) -> bool:
    """Bring the next job to an end: the one that ``following`` has claimed already, or another.

    Returns False if none is ready. Raises JobsUnavailable when Redis is gone; the lease then runs out and the
    job is taken up again.
    """
    store = worker_context.store
    if following.claimed:
        found = store.found_by(following.worker, *following.claimed.pop())
    else:
        found = store.next(following.worker, following.queues, woken=woken)
    if isinstance(found, str):
        with suppress(UnknownJob):  # its record is gone, or was not written by this service
            tidy(store.accepted(found), worker_context)
    elif found:
        is_short = isinstance(found.accepted, ItemsJob | UploadJob)  # what is left of them is soon removed
        run_claimed(replace(found, following=following if is_short else None), worker_context)
    return found is not None


def run_claimed(claim: Attempt, worker_context: WorkerContext) -> None:
    """Bring a claimed job to an end. Raises as ``run_next``."""
    job, attempt = claim.accepted, claim.attempt
    if attempt == 1 and not claim.deferrals:
        metrics.JOB_WAIT_SECONDS.labels(job.kind).observe(max(0.0, claim.waited_s))
    with audit.identified(job.request_id, job.owner):
        attempt_id = claim.attempt_id
        _log.info("job.claimed", job_id=job.job_id, kind=job.kind, attempt=attempt, attempt_id=attempt_id)
        with (
            tracing.span(f"job {job.kind}", SpanKind.CONSUMER, job.traceparent),
            metrics.JOB_SECONDS.labels(job.kind).time(),
        ):
            tracing.note(kind=job.kind, attempt=attempt)
            try:
                _run(claim, worker_context)
            except LeaseLost:
                _log.warning("job.lease_lost", job_id=job.job_id, attempt_id=attempt_id)
            except Unavailable as exc:
                _defer(claim, worker_context.store, exc)
            except KmsError as exc:
                _end_badly(claim, worker_context, exc)
            else:
                _tidy_ended(job, worker_context)


def _run(claim: Attempt, worker_context: WorkerContext) -> None:
    """Do the work and end the job, or split it into its parts."""
    job, store = claim.accepted, worker_context.store
    if claim.commit is None and not isinstance(job, FileJob):  # that asks once it has to do the work
        authorization.check_job(worker_context.kms, job)
    with Lease(store, claim) as lease:
        try:
            parts = _work(lease, job, worker_context)
        except RecordRefused as exc:
            if isinstance(job, ItemsJob | TreePart):  # the items or the listing are not those of the job
                worker_context.kms.raise_recorded(job.who, job.kind, job.bound_context, exc)
            raise
    if parts:
        store.split(claim, parts)
        return
    result = lease.result
    code = ITEMS_FAILED if result.items_failed else ""
    state: JobState = "failed" if code else "succeeded"
    store.finish(claim, state, code, result)
    _log.info("job.finished", job_id=job.job_id, state=state, code=code)


def _work(lease: Lease, job: AnyJob, context: WorkerContext) -> Sequence[JobSpec]:
    """Do what was accepted; or return the parts of a job that is to be split. None for one without files."""
    match job:
        case ItemsJob() if len(job.starts) > 1:
            context.store.require_share(job.tenant)
            return one_file.item_parts(job)
        case ItemsJob():
            one_file.run_items(lease, job, context.kms, context.spool)
        case UploadJob():
            one_file.run_upload(lease, job, context.kms, context.spool)
        case FileJob():
            one_file.run_file(lease, job, context)
        case TreePart():
            tree.run(lease, job, context)
        case TreeJob():
            context.store.require_share(job.tenant)
            return tree.plan(lease, job, context)
    return ()


def _tidy_ended(job: JobSpec, worker_context: WorkerContext) -> None:
    """Tidy after a job that this process has ended well: its own files are in place, or in the spool."""
    if job.parent:
        tidy(job, worker_context)
    elif isinstance(job, FileJob):
        with Chore(worker_context.store, job.job_id):
            worker_context.places.sweep({job.job_id: job.target})


def tidy(job: JobSpec, worker_context: WorkerContext) -> None:
    """Remove what an ended job needs no more: items, half-written targets; all of it if cancelled.

    A job all of whose parts have ended is ended first. The list of a cancelled job over many files stays: its
    result says which of them were done.
    """
    with Chore(worker_context.store, job.job_id):
        whole = worker_context.store.get(job.owner, job.tenant)
        if whole.parts_ended:
            whole = end_parent(whole, worker_context.store)
        if isinstance(job, TreePart):
            tree.abandon(job, worker_context.store.part(job.job_id), worker_context)
        elif whole.ended and isinstance(job, FileJob):
            worker_context.places.sweep({job.job_id: job.target})
        if whole.state == "cancelled" and not (isinstance(job, TreeJob) and whole.parts):
            worker_context.spool.delete(job.owner)


def _defer(claim: Attempt, store: JobStore, exc: Unavailable) -> None:
    """A peer that is away costs the job time, not an attempt; so does a grown source.

    Raises ``exc`` again if that peer is a Redis that does not answer: nothing can be stored. One that is full
    has no room for parts, and may have later.
    """
    if isinstance(exc, JobsUnavailable) and not isinstance(exc, DurabilityUnconfirmed | RedisFull):
        raise exc
    if isinstance(exc, HandedBack):
        with suppress(LeaseLost):
            store.defer(claim, 0, exc.code, away=False)
        _log.info("job.handed_back", job_id=claim.accepted.job_id, by="attempt")
        return
    if isinstance(exc, FoundLarge):
        store.defer(claim, 0, exc.code, away=False, work_bytes=exc.work_bytes)
        return
    first = max(exc.retry_after_s, _FIRST_DELAY_S)
    delay = jittered_wait_s(first, claim.deferrals + 1, at_most_s=_LONGEST_DELAY_S)
    try:
        store.defer(claim, delay, exc.code)
    except LeaseLost:
        _log.warning("job.lease_lost", job_id=claim.accepted.job_id, attempt_id=claim.attempt_id)
    else:
        _log.warning("job.deferred", job_id=claim.accepted.job_id, code=exc.code, delay_s=round(delay, 1))


def _end_badly(claim: Attempt, worker_context: WorkerContext, exc: KmsError) -> None:
    state: JobState = "cancelled" if isinstance(exc, JobCancelled) else "failed"
    worker_context.store.finish(claim, state, exc.code)
    job: JobSpec = claim.accepted
    if job.parent:
        tidy(job, worker_context)
    elif state == "cancelled":
        worker_context.spool.delete(job.job_id)
    _log.info("job.finished", job_id=job.job_id, state=state, code=exc.code)
