"""Runs one job once: claim, work, finish. Running the same job twice changes nothing the second time."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import structlog

from kms_core import audit
from kms_core.jobs import authorization
from kms_core.jobs.ends import ITEMS_FAILED, PlacedTarget
from kms_core.jobs.execution import bulk_items, one_file, parents, tree, upload
from kms_core.jobs.execution.lease import FoundLarge, Lease
from kms_core.jobs.execution.tree import Paced
from kms_core.jobs.file_patterns import Tree
from kms_core.jobs.model import DEAD, Attempt, Job, JobSpec, LeaseLost
from kms_core.jobs.storage.locations import Locations
from kms_core.jobs.storage.spool import ITEMS, UPLOAD, Label, Spool
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics, tracing
from kms_core.service import Kms
from kms_protocol.errors import (
    JobCancelled,
    JobsUnavailable,
    KmsError,
    PathRefused,
    RecordRefused,
    Unavailable,
)
from kms_protocol.wire import JobState

_FIRST_DELAY_S: Final = 1.0
_LONGEST_DELAY_S: Final = 60.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker works with."""

    kms: Kms
    store: JobStore
    spool: Spool
    places: Locations
    fanout_files: int = 100_000


def run_job(job_id: str, shop: WorkerContext, worker: str) -> None:
    """Claim the job and bring it to an end, unless somebody else holds it or it has ended.

    Raises JobsUnavailable when Redis is gone; the lease then runs out and the job is taken up again.
    """
    claim = shop.store.claim(job_id, worker)
    if claim is None:
        _tidy(shop.store.accepted(job_id), shop)  # it may just have been closed
        return
    job = claim.accepted
    with audit.identified(job.request_id, job.owner):
        _run_claimed(claim, shop)


def _run_claimed(claim: Attempt, shop: WorkerContext) -> None:
    job = claim.accepted
    if claim.attempt == 1 and not claim.deferrals:
        metrics.JOB_WAIT_SECONDS.labels(job.kind).observe(max(0.0, claim.waited_s))
    _log.info("job.claimed", job_id=job.job_id, kind=job.kind, attempt=claim.attempt, fence=claim.fence)
    with tracing.span(f"job {job.kind}", "consumer", job.traceparent):
        tracing.note(kind=job.kind, attempt=claim.attempt)
        with metrics.JOB_SECONDS.labels(job.kind).time():
            _attempt(claim, shop)


def _attempt(claim: Attempt, shop: WorkerContext) -> None:
    job, store = claim.accepted, shop.store
    try:
        if claim.commit is None:  # what is committing has been done
            authorization.check(shop.kms, job.who, authorization.of(job))
        if parts := _parts(claim, shop):
            store.split(claim, parts)
            return
        with Lease(store, claim) as lease:
            code = _work(lease, shop)
        state: JobState = "failed" if code else "succeeded"
        store.finish(claim, state, code, lease.work)
        _log.info("job.finished", job_id=job.job_id, state=state, code=code)
    except LeaseLost:
        _log.warning("job.lease_lost", job_id=job.job_id, fence=claim.fence)
    except JobsUnavailable:
        raise
    except Unavailable as exc:
        _defer(claim, store, exc)
    except KmsError as exc:
        _end_badly(claim, shop, exc)
    else:
        _tidy(job, shop, None if job.parent else _ended(claim, state, code))


def _parts(claim: Attempt, shop: WorkerContext) -> list[JobSpec]:
    """What the job is to be cut into; nothing, if it is small, or a part itself, or names no file."""
    job = claim.accepted
    if job.parent or not (job.is_tree or len(job.starts) > 1):
        return []
    if not job.is_tree:
        return bulk_items.parts(job)
    with Lease(shop.store, claim) as lease:
        return tree.plan(lease, shop.spool, shop.places.files(Tree.parse(job.source)), shop.fanout_files)


