"""Runs one job once: claim, work, finish. Running the same job twice changes nothing the second time."""

import random
from dataclasses import dataclass
from typing import Final

import structlog

from kms_core import audit, metrics
from kms_core.errors import JobCancelled, JobsUnavailable, KmsError, Unavailable
from kms_core.jobs import bulk, files, uploads
from kms_core.jobs.blobs import ITEMS, UPLOAD, Label, Spool
from kms_core.jobs.lease import Lease
from kms_core.jobs.model import Accepted, Claim, LeaseLost
from kms_core.jobs.paths import Roots
from kms_core.jobs.store import JobStore
from kms_core.service import Kms

DEAD: Final = "attempts_exhausted"
_FIRST_DELAY_S: Final = 1.0
_LONGEST_DELAY_S: Final = 60.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Shop:
    """What a worker works with."""

    kms: Kms
    store: JobStore
    spool: Spool
    roots: Roots


def run_job(job_id: str, shop: Shop, worker: str) -> None:
    """Claim the job and bring it to an end, unless somebody else holds it or it has ended.

    Raises JobsUnavailable when Redis is gone; the lease then runs out and the job is taken up again.
    """
    claim = shop.store.claim(job_id, worker)
    if claim is None:
        _tidy(shop.store.accepted(job_id), shop)  # it may just have been closed
        return
    job = claim.accepted
    audit.job_id.set(job.owner)
    audit.request_id.set(job.request_id)
    if claim.attempt == 1 and not claim.deferrals:
        metrics.JOB_WAIT_SECONDS.labels(job.kind).observe(max(0.0, claim.waited_s))
    _log.info("job.claimed", job_id=job.job_id, kind=job.kind, attempt=claim.attempt, fence=claim.fence)
    with metrics.JOB_SECONDS.labels(job.kind).time():
        _attempt(claim, shop)


def _attempt(claim: Claim, shop: Shop) -> None:
    job, store = claim.accepted, shop.store
    try:
        if len(job.starts) > 1:
            store.split(claim, bulk.parts(job))
            return
        with Lease(store, claim) as lease:
            code = _work(lease, shop)
        store.finish(claim, "failed" if code else "succeeded", code, lease.progress)
        _log.info("job.finished", job_id=job.job_id, state="failed" if code else "succeeded", code=code)
    except LeaseLost:
        _log.warning("job.lease_lost", job_id=job.job_id, fence=claim.fence)
    except JobsUnavailable:
        raise
    except Unavailable as exc:
        _defer(claim, store, exc)
    except KmsError as exc:
        _end_badly(claim, shop, exc)
    else:
        _tidy(job, shop)


def _tidy(job: Accepted, shop: Shop) -> None:
    """Items are needed no more once the job, or the last of its parts, has ended; nothing is if cancelled."""
    whole = shop.store.get(job.owner, job.tenant)
    if whole.state == "cancelled":
        shop.spool.delete(job.owner)
    elif whole.ended and whole.error != DEAD and job.source == ITEMS:  # a dead letter may be retried
        shop.spool.discard(Label(job.tenant, job.owner, ITEMS))


def _work(lease: Lease, shop: Shop) -> str:
    """Do what was accepted; an error code if the job's result is readable but not whole."""
    job = lease.claim.accepted
    if job.source == ITEMS:
        bulk.run(lease, shop.kms, shop.spool)
        return "items_failed" if lease.failed_items else ""
    if job.source == UPLOAD:
        uploads.run(lease, shop.kms, shop.spool)
        return ""
    files.run(lease, shop.kms, shop.store, shop.roots)
    return ""


def _defer(claim: Claim, store: JobStore, exc: Unavailable) -> None:
    """A peer that is away costs the job time, not an attempt."""
    delay = min(_LONGEST_DELAY_S, max(exc.retry_after_s, _FIRST_DELAY_S) * 2.0**claim.deferrals)
    delay *= random.uniform(0.5, 1.0)  # noqa: S311 -- jitter, no secret
    store.defer(claim, delay, counts=False)
    _log.warning("job.deferred", job_id=claim.accepted.job_id, code=exc.code, delay_s=round(delay, 1))


def _end_badly(claim: Claim, shop: Shop, exc: KmsError) -> None:
    state = "cancelled" if isinstance(exc, JobCancelled) else "failed"
    shop.store.finish(claim, state, exc.code)
    job: Accepted = claim.accepted
    if job.parent:
        _tidy(job, shop)
    else:
        shop.spool.delete(job.job_id)
    _log.info("job.finished", job_id=job.job_id, state=state, code=exc.code)
