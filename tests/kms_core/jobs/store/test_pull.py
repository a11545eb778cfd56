"""The choice of the next job: fairness, priority, bounds, wake-ups; over a real Valkey."""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import cast

import pytest

from kms_core.container import Core
from kms_core.jobs.recovery.reaper import Reaper, due, reap_all
from kms_core.jobs.spec import BULK, FILES, QUEUES
from kms_core.jobs.store import gauges, wake_ups
from kms_core.jobs.store.heartbeats import Heartbeat, idle_s, live_workers, processes_stuck, worker_seen
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import new_id
from kms_protocol.errors import JobsUnavailable
from support.job_stores import (
    COMMIT,
    LASTING_LEASES,
    TENANT,
    accepted,
    attempt,
    claimed,
    depths,
    expire_leases,
    forge,
    next_attempt,
    store_of,
    take,
    with_jobs,
)
from support.waiting import until


@pytest.fixture
def woken() -> list[str]:
    return []


@pytest.fixture
def store(core: Core, woken: list[str]) -> JobStore:
    return store_of(core, LASTING_LEASES, woken=woken)


def submit(store: JobStore, count: int = 1, **changes: object) -> list[str]:
    """The ids of so many jobs of the queue BULK."""
    made = [accepted(**{"items": 1, "source": "items"} | changes) for _ in range(count)]
    return [store.submit(each).job_id for each in made]


def taken(store: JobStore, worker: str = "w/1", queue: str = BULK, *, woken: bool = False) -> str | None:
    """The tenant of the job that a process is given; None if none is ready."""
    found = next_attempt(store, worker, queue, woken=woken)
    return found.accepted.tenant if found else None


def active_at(store: JobStore, tenant: str = TENANT) -> float:
    """The virtual time of a tenant whose jobs wait: seconds of leases and claims that were charged."""
    found = store.redis.zscore(f"kms:active:{BULK}", tenant)
    assert found is not None
    return found


# -- fairness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "turns"),
    [
        ({"large": 50, "small": 1}, {"large": 1, "small": 1}),
        ({"a": 6, "b": 6, "c": 6}, {"a": 3, "b": 3, "c": 3}),
    ],
    ids=["large and small", "alike"],
)
def test_tenants_take_turns(store: JobStore, jobs: dict[str, int], turns: dict[str, int]) -> None:
    for tenant, count in jobs.items():
        submit(store, count, tenant=tenant)

    assert Counter(taken(store) for _ in range(sum(turns.values()))) == turns


def test_lease_time_is_charged(store: JobStore) -> None:
    """A tenant whose jobs take long has fewer of them started."""
    for tenant in ("long", "short"):
        submit(store, 10, tenant=tenant)
    turns = []
    for _ in range(8):
        found = attempt(store)
        turns.append(found.accepted.tenant)
        if found.accepted.tenant == "long":
            forge(store, found.accepted.job_id, paid_until=str(store.now() - 0.2))
        store.finish(found, "succeeded")

    assert Counter(turns)["short"] >= 6


@pytest.mark.parametrize(("ran_s", "charged_s"), [(100, 100), (86_400, 3_600)])
def test_lease_time_is_charged_while_a_job_runs(store: JobStore, ran_s: float, charged_s: float) -> None:
    """No clock makes a tenant pay for more than an hour at once."""
    submit(store, 2)
    found = attempt(store)
    forge(store, found.accepted.job_id, paid_until=str(store.now() - ran_s))

    store.renew(found, {})

    assert active_at(store) == pytest.approx(charged_s, abs=10)


def test_lease_time_costs_nothing_while_no_job_waits(store: JobStore) -> None:
    """A tenant that used idle processes does not wait behind one that comes later."""
    submit(store, tenant="first")
    found = attempt(store)
    forge(store, found.accepted.job_id, paid_until=str(store.now() - 1000))
    store.renew(found, {})

    for tenant in ("first", "later"):
        submit(store, tenant=tenant)
        assert active_at(store, tenant) == 0