def _ended(claim: Attempt, state: JobState, code: str) -> Job:
    """What Redis would say now, without asking."""
    job = claim.accepted
    return Job(
        job_id=job.job_id, tenant=job.tenant, kind=job.kind, state=state, error=code, fence=claim.fence
    )


def _tidy(job: JobSpec, shop: WorkerContext, whole: Job | None = None) -> None:
    """Remove what an ended job needs no more: items, half-written targets; all of it if cancelled."""
    whole = whole or shop.store.get(job.owner, job.tenant)
    if whole.parts_ended:
        whole = parents.end(whole, shop.store)
    if job.is_tree:
        if job.parent:
            tree.abandon(job, shop.store.part(job.job_id), shop.spool, shop.places, shop.store)
    elif whole.ended and job.target:
        with suppress(PathRefused):
            one_file.sweep(job.job_id, job.target, whole.fence, shop.places)
    if whole.state == "cancelled":
        shop.spool.delete(job.owner)
    elif whole.ended and whole.error not in DEAD and job.source == ITEMS:  # a dead letter may be retried
        shop.spool.discard(Label(job.tenant, job.owner, ITEMS))


def _work(lease: Lease, shop: WorkerContext) -> str:
    """Do what was accepted; an error code if the job's result is readable but not whole."""
    job = lease.claim.accepted
    if job.source == ITEMS:
        with _refusal_recorded(job, shop.kms):
            bulk_items.run(lease, shop.kms, shop.spool)
        return ITEMS_FAILED if lease.failed_items else ""
    if job.is_tree:
        if job.parent:
            with _refusal_recorded(job, shop.kms):
                tree.run(lease, shop.kms, shop.store, shop.spool, shop.places)
        return ITEMS_FAILED if lease.failed_items else ""
    if job.source == UPLOAD:
        upload.run(lease, shop.kms, shop.spool)
        return ""
    commit = one_file.run(lease, shop.kms, shop.store, shop.places)
    lease.target = PlacedTarget(
        size_bytes=commit.size_bytes,
        inode=commit.inode,
        mtime_ns=commit.mtime_ns,
        parts=commit.parts,
    )
    return ""


@contextmanager
def _refusal_recorded(job: JobSpec, kms: Kms) -> Iterator[None]:
    """Puts it into the audit log that items or a listing are not those of the job."""
    try:
        yield
    except RecordRefused as exc:
        kms.refused(job.who, job.kind, job.bound_context, exc)


def _defer(claim: Attempt, store: JobStore, exc: Unavailable) -> None:
    """A peer that is away costs the job time, not an attempt; so does its pace, or a grown source."""
    if isinstance(exc, Paced):
        store.defer(claim, exc.retry_after_s, counts=False, away=False)
        return
    if isinstance(exc, FoundLarge):
        store.defer(claim, 0, counts=False, away=False, work_bytes=exc.work_bytes)
        return
    delay = min(_LONGEST_DELAY_S, max(exc.retry_after_s, _FIRST_DELAY_S) * 2.0**claim.deferrals)
    delay *= random.uniform(0.5, 1.0)  # noqa: S311 -- jitter, no secret
    try:
        store.defer(claim, delay, counts=False)
    except LeaseLost:  # or it is committing: then its lease runs out, and whoever claims it next finishes it
        _log.warning("job.left_to_lease", job_id=claim.accepted.job_id, code=exc.code)
    else:
        _log.warning("job.deferred", job_id=claim.accepted.job_id, code=exc.code, delay_s=round(delay, 1))


def _end_badly(claim: Attempt, shop: WorkerContext, exc: KmsError) -> None:
    state: JobState = "cancelled" if isinstance(exc, JobCancelled) else "failed"
    shop.store.finish(claim, state, exc.code)
    job: JobSpec = claim.accepted
    if job.parent:
        _tidy(job, shop)
    elif exc.code not in DEAD:  # a dead letter may be retried
        shop.spool.delete(job.job_id)
    _log.info("job.finished", job_id=job.job_id, state=state, code=exc.code)
