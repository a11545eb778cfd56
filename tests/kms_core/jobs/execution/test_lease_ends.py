"""The end of a lease: its renewal stops, and it is noticed when it is lost, cancelled or over."""

import os

import pytest

from kms_core.container import Core
from kms_core.jobs.execution import lease
from kms_core.jobs.execution.lease import Chore, Lease, Renewed
from kms_core.jobs.model import LeaseLost
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import JobCancelled
from support.job_stores import TENANT, claimed, connect, forge, store_of, with_jobs
from support.waiting import until


def is_renewed(one: Renewed) -> bool:
    return one in lease._pacemaker(os.getpid())._due  # noqa: SLF001 -- its effect takes seconds to see


@pytest.fixture
def store(core: Core) -> JobStore:
    return store_of(core, with_jobs())


def test_nothing_is_renewed_after_its_block(store: JobStore) -> None:
    """It would count as stalled in the end, and end its process."""
    for one in (Lease(store, claimed(store)), Chore(store, "job")):
        with one:
            assert is_renewed(one)

        assert not is_renewed(one)


@pytest.mark.parametrize("error", [LeaseLost, JobCancelled])
def test_heartbeat_notices_that_the_job_was_taken_or_cancelled(
    store: JobStore, error: type[Exception]
) -> None:
    claim = claimed(store)
    if error is LeaseLost:
        forge(store, claim.accepted.job_id, attempt_id="another")
    else:
        store.cancel(claim.accepted.job_id, TENANT)

    with Lease(store, claim) as held, pytest.raises(error):
        until(held.check, "it is noticed")


def test_worker_without_redis_stops_when_its_lease_is_over(store: JobStore) -> None:
    claim, gone = claimed(store), connect("unix:///nonexistent.sock")
    away = JobStore(gone, store.record_key, lambda *_: None, with_jobs(lease_s=0.5))

    with Lease(away, claim) as held, pytest.raises(LeaseLost):
        until(held.check, "the lease is over")