def test_tenants_whose_time_is_made_up_for_are_not_kept(store: JobStore) -> None:
    submit(store, 40, tenant="busy")
    for number in range(20):
        submit(store, tenant=f"once-{number}")
        taken(store)
    while taken(store):
        pass

    assert store.redis.zcard(f"kms:spent:{BULK}") == 0


def test_a_tenant_that_was_idle_saves_no_time_up(store: JobStore) -> None:
    submit(store, tenant="idle")
    store.finish(attempt(store), "succeeded")
    submit(store, 20, tenant="busy")
    for _ in range(10):
        store.finish(attempt(store), "succeeded")
    submit(store, 20, tenant="idle")

    assert Counter(taken(store) for _ in range(8)) == {"busy": 4, "idle": 4}


def test_a_tenant_that_was_idle_begins_where_the_last_choice_was(store: JobStore) -> None:
    """Of five jobs, each claim costs 10 ms while others wait."""
    submit(store, 5, tenant="busy")
    for _ in range(5):
        attempt(store)

    submit(store, tenant="idle")

    assert active_at(store, "idle") == pytest.approx(0.04)


def test_a_tenant_begins_where_the_least_active_one_is(store: JobStore) -> None:
    submit(store, tenant="busy")
    store.redis.zadd(f"kms:active:{BULK}", {"busy": 500})

    submit(store, tenant="new")

    assert active_at(store, "new") == 500


def test_a_tenant_that_submits_one_job_at_a_time_pays_for_each(store: JobStore) -> None:
    """Or it would be chosen before one whose jobs wait, again and again."""
    submit(store, 10, tenant="many")
    turns = []
    for _ in range(12):
        if not store.redis.exists(f"kms:sizes:{BULK}:always-one"):
            submit(store, tenant="always-one")
        turns.append(taken(store))

    assert Counter(turns) == {"always-one": 6, "many": 6}


@pytest.fixture
def capped(core: Core, woken: list[str]) -> JobStore:
    """A store that gives out one job of a tenant at a time."""
    return store_of(core, with_jobs(tenant_leases=1), woken=woken)


def test_a_capped_tenant_blocks_no_other_and_comes_back(capped: JobStore) -> None:
    submit(capped, 3, tenant="capped")
    submit(capped, tenant="other")

    found = attempt(capped)
    held = found if found.accepted.tenant == "capped" else attempt(capped)

    assert {taken(capped), taken(capped), taken(capped)} <= {"other", None}
    capped.finish(held, "succeeded")
    assert taken(capped) == "capped"


def test_a_capped_tenant_comes_back_when_its_lease_runs_out(capped: JobStore) -> None:
    submit(capped, 2)
    attempt(capped)
    assert taken(capped) is None
    expire_leases(capped)

    assert reap_all(capped, due(capped)) == ["requeued"]

    assert taken(capped) == TENANT


def test_a_commit_of_a_dead_worker_holds_up_no_other_queue_of_its_tenant(capped: JobStore) -> None:
    submit(capped)
    other = capped.submit(accepted())
    capped.committing(attempt(capped), COMMIT)
    assert taken(capped, queue=FILES) is None
    expire_leases(capped)

    assert reap_all(capped, due(capped)) == ["committing"]

    assert attempt(capped, queue=FILES).accepted.job_id == other.job_id


# -- priority --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waited_s", "order"),
    [
        ({"low": 0, "normal": 0, "high": 0}, ["high", "normal", "low"]),
        ({"normal": 500, "high": 0}, ["high", "normal"]),
        ({"normal": 700, "high": 0}, ["normal", "high"]),
    ],
    ids=str,
)
def test_priority_goes_before_age_until_a_job_has_waited_for_long(
    store: JobStore, waited_s: dict[str, float], order: list[str]
) -> None:
    for priority, seconds in waited_s.items():
        submit(store, priority=priority, created_at=time.time() - seconds)

    assert [attempt(store).accepted.priority for _ in order] == order


