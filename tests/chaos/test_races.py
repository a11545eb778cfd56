"""Moments that a storm found: what happens between two steps of one process, done here by hand."""

import pytest

from kms_core.container import Core
from kms_core.jobs.execution.lease import Lease
from kms_core.jobs.model import Attempt
from kms_core.jobs.spec import FILES, QUEUES, Fields
from kms_core.jobs.store.store import JobStore
from support.job_stores import LONG, TENANT, accepted, claimed, lapse, store_of
from support.waiting import until


@pytest.fixture
def store(core: Core) -> JobStore:
    return store_of(core, LONG)


def is_open(store: JobStore, job_id: str) -> bool:
    return store.redis.zscore("kms:open", job_id) is not None


def test_job_that_ends_while_the_caretaker_looks_at_it_stays_ended(store: JobStore) -> None:
    claim = claimed(store)
    job_id = claim.accepted.job_id

    store.finish(claim, "succeeded")  # after it was seen as due

    assert store.reap_all([job_id]) == ["succeeded"]
    assert not is_open(store, job_id)


def test_cancelled_job_that_had_an_attempt_is_tidied_by_a_worker(core: Core) -> None:
    store = store_of(core, LONG)
    job_id = claimed(store).accepted.job_id
    lapse(store)
    store.reap_all([job_id])

    store.cancel(job_id, TENANT)

    assert store.next("w/1", FILES, QUEUES, woken=False) == job_id


def test_expired_job_that_had_attempts_is_tidied_by_a_worker(core: Core) -> None:
    store = store_of(core, LONG, [])
    once, twice = (claimed(store).accepted.job_id for _ in range(2))
    lapse(store)
    claim = store.claim(twice, "w2")
    assert claim
    store.finish(claim, "succeeded")

    store.purged(once)
    store.purged(twice)

    assert store.redis.zrange("kms:chores", 0, -1) == [twice.encode()]


def test_jobs_are_due_by_the_clock_of_redis_alone(store: JobStore) -> None:
    ahead = accepted(created_at=store.now() + 24 * 3600)
    store.submit(ahead)

    assert isinstance(store.next("w/1", FILES, QUEUES, woken=False), Attempt)


class Breaking(JobStore):
    """A store whose first renewal meets a fault that nobody thought of."""

    renewals = 0

    def renew(self, claim: Attempt, progress: Fields) -> None:
        self.renewals += 1
        if self.renewals == 1:
            raise ValueError
        super().renew(claim, progress)


def test_renewal_that_breaks_does_not_end_the_thread_that_renews(core: Core) -> None:
    found = store_of(core, LONG, [])
    store = Breaking(found.redis, found.record_key, lambda *_: None, LONG)

    with Lease(store, claimed(store)):
        until(lambda: store.renewals > 2, "it goes on")
    with Lease(store, claimed(store)):
        before = store.renewals
        until(lambda: store.renewals > before, "another is renewed by the same thread")
