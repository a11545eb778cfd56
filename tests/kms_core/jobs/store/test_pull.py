"""The choice of the next job: fairness, priority, bounds, wake-ups; over a real Valkey."""

import json
import math
import time
from collections import Counter
from typing import cast

import pytest

from kms_core.container import Core
from kms_core.jobs.model import Attempt
from kms_core.jobs.recovery.reaper import Heartbeat, Reaper
from kms_core.jobs.spec import BULK, FILES, QUEUES, JobSpec
from kms_core.jobs.store import activity, redis_keys
from kms_core.jobs.store.redis_keys import SCRIPTS
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import new_id
from kms_protocol.errors import JobsUnavailable
from kms_protocol.wire import Priority
from support.job_stores import (
    COMMIT,
    LONG,
    TENANT,
    accepted,
    claimed,
    depths,
    forge,
    lapse,
    store_of,
    with_jobs,
)
from support.waiting import until


@pytest.fixture
def woken() -> list[str]:
    return []


@pytest.fixture
def store(core: Core, woken: list[str]) -> JobStore:
    return store_of(core, LONG, woken)


def job(**changes: object) -> JobSpec:
    return accepted(items=1, source="items", **changes)


def taken(store: JobStore, worker: str = "w/1", queue: str = BULK, *, woken: bool = False) -> str | None:
    """The tenant of the job that a process is given; None if none is ready."""
    found = store.next(worker, queue, QUEUES, woken=woken)
    assert not isinstance(found, str)
    return found.accepted.tenant if found else None


def attempt(store: JobStore, worker: str = "w/1") -> Attempt:
    found = store.next(worker, BULK, QUEUES, woken=False)
    assert isinstance(found, Attempt)
    return found


# -- fairness --------------------------------------------------------------------------------------------


def test_a_small_tenant_does_not_wait_for_a_large_one(store: JobStore) -> None:
    for _ in range(50):
        store.submit(job(tenant="large"))
    store.submit(job(tenant="small"))

    first = [taken(store) for _ in range(2)]

    assert "small" in first


def test_tenants_take_turns(store: JobStore) -> None:
    for tenant in ("a", "b", "c"):
        for _ in range(6):
            store.submit(job(tenant=tenant))

    turns = [taken(store) for _ in range(9)]

    assert Counter(turns) == {"a": 3, "b": 3, "c": 3}


def test_lease_time_is_charged(store: JobStore) -> None:
    """A tenant whose jobs take long has fewer of them started."""
    for tenant in ("long", "short"):
        for _ in range(10):
            store.submit(job(tenant=tenant))
    turns = []
    for _ in range(8):
        found = attempt(store)
        turns.append(found.accepted.tenant)
        if found.accepted.tenant == "long":
            time.sleep(0.2)
        store.finish(found, "succeeded")

    assert Counter(turns)["short"] >= 6


def test_lease_time_is_charged_while_a_job_runs(store: JobStore) -> None:
    for _ in range(2):
        store.submit(job())
    found = attempt(store)
    time.sleep(0.2)

    store.renew(found, {})

    assert (store.redis.zscore(f"kms:active:{BULK}", TENANT) or 0) > 0.15


def test_no_clock_makes_a_tenant_pay_for_more_than_an_hour_at_once(store: JobStore) -> None:
    for _ in range(2):
        store.submit(job())
    found = attempt(store)
    forge(store, found.accepted.job_id, paid_until=str(store.now() - 86_400))

    store.renew(found, {})

    assert (store.redis.zscore(f"kms:active:{BULK}", TENANT) or 0) == pytest.approx(3600, abs=10)


def test_lease_time_costs_nothing_while_no_job_waits(store: JobStore) -> None:
    """A tenant that used idle processes does not wait behind one that comes later."""
    store.submit(job(tenant="first"))
    found = attempt(store)
    forge(store, found.accepted.job_id, paid_until=str(store.now() - 1000))
    store.renew(found, {})

    for tenant in ("first", "later"):
        store.submit(job(tenant=tenant))

    assert {store.redis.zscore(f"kms:active:{BULK}", tenant) for tenant in ("first", "later")} == {0}


