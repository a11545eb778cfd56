"""Members and keys in Redis that would never end, which no script wrote: they hold up no job."""

from dataclasses import replace
from typing import Final

import pytest

from kms_core.container import Core
from kms_core.jobs.model import Attempt
from kms_core.jobs.recovery.reaper import TRIM_EVERY, Reaper
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.queue_stats import survey
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import RateLimited, RedisFull
from support.job_stores import LONG, TENANT, accepted, store_of

FAR: Final = 9e12
ENDS: Final = (FAR, -1.0)
QUEUE: Final = "kms.bulk"
ROOT: Final = "root:data"


def junk(store: JobStore, key: str, end: float, *names: str) -> None:
    store.redis.zadd(f"kms:{key}", dict.fromkeys(names, end))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("key", ["wakes", "draining"])
def test_a_process_that_others_call_busy_is_woken(core: Core, key: str, end: float) -> None:
    woken: list[str] = []
    store = store_of(core, LONG, woken)
    store.worker_seen("w1", 2, QUEUES)
    junk(store, f"{key}:{QUEUE}", end, "w1/1", "w1/2", "w1/3")
    store.redis.delete(f"kms:capacity:{QUEUE}")  # as after three seconds
    store.submit(accepted(items=1, starts=(0,)))

    store.worker_seen("w1", 2, QUEUES)
    store.wake(QUEUE)
    assert woken


def test_a_worker_that_others_made_is_sent_no_wake_ups(core: Core) -> None:
    woken: list[str] = []
    store = store_of(core, LONG, woken)
    store.redis.hset("kms:slots", "ghost", f"100000 {' '.join(QUEUES)}")
    junk(store, "workers", FAR, "ghost")
    store.worker_seen("w1", 1, QUEUES)
    for _ in range(5):
        store.submit(accepted())

    store.wake(*QUEUES)
    assert len(woken) == 1
    assert store.workers() == 1


def taken(store: JobStore) -> Attempt | None:
    found = store.next("w1/1", QUEUE, QUEUES, woken=False)
    return found if isinstance(found, Attempt) else None


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("key", [f"running:{TENANT}", f"used:{ROOT}", "large:w1"])
def test_a_lease_that_others_wrote_takes_no_place(core: Core, key: str, end: float) -> None:
    rules = replace(LONG, tenant_leases=1, resource_leases={ROOT: 1}, large_job_bytes=1)
    store = store_of(core, replace(rules, large_leases=1, has_several_tenants=lambda: True), [])
    junk(store, key, end, "junk")
    store.submit(accepted(size_bytes=5, kind="decrypt"), resources=[ROOT])

    assert taken(store)


@pytest.mark.parametrize("key", ["stalls:w1", "probes:w1"])
def test_a_root_that_others_call_stalled_is_used(core: Core, key: str) -> None:
    store = store_of(core, LONG, [])
    junk(store, key, FAR, ROOT)
    if key == "probes:w1":  # one that is over: an attempt at a time may be made
        junk(store, "stalls:w1", 1.0, ROOT)
    store.submit(accepted(), resources=[ROOT])

    assert taken(store)


def test_a_redis_that_others_call_full_is_not(core: Core) -> None:
    store = store_of(core, LONG, [])
    store.redis.set("kms:full", 1)
    store.ping()
    assert store.condition() == "available"

    store.redis.set("kms:full", 1, px=1000)  # as the script notes it
    with pytest.raises(RedisFull):
        store.ping()


@pytest.mark.parametrize("expiry_ms", [None, 10**9])
def test_memory_is_looked_at_whatever_others_call_looked_at(core: Core, expiry_ms: int | None) -> None:
    """Redis would be filled until it refuses every write; and small blobs would never rest in it."""
    store = store_of(core, LONG, [])
    for name in ("kms:probed", "kms:half"):
        store.redis.set(name, 1, px=expiry_ms)

    store.ping()
    assert 0 < store.redis.pttl("kms:probed") <= 500
    assert store.has_room


@pytest.mark.parametrize("key", ["open", f"open:{TENANT}"])
def test_open_jobs_that_do_not_exist_are_no_bound_for_others(core: Core, key: str) -> None:
    store = store_of(core, replace(LONG, open_jobs=10, tenant_open={TENANT: 10}), [])
    store.submit(accepted())
    reaper = Reaper(store, core.worker_context.spool, "me")
    reaper.reap()  # which looks at all after its start
    junk(store, key, FAR, *(f"junk{number}" for number in range(100)))
    with pytest.raises(RateLimited):
        store.submit(accepted())

    for _ in range(TRIM_EVERY + 1):
        reaper.reap()
    store.submit(accepted())


def test_open_jobs_that_do_not_exist_go_from_behind_others(core: Core) -> None:
    store = store_of(core, replace(LONG, open_jobs=300), [])
    reaper = Reaper(store, core.worker_context.spool, "me")
    for _ in range(100):
        store.submit(accepted())
    for _ in range(3):
        reaper.reap()
    junk(store, "open", FAR, *(f"junk{number}" for number in range(1000)))

    for _ in range(10 * TRIM_EVERY):
        reaper.reap()
        if store.redis.zcard("kms:open") < 300:
            break
    store.submit(accepted())


def test_a_quota_is_not_filled_before_the_first_job(core: Core) -> None:
    store = store_of(core, replace(LONG, tenant_open={TENANT: 10}), [])
    reaper = Reaper(store, core.worker_context.spool, "me")
    reaper.reap()
    junk(store, f"open:{TENANT}", FAR, *(f"junk{number}" for number in range(3000)))
    with pytest.raises(RateLimited):
        store.submit(accepted())

    for _ in range(TRIM_EVERY + 5):
        reaper.reap()
    store.submit(accepted())