def test_jobs_of_the_queue_that_has_work_come_first(store: JobStore) -> None:
    """Then those of others that the worker serves, and no more."""
    store.submit(accepted(source="upload"))
    submit(store, 2)

    assert attempt(store, queue=FILES).accepted.queue == FILES
    assert store.next("w/1", (FILES,), woken=False) is None
    assert attempt(store, queue=FILES).accepted.queue == BULK
    assert attempt(store).accepted.queue == BULK
    assert taken(store) is None


# -- what waits and what is due --------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["it was deferred", "the clock of Redis went back"])
def test_a_job_is_ready_when_its_time_has_come(store: JobStore, why: str) -> None:
    (job_id,) = submit(store)
    if why == "it was deferred":
        store.defer(attempt(store), 0.3)
        assert sum(depths(store).values()) == 0
    else:
        forge(store, job_id, not_before=str(time.time() + 0.3))
    assert taken(store) is None

    until(lambda: due(store), "its time has come")
    assert reap_all(store, due(store)) == ["due"]

    assert taken(store) == TENANT


def test_jobs_are_due_by_the_clock_of_redis_alone(store: JobStore) -> None:
    submit(store, created_at=store.now() + 24 * 3600)

    assert attempt(store).attempt == 1


def test_a_job_whose_lease_ran_out_is_ready_again_and_the_reaper_looks_at_no_other(store: JobStore) -> None:
    claim = claimed(store, items=1, source="items")
    submit(store, 1000)
    expire_leases(store)

    assert due(store) == [claim.accepted.job_id]
    assert reap_all(store, due(store)) == ["requeued"]
    again = attempt(store)
    assert (again.accepted.job_id, again.fence) == (claim.accepted.job_id, claim.fence + 1)


def test_depth_and_age_are_of_ready_jobs(store: JobStore) -> None:
    for priority in ("low", "low", "high"):
        submit(store, priority=priority)
    attempt(store)

    assert depths(store)[BULK, "low"] == 2
    assert sum(depths(store).values()) == 2
    found = gauges.survey_queues(store)
    assert found.jobs == {"queued": 2, "running": 1, "committing": 0}
    assert 0 <= found.oldest_queued_s < 60
    assert gauges.survey_queues(store, "other").jobs == {"queued": 0, "running": 0, "committing": 0}


def test_a_list_by_state_finds_an_old_job_behind_many(store: JobStore) -> None:
    (old,) = submit(store)
    store.finish(attempt(store), "failed", "nothing")
    submit(store, 300)
    asked = Counter[str]()
    send = store.redis.execute_command

    def counting(*args: object, **named: object) -> object:
        asked["commands"] += 1
        return send(*args, **named)  # type: ignore[no-untyped-call]  # as redis-py has it

    store.redis.execute_command = counting  # type: ignore[method-assign]  # counts what is asked
    found, following = store.page(TENANT, state="failed", limit=50, before=None)

    assert ([each.job_id for each in found], following) == ([old], None)
    assert asked["commands"] < 5


def test_a_worker_that_asks_for_jobs_or_renews_is_not_idle(store: JobStore) -> None:
    """By this its watchdog goes."""
    assert math.isinf(idle_s(store, "w"))
    assert taken(store) is None
    assert idle_s(store, "w") < 60

    submit(store)
    claim = attempt(store)
    store.redis.delete("kms:busy:w")
    store.renew(claim, {})
    assert idle_s(store, "w") < 60


# -- wake-ups --------------------------------------------------------------------------------------------


@pytest.fixture
def pushing(core: Core) -> JobStore:
    """A store whose scripts push wake-ups, since the broker is its Redis."""
    found = core.worker_context.store
    return JobStore(found.redis, found.record_key, None, LASTING_LEASES)


def listed_wake_ups(store: JobStore, queue: str = BULK) -> int:
    """Wake-ups in the list of a queue."""
    return int(store.redis.llen(f"kms:{queue}"))