def test_tenants_whose_time_is_made_up_for_are_not_kept(store: JobStore) -> None:
    for _ in range(40):
        store.submit(job(tenant="busy"))
    for number in range(20):
        store.submit(job(tenant=f"once-{number}"))
        taken(store)
    while taken(store):
        pass

    assert store.redis.zcard(f"kms:spent:{BULK}") == 0


def test_a_tenant_that_was_idle_saves_no_time_up(store: JobStore) -> None:
    store.submit(job(tenant="idle"))
    store.finish(attempt(store), "succeeded")
    for _ in range(20):
        store.submit(job(tenant="busy"))
    for _ in range(10):
        store.finish(attempt(store), "succeeded")
    for _ in range(20):
        store.submit(job(tenant="idle"))

    turns = [taken(store) for _ in range(8)]

    assert Counter(turns) == {"busy": 4, "idle": 4}


def test_a_tenant_that_was_idle_begins_where_the_last_choice_was(store: JobStore) -> None:
    """Of five jobs, each claim costs 10 ms while others wait."""
    for _ in range(5):
        store.submit(job(tenant="busy"))
    for _ in range(5):
        attempt(store)

    store.submit(job(tenant="idle"))

    assert store.redis.zscore(f"kms:active:{BULK}", "idle") == pytest.approx(0.04)


def test_a_tenant_begins_where_the_least_active_one_is(store: JobStore) -> None:
    store.submit(job(tenant="busy"))
    store.redis.zadd(f"kms:active:{BULK}", {"busy": 500})

    store.submit(job(tenant="new"))

    assert store.redis.zscore(f"kms:active:{BULK}", "new") == 500


def test_a_tenant_that_submits_one_job_at_a_time_pays_for_each(store: JobStore) -> None:
    """Or it would be chosen before one whose jobs wait, again and again."""
    for _ in range(10):
        store.submit(job(tenant="many"))
    turns = []
    for _ in range(12):
        if not store.redis.exists(f"kms:sizes:{BULK}:always-one"):
            store.submit(job(tenant="always-one"))
        turns.append(taken(store))

    assert Counter(turns) == {"always-one": 6, "many": 6}


def test_a_capped_tenant_blocks_no_other_and_comes_back(core: Core) -> None:
    store = store_of(core, with_jobs(tenant_leases=1))
    for _ in range(3):
        store.submit(job(tenant="capped"))
    store.submit(job(tenant="other"))

    found = attempt(store)
    held = found if found.accepted.tenant == "capped" else attempt(store)

    assert {taken(store), taken(store), taken(store)} <= {"other", None}
    store.finish(held, "succeeded")
    assert taken(store) == "capped"


def test_a_capped_tenant_comes_back_when_its_lease_runs_out(core: Core) -> None:
    store = store_of(core, with_jobs(tenant_leases=1))
    for _ in range(2):
        store.submit(job())
    attempt(store)
    assert taken(store) is None
    lapse(store)

    assert store.reap_all(store.due()) == ["requeued"]

    assert taken(store) == TENANT


def test_a_commit_of_a_dead_worker_holds_up_no_other_queue_of_its_tenant(core: Core) -> None:
    store = store_of(core, with_jobs(tenant_leases=1))
    store.submit(job())
    other = store.submit(accepted())
    store.committing(attempt(store), COMMIT)
    assert store.next("w/1", FILES, (FILES,), woken=False) is None
    lapse(store)

    assert store.reap_all(store.due()) == ["committing"]

    found = store.next("w/1", FILES, (FILES,), woken=False)
    assert isinstance(found, Attempt)
    assert found.accepted.job_id == other.job_id