@pytest.mark.parametrize("tenant", [TENANT, "nobody"])
def test_jobs_behind_one_that_does_not_exist_are_taken(core: Core, tenant: str) -> None:
    store = store_of(core, LONG, [])
    for queue in QUEUES:
        store.redis.sadd(f"kms:sizes:{queue}:{tenant}", f"small {ROOT}")
        junk(store, f"ready:{queue}:{tenant}:small {ROOT}", 1.0, "junk")
        junk(store, f"active:{queue}", -1.0, tenant)
    store.submit(accepted())

    assert taken(store)


def test_jobs_behind_many_that_do_not_exist_are_taken_without_a_pause(core: Core) -> None:
    """Each claim takes out a hundred, and the process comes again at once."""
    store = store_of(core, LONG, [])
    store.submit(accepted())
    junk(store, f"ready:{FILES}:{TENANT}:small", 1.0, *(f"junk{number}" for number in range(1000)))

    found: list[object] = [store.next("w1/1", QUEUE, QUEUES, woken=False) for _ in range(11)]
    assert None not in found
    assert isinstance(found[-1], Attempt)


def test_jobs_that_do_not_exist_want_no_hand(core: Core) -> None:
    store = store_of(core, LONG, [])
    junk(store, "chores", 1.0, *(f"junk{number}" for number in range(100)))
    store.submit(accepted())

    assert taken(store)


FILES: Final = "kms.files"
OTHER: Final = "other"


def lease_ends(store: JobStore, tenant: str, seconds: float) -> None:
    """Charge a tenant for a lease."""
    store.redis.zincrby(f"kms:active:{FILES}", seconds, tenant)


@pytest.mark.parametrize(("first", "end"), [(OTHER, FAR), (OTHER, float("inf")), (TENANT, -FAR)])
def test_a_tenant_waits_for_two_hours_of_leases_of_another_at_most(
    core: Core, first: str, end: float
) -> None:
    """Whatever virtual time others gave it: the far future, or the far past to that other."""
    store = store_of(core, LONG, [])
    for _ in range(3):
        store.submit(accepted())
        store.submit(accepted(tenant=OTHER))
    junk(store, f"active:{FILES}", end, TENANT)
    found = taken(store)
    assert found
    assert found.accepted.tenant == first

    lease_ends(store, first, 7300)
    found = taken(store)
    assert found
    assert found.accepted.tenant != first


def test_a_short_lease_is_charged_whatever_others_call_the_time(core: Core) -> None:
    store = store_of(core, LONG, [])
    store.redis.set(f"kms:floor:{FILES}", 9e15)
    for _ in range(3):
        store.submit(accepted())
    assert taken(store)
    before = store.redis.zscore(f"kms:active:{FILES}", TENANT)
    assert taken(store)
    after = store.redis.zscore(f"kms:active:{FILES}", TENANT)
    assert before is not None
    assert after is not None
    assert after > before


@pytest.mark.parametrize(("end", "lease_s"), [(1e12 - 10, 4000), (-9e15, 0.3)])
def test_tenants_take_turns_whatever_others_call_the_time(core: Core, end: float, lease_s: float) -> None:
    """At the end of time it begins again, and each lease counts."""
    store = store_of(core, LONG, [])
    for _ in range(8):
        store.submit(accepted())
        store.submit(accepted(tenant=OTHER))
    store.redis.set(f"kms:floor:{FILES}", end)
    junk(store, f"active:{FILES}", end, TENANT, OTHER)
    turns: list[str] = []
    for _ in range(16):
        found = taken(store)
        assert found
        turns.append(found.accepted.tenant)
        lease_ends(store, turns[-1], lease_s)

    assert set(turns[-2:]) == {TENANT, OTHER}


def test_processes_that_others_call_stuck_are_not(core: Core) -> None:
    store = store_of(core, LONG, [])
    store.worker_seen("w1", 1, QUEUES)
    store.stuck("w1", 1, 60, [])
    store.redis.hset("kms:stuck", "ghost", 5)
    store.redis.delete(f"kms:capacity:{QUEUE}")  # as after three seconds
    store.worker_seen("w1", 1, QUEUES)

    assert survey(store).stuck == 1


def test_names_that_no_tenant_has_leave_the_list_of_tenants(core: Core) -> None:
    store = store_of(core, LONG, [])
    reaper = Reaper(store, core.worker_context.spool, "me")
    store.submit(accepted())
    store.redis.sadd("kms:tenants", b"\xff", "nobody", "a\nb")
    for _ in range(2 * TRIM_EVERY + 1):
        reaper.reap()

    assert store.tenants() == [TENANT]
    assert store.redis.smembers("kms:tenants") == {TENANT.encode(), b"\xff"}


def test_a_tenant_without_jobs_is_taken_out_of_the_choice(core: Core) -> None:
    """Or the watchdog of each idle worker would take it for one that hears nothing."""
    woken: list[str] = []
    store = store_of(core, LONG, woken)
    store.worker_seen("w1", 1, QUEUES)
    junk(store, f"active:{QUEUE}", 1.0, "nobody")

    Reaper(store, core.worker_context.spool, "me").reap()
    assert woken == [QUEUE]
    assert taken(store) is None
    assert store.queues_to_serve() == set()
