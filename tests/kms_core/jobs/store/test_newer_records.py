"""Jobs of a newer version of the service wait for a newer worker, in the open and without an attempt."""

import math
from typing import Any, Final

import pytest

from kms_core.container import Core
from kms_core.jobs.recovery.reaper import Reaper, due, reap_all
from kms_core.jobs.spec import QUEUES, RecordTooNew
from kms_core.jobs.store.heartbeats import worker_seen
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import UnknownJob
from support.core_jobs import run_job
from support.job_stores import TENANT, accepted, forge, record, resealed

NEEDS = "later-feature"


def job_needing_later_version(store: JobStore) -> str:
    """A job that waits for a later feature, of which only the plain fields tell."""
    job_id = store.submit(accepted()).job_id
    store.redis.hset(f"kms:job:{job_id}", "needs", NEEDS)
    assert taken(store) is None
    assert store.redis.zscore("kms:newer", job_id)
    return job_id


def replaced(store: JobStore, *, plain: str = "", **changes: Any) -> str:  # noqa: ANN401 -- any
    """A queued job whose record a later version wrote."""
    job_id = store.submit(accepted()).job_id
    forge(store, job_id, sealed=resealed(store, job_id, **changes), **({"needs": plain} if plain else {}))
    return job_id


def taken(store: JobStore, worker: str = "w/1") -> object:
    return store.next(worker, QUEUES, woken=False)


LATER: Final[dict[str, dict[str, Any]]] = {
    "a version": {"version": 2},
    "a feature that the plain fields tell": {"needs": [NEEDS], "plain": NEEDS},
    "a feature that only the record tells": {"needs": [NEEDS]},
    "a kind of job": {"form": "stream"},
    "a kind of work": {"kind": "countersign"},
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("is_named", [False, True], ids=["next", "named by a message"])
def test_a_job_that_is_too_new_waits_without_an_attempt(
    core: Core, store: JobStore, later: str, *, is_named: bool
) -> None:
    job_id = replaced(store, **LATER[later])
    good = store.submit(accepted()).job_id
    if is_named:
        with pytest.raises(UnknownJob):
            run_job(job_id, core.worker_context, "w/1")

    found = {str(getattr(taken(store), "accepted", None)) for _ in range(3)}

    assert any(good in each for each in found)  # what is behind it is not held up
    job = record(store, job_id)
    assert (job[b"state"], job.get(b"attempt", b"0"), job.get(b"error", b"")) == (b"queued", b"0", b"")
    assert job[b"waits_for"]
    assert store.redis.zscore("kms:newer", job_id)
    assert reap_all(store, [job_id]) == ["newer"]
    Reaper(store, "w").step()
    assert taken(store) is None


def test_a_worker_that_knows_the_feature_takes_it(store: JobStore) -> None:
    """The later version, played by the record of this one. An earlier one may be the first that counts."""
    worker_seen(store, "later", 1, QUEUES)
    worker_seen(store, "earlier", 1, QUEUES)
    job_id = job_needing_later_version(store)

    store.redis.hdel(f"kms:job:{job_id}", "needs")
    worker_seen(store, "later", 1, QUEUES)
    store.ask_clock()  # which the store else counts on by itself, a moment late
    assert job_id in due(store)
    assert reap_all(store, [job_id]) == ["due"]

    claim = store.next("later/1", QUEUES, woken=False)
    assert getattr(claim, "attempt", 0) == 1
    assert b"waits_for" not in record(store, job_id)
    assert not store.redis.exists("kms:newer")


def test_a_worker_looks_at_few_jobs_at_a_time_and_in_the_end_at_all(store: JobStore) -> None:
    """Each look is a script that holds up Redis. Two workers take turns, and only one of them can."""
    new = [f"new-{number}" for number in range(180)]
    job_id = job_needing_later_version(store)
    fields: dict[Any, Any] = store.redis.hgetall(f"kms:job:{job_id}")
    for name in new:
        store.redis.hset(f"kms:job:{name}", mapping=fields)
        store.redis.zadd("kms:newer", {name: 1.0})
        store.redis.hdel(f"kms:job:{name}", "needs")

    worker_seen(store, "later", 1, QUEUES)
    first = [name for name in new if store.redis.zscore("kms:newer", name) is None]
    assert len(first) <= 60

    for _ in range(400):
        worker_seen(store, "later", 1, QUEUES)
        if store.redis.zrange("kms:newer", 0, -1) == [job_id.encode()]:
            break
    store.ask_clock()
    assert set(new) <= set(due(store, limit=1000))


def test_it_can_be_read_and_cancelled(store: JobStore) -> None:
    job_id = replaced(store, needs=[NEEDS], plain=NEEDS)
    taken(store)

    assert store.get(job_id, TENANT).waits_for == NEEDS
    with pytest.raises(RecordTooNew, match=NEEDS):
        store.accepted(job_id)
    assert store.cancel(job_id, TENANT).state == "cancelled"
    assert not store.redis.exists("kms:newer")


@pytest.mark.parametrize("field", ["created_at", "expires_at", "authorized_until"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_record_with_a_time_that_is_none_is_refused(store: JobStore, field: str, value: float) -> None:
    changes: dict[str, Any] = {field: value}
    job_id = replaced(store, **changes)

    taken(store)

    job = record(store, job_id)
    assert (job[b"state"], job[b"error"]) == (b"failed", b"record_refused")
    assert [dead.job_id for dead in store.dead(TENANT, 10)] == [job_id]