def test_large_jobs_leave_processes_to_others(core: Core) -> None:
    store = store_of(core, LONG, several=True)
    store.large_job_bytes = 1000
    for _ in range(2):
        store.submit(job(tenant="large", size_bytes=1000))
    assert taken(store, "w/1") == "large"

    assert taken(store, "w/2") is None
    store.submit(job(tenant="small", size_bytes=10))
    assert taken(store, "w/2") == "small"
    assert taken(store, "other/1") == "large", "the bound is for each worker"


def test_a_small_job_passes_a_large_one_of_its_tenant(core: Core) -> None:
    store = store_of(core, LONG, several=True)
    store.large_job_bytes = 1000
    for size in (1000, 1000, 10):
        store.submit(job(size_bytes=size))
    attempt(store, "w/1")

    assert attempt(store, "w/2").accepted.size_bytes == 10


# -- priority --------------------------------------------------------------------------------------------


def test_priority_goes_before_age(store: JobStore) -> None:
    for priority in ("low", "normal", "high"):
        store.submit(job(priority=priority))

    order = [attempt(store).accepted.priority for _ in range(3)]

    assert order == ["high", "normal", "low"]


@pytest.mark.parametrize(("waited_s", "first"), [(500, "high"), (700, "normal")], ids=str)
def test_waiting_raises_priority(store: JobStore, waited_s: float, first: Priority) -> None:
    store.submit(job(priority="normal", created_at=time.time() - waited_s))
    store.submit(job(priority="high"))

    assert attempt(store).accepted.priority == first


def test_jobs_of_the_queue_that_has_work_come_first(store: JobStore) -> None:
    store.submit(accepted(source="upload"))
    store.submit(job())

    found = store.next("w/1", FILES, QUEUES, woken=False)
    assert isinstance(found, Attempt)
    assert found.accepted.queue == FILES
    assert taken(store, queue=FILES) == TENANT, "then those of others that the worker serves"
    assert taken(store, queue=FILES) is None


def test_a_worker_takes_no_job_of_a_queue_that_it_does_not_serve(store: JobStore) -> None:
    store.submit(job())

    assert store.next("w/1", FILES, (FILES,), woken=False) is None


# -- what waits and what is due --------------------------------------------------------------------------


def test_a_deferred_job_is_ready_when_its_time_has_come(store: JobStore) -> None:
    store.submit(job())
    store.defer(attempt(store), 0.3, counts=False)
    assert taken(store) is None
    assert sum(depths(store).values()) == 0

    until(store.due, "the delay is over")
    assert store.reap_all(store.due()) == ["due"]

    assert taken(store) == TENANT


def test_a_ready_job_that_is_not_due_yet_waits_for_its_time(store: JobStore) -> None:
    """The clock of Redis went back since it was made ready."""
    found = store.submit(job())
    forge(store, found.job_id, not_before=str(time.time() + 0.3))
    assert taken(store) is None

    until(store.due, "its time has come")
    assert store.reap_all(store.due()) == ["due"]
    assert taken(store) == TENANT


def test_a_job_whose_lease_ran_out_is_ready_again(core: Core) -> None:
    store = store_of(core, LONG)
    claim = claimed(store, items=1, source="items")
    lapse(store)

    assert store.reap_all(store.due()) == ["requeued"]

    again = attempt(store)
    assert (again.accepted.job_id, again.fence) == (claim.accepted.job_id, claim.fence + 1)


def test_recovery_looks_at_no_job_that_waits(core: Core) -> None:
    """A thousand queued jobs are none of the reaper's: it looks at the one whose lease ran out."""
    store = store_of(core, LONG)
    claim = claimed(store, items=1, source="items")
    for _ in range(1000):
        store.submit(job())
    lapse(store)

    assert store.due() == [claim.accepted.job_id]