@pytest.mark.parametrize("known", ["no worker", "a silent worker", "a busy worker"])
def test_a_submission_sends_a_wake_up_whatever_is_known_of_workers(pushing: JobStore, known: str) -> None:
    """A heartbeat that stands still, or a count of idle processes that is wrong, holds no job up."""
    if known != "no worker":
        worker_seen(pushing, "w", 1, QUEUES)
        submit(pushing)
        assert taken(pushing, woken=True)
        pushing.redis.delete("kms:kms.bulk")
    if known == "a silent worker":
        pushing.redis.zadd("kms:workers", {"w": time.time() - 11})
        pushing.redis.delete("kms:capacity:kms.bulk")  # as versions before had it expire

    submit(pushing, 3)

    pushed = cast("list[bytes]", pushing.redis.lrange("kms:kms.bulk", 0, -1))
    assert pushed == [wake_ups.encode_message(BULK)] * 3
    assert json.loads(pushed[0])["body"] == "[[],{},null]", "no job is named"
    assert listed_wake_ups(pushing, FILES) == 0


def test_a_list_that_nobody_takes_from_has_ten_wake_ups(pushing: JobStore) -> None:
    submit(pushing, 9)
    assert listed_wake_ups(pushing) == 9

    submit(pushing, 2)
    assert listed_wake_ups(pushing) == 10

    pushing.split(attempt(pushing), [accepted(items=1, source="items", parent=new_id())])
    pushing.wake()
    assert listed_wake_ups(pushing) == 10


def test_parts_send_a_wake_up(pushing: JobStore) -> None:
    (job_id,) = submit(pushing)
    pushing.redis.delete("kms:kms.bulk")

    pushing.split(attempt(pushing), [accepted(items=1, source="items", parent=job_id) for _ in range(9)])

    assert listed_wake_ups(pushing) == 1


def test_a_process_that_was_woken_has_another_one_woken_while_jobs_are_ready(pushing: JobStore) -> None:
    """So all processes are at work, however few wake-ups there were."""
    submit(pushing, 4)
    pushing.redis.delete("kms:kms.bulk")

    assert taken(pushing)
    assert listed_wake_ups(pushing) == 0, "it was not woken, but goes on"
    for worker in ("w/2", "w/3"):
        assert taken(pushing, worker, woken=True)
        assert listed_wake_ups(pushing) == 1
        pushing.redis.delete("kms:kms.bulk")
    assert taken(pushing, "w/4", woken=True)
    assert listed_wake_ups(pushing) == 0, "nothing is left"
    assert taken(pushing, "w/5", woken=True) is None


def test_where_the_broker_is_elsewhere_each_submission_sends_a_wake_up(
    store: JobStore, woken: list[str]
) -> None:
    submit(store, 2)
    store.submit(accepted())
    assert woken == [BULK, BULK, FILES]

    assert taken(store, woken=True)
    assert woken[3:] == [BULK, FILES]
    assert listed_wake_ups(store) == 0


def test_a_worker_is_woken_when_it_begins_to_take_messages(pushing: JobStore) -> None:
    submit(pushing, 3)
    pushing.redis.delete("kms:kms.bulk")
    heartbeat = Heartbeat(pushing, "w")
    heartbeat.start()
    try:
        assert len(live_workers(pushing)) == 1
        assert listed_wake_ups(pushing) == 0

        heartbeat.serve()
        assert listed_wake_ups(pushing) == 1
    finally:
        heartbeat.stop()
        heartbeat.join()
    assert live_workers(pushing) == []


def test_the_reaper_sends_none_for_jobs_of_a_tenant_at_its_cap(capped: JobStore, woken: list[str]) -> None:
    submit(capped, 3)
    running = attempt(capped)
    assert taken(capped) is None
    woken.clear()

    capped.wake()
    assert woken == []
    assert not capped.has_ready(*QUEUES)  # or a watchdog would end the worker, which takes nothing

    capped.finish(running, "failed", "expired")
    assert capped.has_ready(BULK)
    assert not capped.has_ready(FILES)
    capped.wake()
    assert woken == [BULK]


