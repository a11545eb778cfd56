"""Runs one job once: claim, work, finish. Running the same job twice changes nothing the second time.

The worker that ends the last part of a job verifies the ends of all parts and signs that of the parent. A
part that succeeded, or whose items failed, counts with its signed end. Of a part that was given up, the files
in its signed checkpoint count as done, and all others as failed.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

import structlog
from opentelemetry.trace import SpanKind

from kms_core import audit
from kms_core.jobs import authorization
from kms_core.jobs.execution import one_file, tree
from kms_core.jobs.execution.lease import Chore, FoundLarge, HandedBack, Lease, WorkerContext
from kms_core.jobs.execution.tree import FileOutcome, OutcomeCounts
from kms_core.jobs.file_patterns import Tree
from kms_core.jobs.model import REFUSED, Attempt, Following, Job, LeaseLost
from kms_core.jobs.spec import (
    ITEMS_FAILED,
    MOST_FAILURES,
    Failure,
    FileJob,
    FirstFailures,
    ItemsJob,
    JobSpec,
    SignedEnd,
    SignedSplit,
    TreeJob,
    TreePart,
    UploadJob,
    needs_proof,
)
from kms_core.jobs.store.reader import PartRecord, parts_digest
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics, tracing
from kms_core.periodic import jittered_wait_s
from kms_core.service import Kms
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
    if not job.accepted:
        raise UnknownJob("This job was not sealed by this service")
    sums, specs = _Sums(), hashlib.sha256()
    for part in store.parts_of(job.job_id, split.parts):
        sums.add(part)
        specs.update(part.sealed)
    if specs.digest() != split.digest:
        raise UnknownJob("The parts of this job are not those that it was cut into")
    kept_until = job.accepted.result_until(store.now()) + store.rules.result_ttl_s
    return sums.end(job, split.parts, kept_until)


class _Sums:
    """Counts over the parts of a job, and a digest of how each ended."""

    def __init__(self) -> None:
        self._items = self._failed = self._bytes = 0
        self._tallies: Counter[str] = Counter()
        self._failures = FirstFailures()
        self._marks: list[bytes] = []

    def add(self, part: PartRecord) -> None:
        """Count one part. UnknownJob if it has not ended, or cannot prove how."""
        job = part.job
        if part.is_unproven or not job.ended:
            raise UnknownJob("A part of this job cannot prove how it ended")
        self._marks.append(part.mark)
        if needs_proof(job.state, job.error):
            self._count(job.items, job.items_failed, job.bytes, job.tallies)
            self._fail(job.end.failures if job.end else ())
            return
        given_up = job.accepted
        if given_up is None:
            raise UnknownJob("A part of this job was not sealed by this service")
        settled = [FileOutcome.parse(word) for word in part.log.settled]
        tally = OutcomeCounts(settled)
        first = given_up.first if isinstance(given_up, TreePart | ItemsJob) else 0
        codes = [each.code for each in settled] + [job.error] * min(
            given_up.items - len(settled), MOST_FAILURES
        )
        self._fail((first + at, code) for at, code in enumerate(codes) if code)
        failed = given_up.items - tally.done
        self._count(given_up.items, failed, given_up.size_bytes, tally.counts(given_up))

    def _fail(self, failures: Iterable[Failure]) -> None:
        for index, code in failures:
            self._failures.add(index, code)

    def _count(self, items: int, failed: int, size_bytes: int, tallies: dict[str, int]) -> None:
        self._items += items
        self._failed += failed
        self._bytes += size_bytes
        self._tallies.update(tallies)

    def end(self, job: Job, parts: int, kept_until: float) -> SignedEnd:
        """The end of the whole."""
        return SignedEnd(
            fence=job.fence,
            attempt=job.attempt,
            attempt_id=job.attempt_id,
            state="failed" if self._failed else "succeeded",
            error=ITEMS_FAILED if self._failed else "",
            items=self._items,
            items_done=self._items,
            items_failed=self._failed,
            size_bytes=self._bytes,
            bytes_done=self._bytes,
            parts=parts,
            tallies=dict(self._tallies),
            failures=tuple(self._failures),
            result_digest=parts_digest(self._marks),
            kept_until=kept_until,
        )


def run_job(job_id: str, worker_context: WorkerContext, worker: str) -> None:
    """Claim the job and bring it to an end, unless another attempt holds it or it has ended.

    Raises JobsUnavailable when Redis is gone; the lease then runs out and the job is taken up again.
    """
    claim = worker_context.store.claim(job_id, worker)
    if claim is None:
        _tidy(worker_context.store.accepted(job_id), worker_context)  # it may just have been closed
    else:
        run_claimed(claim, worker_context)


def run_next(worker_context: WorkerContext, following: Following, *, woken: bool) -> bool:
    """Bring the next job to an end: the one that ``following`` has claimed already, or another.

    Returns False if none is ready. Raises as ``run_job``.
    """
    if following.claimed:
        found = worker_context.store.found_by(following.worker, *following.claimed.pop())
    else:
        first, *_ = queues = following.queues
        found = worker_context.store.next(following.worker, first, queues, woken=woken)
    if found is None:
        return False
    if isinstance(found, str):
        with suppress(UnknownJob):  # its record is gone, or was not written by this service
            run_job(found, worker_context, following.worker)
    else:
        is_short = isinstance(found.accepted, ItemsJob | UploadJob)  # what is left of them is soon removed
        run_claimed(replace(found, following=following if is_short else None), worker_context)
    return True


def run_claimed(claim: Attempt, worker_context: WorkerContext) -> None:
    """Bring a claimed job to an end. Raises as ``run_job``."""
    job = claim.accepted
    if claim.attempt == 1 and not claim.deferrals:
        metrics.JOB_WAIT_SECONDS.labels(job.kind).observe(max(0.0, claim.waited_s))
    with audit.identified(job.request_id, job.owner):
        attempt, attempt_id = claim.attempt, claim.attempt_id
        _log.info("job.claimed", job_id=job.job_id, kind=job.kind, attempt=attempt, attempt_id=attempt_id)
        with tracing.span(f"job {job.kind}", SpanKind.CONSUMER, job.traceparent):
            tracing.note(kind=job.kind, attempt=attempt)
            with metrics.JOB_SECONDS.labels(job.kind).time():
                _attempt(claim, worker_context)


def _attempt(claim: Attempt, worker_context: WorkerContext) -> None:
    job, store = claim.accepted, worker_context.store
    try:
        if claim.commit is None and not isinstance(job, FileJob):  # that asks once it has to do the work
            authorization.check(worker_context.kms, job.who, authorization.of(job))
        if parts := _parts(claim, worker_context):
            store.split(claim, parts)
            return
        with Lease(store, claim) as lease:
            code = _work(lease, worker_context)
        state: JobState = "failed" if code else "succeeded"
        store.finish(claim, state, code, lease.work)
        _log.info("job.finished", job_id=job.job_id, state=state, code=code)
    except LeaseLost:
        _log.warning("job.lease_lost", job_id=job.job_id, attempt_id=claim.attempt_id)
    except Unavailable as exc:
        _defer(claim, store, exc)
    except KmsError as exc:
        _end_badly(claim, worker_context, exc)
    else:
        # as Redis holds it now, without a request
        ended = Job(job_id=job.job_id, tenant=job.tenant, kind=job.kind, state=state, error=code)
        _tidy(job, worker_context, None if job.parent else ended)


def _parts(claim: Attempt, worker_context: WorkerContext) -> Sequence[JobSpec]:
    """The parts to split the job into; none if it is small, is a part itself, or names no file."""
    job = claim.accepted
    if isinstance(job, ItemsJob) and len(job.starts) > 1:
        worker_context.store.require_share(job.tenant)
        return one_file.item_parts(job)
    if not isinstance(job, TreeJob) or isinstance(job, TreePart):
        return []
    worker_context.store.require_share(job.tenant)
    listed = worker_context.places.files(Tree.parse(job.source))
    with Lease(worker_context.store, claim) as lease:
        return tree.plan(lease, job, worker_context.spool, listed, worker_context.store.rules.fanout_files)


def _tidy(job: JobSpec, worker_context: WorkerContext, whole: Job | None = None) -> None:
    """Remove what an ended job needs no more: items, half-written targets; all of it if cancelled.

    The list of a cancelled job over many files stays: its result says which of them were done.
    """
    with Chore(worker_context.store, job.job_id):
        whole = whole or worker_context.store.get(job.owner, job.tenant)
        if whole.parts_ended:
            whole = end_parent(whole, worker_context.store)
        if isinstance(job, TreePart):
            tree.abandon(job, worker_context.store.part(job.job_id), worker_context)
        elif whole.ended and isinstance(job, FileJob):
            worker_context.places.sweep({job.job_id: job.target})
        if whole.state == "cancelled" and not (isinstance(job, TreeJob) and whole.parts):
            worker_context.spool.delete(job.owner)


def _work(lease: Lease, worker_context: WorkerContext) -> str:
    """Do what was accepted; an error code if the job's result is readable but not whole."""
    job, context = lease.claim.accepted, worker_context
    match job:
        case ItemsJob():
            with _refusal_recorded(job, context.kms):
                one_file.run_items(lease, job, context.kms, context.spool)
        case TreePart():
            with _refusal_recorded(job, context.kms):
                tree.run(lease, job, context)
        case UploadJob():
            one_file.run_upload(lease, job, context.kms, context.spool)
        case FileJob():
            target = context.places.target(job, job.job_id, lease.claim.spec)
            work = one_file.FileWork(
                job, target, context.kms, context.places, context.store, lease, lease.claim
            )
            lease.made = work.run()
        case TreeJob():
            pass  # it names no file
    return ITEMS_FAILED if lease.failed_items else ""


@contextmanager
def _refusal_recorded(job: JobSpec, kms: Kms) -> Iterator[None]:
    """Puts it into the audit log that items or a listing are not those of the job."""
    try:
        yield
    except RecordRefused as exc:
        kms.raise_recorded(job.who, job.kind, job.bound_context, exc)


def _defer(claim: Attempt, store: JobStore, exc: Unavailable) -> None:
    """A peer that is away costs the job time, not an attempt; so does a grown source.

    Raises ``exc`` again if that peer is a Redis that does not answer: nothing can be noted. One that is full
    has no room for parts, and may have later.
    """
    if isinstance(exc, JobsUnavailable) and not isinstance(exc, DurabilityUnconfirmed | RedisFull):
        raise exc
    if isinstance(exc, HandedBack):
        with suppress(LeaseLost):
            store.defer(claim, 0, exc.code, away=False)
        _log.info("job.handed_back", job_id=claim.accepted.job_id, heard=True)
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
        _tidy(job, worker_context)
    elif state == "cancelled":
        worker_context.spool.delete(job.job_id)
    _log.info("job.finished", job_id=job.job_id, state=state, code=exc.code)