def test_a_queued_job_that_expires_is_ended_without_a_worker(store: JobStore) -> None:
    found = store.submit(job(expires_at=time.time() + 0.3))
    until(store.due, "it has expired")

    assert store.reap_all(store.due()) == ["expired"]

    ended = store.get(found.job_id, TENANT)
    assert (ended.state, ended.error, ended.fence) == ("failed", "expired", 1)
    assert store.next("w/1", BULK, QUEUES, woken=False) == found.job_id, "a worker tidies"
    assert taken(store) is None


def test_depth_and_age_are_of_ready_jobs(store: JobStore) -> None:
    for priority in ("low", "low", "high"):
        store.submit(job(priority=priority))
    attempt(store)

    assert depths(store)[BULK, "low"] == 2
    assert sum(depths(store).values()) == 2
    found = activity.survey_queues(store)
    assert found.jobs == {"queued": 2, "running": 1, "committing": 0}
    assert 0 <= found.oldest_queued_s < 60
    assert activity.survey_queues(store, "other").jobs == {"queued": 0, "running": 0, "committing": 0}


def test_a_list_by_state_finds_an_old_job_behind_many(store: JobStore) -> None:
    old = store.submit(job())
    store.finish(attempt(store), "failed", "nothing")
    for _ in range(300):
        store.submit(job())
    asked = Counter[str]()
    send = store.redis.execute_command

    def counting(*args: object, **named: object) -> object:
        asked["commands"] += 1
        return send(*args, **named)  # type: ignore[no-untyped-call]  # as redis-py has it

    store.redis.execute_command = counting  # type: ignore[method-assign]  # counts what is asked
    found, following = store.page(TENANT, state="failed", limit=50, before=None)

    assert ([each.job_id for each in found], following) == ([old.job_id], None)
    assert asked["commands"] < 5


def test_a_worker_that_asks_for_jobs_or_renews_is_not_idle(store: JobStore) -> None:
    """By this its watchdog goes."""
    assert math.isinf(store.idle_s("w"))
    assert taken(store) is None
    assert store.idle_s("w") < 60

    store.submit(job())
    claim = attempt(store)
    store.redis.delete("kms:busy:w")
    store.renew(claim, {})
    assert store.idle_s("w") < 60


# -- wake-ups --------------------------------------------------------------------------------------------


def test_no_more_wake_ups_than_idle_processes(store: JobStore, woken: list[str]) -> None:
    store.worker_seen("w", 2, QUEUES)

    for _ in range(10):
        store.submit(job())

    assert woken == [BULK, BULK]


def test_no_wake_up_where_no_worker_lives(store: JobStore, woken: list[str]) -> None:
    store.submit(job())
    assert woken == []

    store.worker_seen("w", 1, (FILES,))
    store.wake()
    assert woken == []

    store.worker_seen("w", 1, QUEUES)
    store.wake()
    assert woken == [BULK]


def test_a_worker_that_left_is_sent_no_wake_up(store: JobStore, woken: list[str]) -> None:
    store.worker_seen("w", 2, QUEUES)
    store.worker_left("w")

    store.submit(job())

    assert woken == []
    assert store.workers() == 0


def test_a_worker_that_died_is_sent_no_wake_up_and_takes_none_from_others(
    store: JobStore, woken: list[str]
) -> None:
    store.worker_seen("dead", 2, QUEUES)
    store.submit(job())
    taken(store, "dead/1", woken=True)
    store.redis.zadd("kms:workers", {"dead": store.now() - 6, "long ago": store.now() - 60})
    woken.clear()

    store.worker_seen("w", 1, QUEUES)
    for _ in range(3):
        store.submit(job())

    assert woken == [BULK]
    assert store.redis.zrange("kms:workers", 0, -1) == [b"dead", b"w"]
    assert store.workers() == 1


def test_a_busy_process_is_sent_no_wake_up(store: JobStore, woken: list[str]) -> None:
    store.worker_seen("w", 1, QUEUES)
    store.submit(job())
    taken(store, woken=True)

    store.submit(job())
    assert woken == [BULK]

    taken(store)
    assert taken(store) is None  # it is idle again
    store.submit(job())
    assert woken == [BULK, BULK]