def test_a_killed_worker_is_forgotten(store: JobStore) -> None:
    heartbeat = Heartbeat(store, "w")
    heartbeat.serve()
    for name in ("killed", "long ago"):
        worker_seen(store, name, 4, QUEUES)
        processes_stuck(store, name, 1, 60, [])
    store.redis.zadd("kms:workers", {"killed": time.time() - 6, "long ago": time.time() - 60})
    assert len(live_workers(store)) == 1

    for _ in range(3):
        heartbeat.round()

    assert store.redis.zrange("kms:workers", 0, -1) == [b"killed", b"w"]
    assert store.redis.hkeys("kms:slots") == [b"w"]
    assert store.redis.hkeys("kms:stuck") == []


def test_workers_are_counted_by_their_version(store: JobStore) -> None:
    for name, about in (("a", "0.2.0 1"), ("b", "0.1.9 2"), ("c", "0.2.0 3"), ("d", "")):
        worker_seen(store, name, 4, QUEUES, about)
    worker_seen(store, "starting", 4, (), "0.3.0 4")

    assert gauges.survey_queues(store).versions == {"0.1.9": 1, "0.2.0": 2, "0.3.0": 1}


def test_a_lost_wake_up_is_sent_again(pushing: JobStore) -> None:
    submit(pushing, 2)
    pushing.redis.delete("kms:kms.bulk")

    Reaper(pushing, "r").step()

    assert listed_wake_ups(pushing) == 1


def test_a_worker_is_woken_to_end_a_job_whose_parts_have_ended(store: JobStore, woken: list[str]) -> None:
    """The worker that ended the last part was killed, and nothing else is to be done."""
    whole = claimed(store, items=1, source="items")
    part = accepted(items=1, source="items", parent=whole.accepted.job_id)
    store.split(whole, [part])
    store.finish(take(store, part.job_id), "succeeded")
    expire_leases(store)
    woken.clear()

    Reaper(store, "r").step()

    assert BULK in woken
    assert store.next("w/1", QUEUES, woken=True) == whole.accepted.job_id


def test_a_failed_wake_up_loses_no_job(core: Core) -> None:
    def broken(_queue: str) -> None:
        raise JobsUnavailable

    found = core.worker_context.store
    store = JobStore(found.redis, found.record_key, broken, LASTING_LEASES)

    submit(store, 2)
    assert taken(store, woken=True) == TENANT


def test_a_claimed_job_is_not_left_because_redis_went_away_before_the_next_wake_up(core: Core) -> None:
    class Away(JobStore):
        def wake(self, queues: Sequence[str] = QUEUES) -> None:
            del queues
            raise JobsUnavailable

    found = core.worker_context.store
    store = Away(found.redis, found.record_key, None, LASTING_LEASES)

    submit(store)
    assert taken(store, woken=True) == TENANT


# -- junk ------------------------------------------------------------------


@pytest.mark.parametrize("junk", ["no record", "a string", "ended", "another queue"])
def test_junk_among_ready_jobs_is_passed_over(store: JobStore, junk: str) -> None:
    (good,), (wrong,) = submit(store, created_at=time.time() + 5), submit(store)
    if junk == "ended":
        forge(store, wrong, state="succeeded")
    elif junk == "another queue":
        forge(store, wrong, queue="kms.files", tenant="theirs", state="failed")
    else:
        store.redis.delete(f"kms:job:{wrong}")
    if junk == "a string":
        store.redis.set(f"kms:job:{wrong}", "x")
    store.redis.zadd(f"kms:ready:kms.bulk:{TENANT}:small", {wrong: 1})

    assert attempt(store).accepted.job_id == good
    assert taken(store) is None
