"""Bounds of roots, buckets and backends, and roots that a worker leaves alone; over a real Valkey."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from kms_core.container import Core
from kms_core.jobs.model import Attempt, LeaseLost
from kms_core.jobs.recovery.reaper import due, reap_all
from kms_core.jobs.spec import BULK, FILES, QUEUES, JobSpec
from kms_core.jobs.store import gauges
from kms_core.jobs.store.heartbeats import processes_stuck, worker_left, worker_seen
from kms_core.jobs.store.store import JobStore
from support.job_stores import (
    COMMIT,
    TENANT,
    accepted,
    attempt,
    depths,
    events,
    expire_leases,
    next_attempt,
    store_of,
    with_jobs,
)
from support.service import Service, core_of
from support.waiting import until

NAS: Final = "root:/srv/nas"
DISK: Final = "root:/srv/disk"
BUCKET: Final = "bucket:archive"


def submit(store: JobStore, resources: Sequence[str], **changes: object) -> str:
    found: JobSpec = accepted(**{"items": 1, "source": "items", **changes})
    return store.submit(found, resources=resources).job_id


def taken(store: JobStore, worker: str = "w/1") -> str | None:
    found = next_attempt(store, worker)
    return found.accepted.job_id if found else None


@pytest.fixture
def one_at_a_time(core: Core) -> JobStore:
    """A store that gives out one job of the root at a time."""
    return store_of(core, with_jobs(resource_leases={NAS: 1}))


def test_a_full_resource_blocks_nothing_behind_it(one_at_a_time: JobStore) -> None:
    store = one_at_a_time
    nas = [submit(store, [NAS]) for _ in range(3)]
    others = [submit(store, [DISK]), submit(store, []), submit(store, [NAS], tenant="other")]

    assert [taken(store), taken(store), taken(store), taken(store)] == [nas[0], others[0], others[1], None]


def test_a_root_is_bounded_by_its_path_whatever_letters_that_has(tmp_path: Path, redis_url: str) -> None:
    root = tmp_path / "a: bé"
    root.mkdir()
    settings = f"[kms.jobs]\nroots = ['{root}']\nresource_leases = {{'root:{root}' = 1}}\n"
    context = core_of(Service(tmp_path, settings, redis_url)).worker_context

    assert context.places.resource(root.as_uri()) in context.store.resource_leases


def test_a_renewed_lease_counts_on_wherever_it_counts(core: Core) -> None:
    store = store_of(core, with_jobs(resource_leases={NAS: 1}), several_tenants=True)
    store.large_job_bytes = 1_000
    processes_stuck(store, "w", 0, -1, [NAS])  # what was left alone until now: one attempt is made
    job_id = submit(store, [NAS], size_bytes=1_000)
    held = store.next("w/1", QUEUES, woken=True)
    assert isinstance(held, Attempt)
    marks = {
        f"kms:running:{TENANT}": job_id,
        f"kms:used:{NAS}": job_id,
        "kms:probes:w": NAS,
        "kms:large:w": job_id,
        "kms:leased": job_id,
    }
    soon = store.now() + 1
    for key, member in marks.items():
        assert store.redis.zadd(key, {member: soon}, xx=True, ch=True) == 1, key

    store.renew(held, {})

    late = [key for key, member in marks.items() if (store.redis.zscore(key, member) or 0) < soon + 500]
    assert late == []


@pytest.mark.parametrize("end", ["finish", "kill"])
def test_it_is_chosen_again_when_a_lease_ends(one_at_a_time: JobStore, end: str) -> None:
    store = one_at_a_time
    first, second = (submit(store, [NAS], tenant=tenant) for tenant in ("a", "b"))
    held = attempt(store)
    assert taken(store) is None

    if end == "finish":
        store.finish(held, "succeeded")
        assert {held.accepted.job_id, taken(store)} == {first, second}
    else:
        expire_leases(store)
        reap_all(store, due(store))
        assert taken(store) in {first, second}


def test_a_job_holds_each_resource_that_it_uses(core: Core) -> None:
    store = store_of(core, with_jobs(resource_leases={BUCKET: 1, "backend:aws": 2}))
    submit(store, [NAS, BUCKET, "backend:aws"])
    submit(store, [NAS, BUCKET])
    last = submit(store, ["backend:aws"])
    attempt(store)

    assert [taken(store), taken(store)] == [last, None]
    assert gauges.survey_queues(store).leases == {BUCKET: 1, "backend:aws": 2}


def test_the_reaper_wakes_nobody_for_what_waits_for_a_bound(core: Core) -> None:
    woken: list[str] = []
    store = store_of(core, with_jobs(resource_leases={NAS: 1}), woken=woken)
    for _ in range(20):
        submit(store, [NAS])
    attempt(store)
    assert taken(store) is None
    woken.clear()

    store.wake()
    assert woken == []
    assert depths(store)[BULK, "normal"] == 19

    submit(store, [DISK])
    assert woken == [BULK]


def test_parts_use_what_their_job_uses(one_at_a_time: JobStore) -> None:
    store = one_at_a_time
    submit(store, [NAS], source="file:///srv/nas/*", items=0)
    whole = attempt(store, queue=FILES)
    parts = [
        accepted(parent=whole.accepted.job_id, source="file:///srv/nas/*", part=number, items=1)
        for number in range(2)
    ]

    store.split(whole, parts)

    assert attempt(store, queue=FILES).accepted.parent == whole.accepted.job_id
    assert next_attempt(store, queue=FILES) is None


@pytest.mark.parametrize("junk", ["", "x", "root:/srv/nas kms.bulk", "\x00 : "])
def test_junk_in_a_record_names_no_resource(one_at_a_time: JobStore, junk: str) -> None:
    store = one_at_a_time
    job_id = submit(store, [NAS])
    store.redis.hset(f"kms:job:{job_id}", "resources", junk)
    store.redis.sadd(f"kms:blocked:{NAS}", "junk", "a b", f"kms.bulk {TENANT} small")
    reap_all(store, [job_id])

    for _ in range(3):
        if found := next_attempt(store):
            store.finish(found, "succeeded")
    assert store.get(job_id, TENANT).state == "succeeded"


# -- attempts that advance nothing -----------------------------------------------------------------------


@pytest.fixture
def store(core: Core) -> JobStore:
    """A store that leaves what stalled alone for half a second."""
    return store_of(core, with_jobs(stall_s=0.5))


def test_a_stalled_attempt_loses_its_lease_and_its_root(store: JobStore) -> None:
    first, second, other = submit(store, [NAS]), submit(store, [NAS]), submit(store, [DISK])
    held = attempt(store)

    assert store.stalled(held) == [NAS]

    assert store.get(first, TENANT).state == "queued"
    assert store.get(first, TENANT).attempt == 1, "an attempt that hangs counts"
    with pytest.raises(LeaseLost):
        store.finish(held, "succeeded")
    assert [taken(store), taken(store)] == [other, None], "this worker leaves the root alone"
    assert {taken(store, "another/1"), taken(store, "another/1")} == {first, second}


def test_after_a_while_one_attempt_is_made(store: JobStore) -> None:
    for _ in range(4):
        submit(store, [NAS])
    store.stalled(attempt(store))
    found: list[Attempt] = []

    def tries() -> bool:
        again = next_attempt(store)
        found.extend([again] if again else [])
        return bool(again)

    until(tries, "it tries again")
    assert taken(store) is None, "one at a time"

    store.finish(found[0], "succeeded")
    assert taken(store)
    assert taken(store), "it works again"


def test_another_attempt_follows_one_that_failed_in_time(store: JobStore) -> None:
    processes_stuck(store, "w", 0, -1, [NAS])  # what was left alone until now
    for _ in range(2):
        submit(store, [NAS])
    held = attempt(store)
    assert taken(store) is None

    store.finish(held, "failed", "path_refused")

    assert taken(store)


def test_what_a_process_hangs_on_is_left_alone(store: JobStore) -> None:
    """Until its worker has left."""
    submit(store, [NAS])
    worker_seen(store, "w", 1, QUEUES)

    processes_stuck(store, "w", 1, 60, [NAS, BUCKET])

    assert taken(store) is None
    assert gauges.survey_queues(store).stuck == 1
    processes_stuck(store, "w", 0, 60, [])
    assert gauges.survey_queues(store).stuck == 0
    processes_stuck(store, "w", 2, 60, [])
    worker_left(store, "w")
    assert gauges.survey_queues(store).stuck == 0


def test_a_short_time_does_not_shorten_a_long_one(store: JobStore) -> None:
    for seconds in (600, 1):
        processes_stuck(store, "w", 1, seconds, [NAS])

    assert (store.redis.zscore("kms:stalls:w", NAS) or 0) > store.now() + 500


def test_a_stalled_attempt_of_a_job_that_is_to_be_cancelled_ends_it(store: JobStore) -> None:
    job_id = submit(store, [NAS])
    held = attempt(store)
    store.cancel(job_id, TENANT)

    store.stalled(held)

    assert store.get(job_id, TENANT).state == "cancelled"


def test_what_is_to_be_tidied_there_is_left_to_another_worker(store: JobStore) -> None:
    job_id = submit(store, [NAS])
    store.redis.zadd("kms:chores", {job_id: 1})
    processes_stuck(store, "w", 1, 60, [NAS])

    assert next_attempt(store) is None
    assert store.next("another/1", QUEUES, woken=False) == job_id


def test_what_is_to_be_tidied_there_hides_nothing_behind_it(store: JobStore) -> None:
    other, left = submit(store, []), [submit(store, [NAS]) for _ in range(20)]
    store.cancel(other, TENANT)
    store.redis.zadd("kms:chores", dict.fromkeys(left, 1.0) | {other: 2.0})
    processes_stuck(store, "w", 1, 60, [NAS])

    assert [store.next("w/1", QUEUES, woken=False) for _ in range(2)] == [None, other]


def test_a_commit_that_hangs_is_finished_by_another_worker(store: JobStore) -> None:
    job_id = submit(store, [NAS])
    held = attempt(store)
    store.committing(held, COMMIT)

    store.stalled(held)

    assert store.get(job_id, TENANT).state == "committing"
    assert events(store)[-1]["type"] == "kms.job.committing", "it is not queued again"
    assert attempt(store, "another/1").commit == COMMIT