def test_the_note_that_a_process_takes_jobs_lasts_as_long_as_its_lease(
    store: JobStore, woken: list[str]
) -> None:
    store.worker_seen("w", 1, QUEUES)
    store.submit(job())
    taken(store, woken=True)
    assert store.redis.zadd(f"kms:draining:{BULK}", {"w/1": store.now() - 1}, ch=True) == 1

    store.submit(job())

    assert woken == [BULK, BULK]


def test_a_worker_is_woken_from_when_it_takes_messages(store: JobStore, woken: list[str]) -> None:
    heartbeat = Heartbeat(store, "w")
    heartbeat.start()
    try:
        for _ in range(3):
            store.submit(job())
        assert store.workers() == 1
        assert woken == []

        heartbeat.serve()
        assert woken == [BULK, BULK]
    finally:
        heartbeat.stop()
        heartbeat.join()
    assert store.workers() == 0


def test_a_worker_is_woken_for_the_queues_that_its_settings_name(core: Core, woken: list[str]) -> None:
    store = store_of(core, with_jobs(queues=(BULK,)), woken)
    Heartbeat(store, "w").serve()

    store.submit(accepted())
    assert woken == []
    store.submit(job())
    assert woken == [BULK]


def test_no_wake_up_for_jobs_of_a_tenant_at_its_cap(core: Core, woken: list[str]) -> None:
    store = store_of(core, with_jobs(tenant_leases=1), woken)
    for _ in range(3):
        store.submit(job())
    running = attempt(store)
    assert taken(store) is None

    store.worker_seen("w", 1, QUEUES)
    store.wake()
    assert woken == []
    assert not store.has_ready(*QUEUES)  # or a watchdog would end the worker, which takes nothing

    store.finish(running, "failed", "expired")
    assert store.has_ready(BULK)
    assert not store.has_ready(FILES)
    store.wake()
    assert woken == [BULK]


def test_a_worker_that_serves_other_queues_is_counted_at_once(store: JobStore, woken: list[str]) -> None:
    store.worker_seen("w", 1, (FILES,))
    store.worker_seen("w", 1, QUEUES)

    store.submit(job())

    assert woken == [BULK]


def test_a_count_of_processes_that_others_wrote_is_taken_again(store: JobStore, woken: list[str]) -> None:
    store.worker_seen("w", 1, QUEUES)
    store.redis.set("kms:capacity:kms.bulk", 0)  # without an expiry
    store.worker_seen("w", 1, QUEUES)

    store.submit(job())

    assert woken == [BULK]


@pytest.mark.parametrize("how", ["forgotten", "silent"])
def test_a_worker_that_is_back_is_counted_at_once(store: JobStore, woken: list[str], how: str) -> None:
    store.worker_seen("w", 1, QUEUES)
    if how == "forgotten":  # as after a fail-over
        store.redis.delete("kms:workers", "kms:slots")
    else:
        store.redis.zadd("kms:workers", {"w": time.time() - 11})
    store.redis.delete("kms:capacity:kms.bulk")  # as after ten seconds
    store.worker_seen("w", 1, QUEUES, counts=False)

    store.submit(job())

    assert woken == [BULK]


def test_processes_of_a_killed_worker_are_counted_no_more(store: JobStore, woken: list[str]) -> None:
    store.worker_seen("killed", 4, QUEUES)
    heartbeat = Heartbeat(store, "w")
    heartbeat.serve()
    store.redis.zadd("kms:workers", {"killed": time.time() - 60})
    for _ in range(3):
        heartbeat.round()

    for _ in range(5):
        store.submit(job())

    assert woken == [BULK] * store.rules.concurrency
    assert store.workers() == 1


def test_a_lost_wake_up_is_sent_again(core: Core, store: JobStore, woken: list[str]) -> None:
    store.worker_seen("w", 1, QUEUES)
    waiting = store.submit(job()).job_id
    reaper = Reaper(store, core.worker_context.spool, "r")
    reaper.reap()
    assert woken == [BULK], "it may still come"
    (wake_up,) = cast("list[bytes]", store.redis.zrange("kms:wakes:kms.bulk", 0, -1))
    sent = store.redis.zscore("kms:waiting:kms.bulk:normal", waiting) or 0
    assert store.redis.zscore("kms:wakes:kms.bulk", wake_up) == pytest.approx(sent + 1, abs=1e-3)

    store.redis.delete("kms:wakes:kms.bulk")  # as after a second
    reaper.reap()

    assert woken == [BULK, BULK]


def test_a_worker_is_woken_to_end_a_job_whose_parts_have_ended(
    core: Core, store: JobStore, woken: list[str]
) -> None:
    """The worker that ended the last part was killed, and nothing else is to be done."""
    whole = claimed(store, items=1, source="items")
    part = accepted(items=1, source="items", parent=whole.accepted.job_id)
    store.split(whole, [part])
    last = store.claim(part.job_id, "w1")
    assert last
    store.finish(last, "succeeded")
    lapse(store)
    store.worker_seen("w", 1, QUEUES)

    Reaper(store, core.worker_context.spool, "r").reap()

    assert BULK in woken
    assert store.next("w/1", BULK, QUEUES, woken=True) == whole.accepted.job_id


def test_a_process_that_stops_hands_on(store: JobStore, woken: list[str]) -> None:
    store.worker_seen("w", 1, QUEUES)
    for _ in range(2):
        store.submit(job())
    taken(store, woken=True)

    store.drained("w/1", BULK, QUEUES)
    assert woken == [BULK, BULK]

    taken(store, woken=True)
    store.drained("w/1", BULK, QUEUES)
    assert woken == [BULK, BULK], "no job is ready"


def test_where_the_broker_is_the_same_redis_the_script_pushes(core: Core) -> None:
    found = core.worker_context.store
    store = JobStore(found.redis, found.record_key, None, LONG)
    store.worker_seen("w", 1, QUEUES)

    for _ in range(3):
        store.submit(job())

    pushed = store.redis.lrange("kms:kms.bulk", 0, -1)
    assert pushed == [redis_keys.encode_message(BULK)]
    assert json.loads(pushed[0])["body"] == "[[],{},null]", "no job is named"


def test_a_failed_wake_up_loses_no_job(core: Core) -> None:
    def broken(_queue: str) -> None:
        raise JobsUnavailable

    found = core.worker_context.store
    store = JobStore(found.redis, found.record_key, broken, LONG)
    store.worker_seen("w", 1, QUEUES)

    assert store.submit(job()).state == "queued"
    assert taken(store) == TENANT


# -- junk ------------------------------------------------------------------


@pytest.mark.parametrize("junk", ["no record", "a string", "ended", "another queue"])
def test_junk_among_ready_jobs_is_passed_over(store: JobStore, junk: str) -> None:
    good, wrong = store.submit(job(created_at=time.time() + 5)).job_id, new_id()
    if junk == "a string":
        store.redis.set(f"kms:job:{wrong}", "x")
    elif junk == "ended":
        wrong = store.submit(job()).job_id
        forge(store, wrong, state="succeeded")
    elif junk == "another queue":
        wrong = store.submit(job()).job_id
        forge(store, wrong, queue="kms.files", tenant="theirs", state="failed")
    store.redis.zadd(f"kms:ready:kms.bulk:{TENANT}:small", {wrong: 1})

    assert attempt(store).accepted.job_id == good
    assert taken(store) is None


def test_each_script_tells_its_cost() -> None:
    assert len(SCRIPTS) > 15
    for text in SCRIPTS.values():
        assert text.startswith("#!lua")
        assert "O(" in text
