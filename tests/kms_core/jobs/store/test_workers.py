"""Workers and queues, as the pages are told of them."""

import time
from typing import Any, cast

import pytest

from kms_core.jobs.spec import BULK, FILES, QUEUES
from kms_core.jobs.store import charts, gauges, usage, workers
from kms_core.jobs.store.heartbeats import processes_stuck, worker_left, worker_seen
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.store.workers import QueueActivity, WorkerActivity
from support.job_stores import TENANT, accepted, claimed, forge

HOUR_S = 3600


def only_worker(store: JobStore) -> WorkerActivity:
    (found,) = workers.read(store).workers
    return found


def queue(store: JobStore, name: str) -> QueueActivity:
    return {each.name: each for each in workers.read(store).queues}[name]


def test_worker_is_told_with_version_slots_and_the_jobs_that_it_runs(store: JobStore) -> None:
    worker_seen(store, "host:aa", 4, QUEUES, "9.9.1 1700000000")
    claim = claimed(store, "host:aa/71")

    found = only_worker(store)
    assert (found.name, found.state, found.processes, found.version) == ("host:aa", "working", 4, "9.9.1")
    assert (found.started, set(found.queues)) == (1_700_000_000, set(QUEUES))
    assert found.jobs == (claim.accepted.job_id,)
    assert (queue(store, FILES).running, queue(store, FILES).processes) == (1, 4)
    assert (queue(store, BULK).running, queue(store, BULK).processes) == (0, 4)


@pytest.mark.parametrize(("queues", "state"), [((), "starting"), ((BULK,), "idle")])
def test_worker_without_jobs_is_starting_until_it_serves_queues(
    store: JobStore, queues: tuple[str, ...], state: str
) -> None:
    worker_seen(store, "host:aa", 2, queues)  # as a worker of 0.1 does

    found = only_worker(store)
    assert (found.state, found.version, found.started) == (state, "", 0)


def test_killed_worker_is_not_seen_and_serves_no_queue(store: JobStore) -> None:
    worker_seen(store, "host:aa", 4, QUEUES)
    assert not queue(store, FILES).is_unserved
    store.submit(accepted())
    store.redis.zadd("kms:workers", {"host:aa": time.time() - 60})

    found = only_worker(store)
    assert found.state == "not seen"
    assert found.silent_s == pytest.approx(60, abs=5)
    assert queue(store, FILES).is_unserved
    assert (queue(store, FILES).count, queue(store, FILES).processes) == (1, 0)


def test_worker_that_was_told_to_stop_is_told_until_its_jobs_end(store: JobStore) -> None:
    worker_seen(store, "host:aa", 4, QUEUES)
    claim = claimed(store, "host:aa/71")
    worker_left(store, "host:aa")
    assert (only_worker(store).state, only_worker(store).jobs) == ("stopping", (claim.accepted.job_id,))

    store.finish(claim, "succeeded")
    assert workers.read(store).workers == []
    assert workers.read(store).results == 1


def test_processes_that_hang_and_what_a_worker_leaves_alone_are_told(store: JobStore) -> None:
    worker_seen(store, "host:aa", 4, QUEUES)
    processes_stuck(store, "host:aa", 2, 600, ["root:/srv/archive"])

    assert (only_worker(store).stuck, only_worker(store).left_alone) == (2, ("root:/srv/archive",))


def test_part_counts_for_its_whole_and_a_whole_uses_no_slot(store: JobStore) -> None:
    worker_seen(store, "host:aa", 4, QUEUES)
    whole, part = claimed(store, "host:aa/71"), claimed(store, "host:aa/72")
    forge(store, whole.accepted.job_id, parts="1")
    forge(store, part.accepted.job_id, parent=whole.accepted.job_id)

    assert only_worker(store).jobs == (whole.accepted.job_id,)


def test_waiting_jobs_are_told_by_priority_with_the_age_of_the_oldest(store: JobStore) -> None:
    old, _ = store.submit(accepted(priority="high")), store.submit(accepted(priority="low"))
    store.redis.zadd(f"kms:waiting:{FILES}:high", {old.job_id: time.time() - 900})

    found = queue(store, FILES)
    counts = {priority: count for priority, (count, _) in found.waiting.items()}
    assert counts == {"high": 1, "normal": 0, "low": 1}
    assert found.oldest_s == pytest.approx(900, abs=5)


@pytest.mark.parametrize(
    "junk",
    [b"\xff\x00", b"many words of junk", b"-1", b"1e999", b"9" * 400, b"nan", b""],
    ids=["bytes", "words", "negative", "infinite", "digits", "nan", "empty"],
)
def test_what_no_process_wrote_is_left_out_or_unknown(store: JobStore, junk: bytes) -> None:
    now, redis = time.time(), store.redis
    worker_seen(store, "host:aa", 4, QUEUES)
    claim = claimed(store, "host:aa/71")
    for key in ("slots", "stuck"):
        redis.hset(f"kms:{key}", "host:aa", junk)
    redis.hset("kms:tally", mapping={junk: junk, "operations encrypt ok": "3"})
    redis.hset(f"kms:spooled:{TENANT}", "sum", cast("Any", junk))
    redis.sadd("kms:tenants", junk)
    for key in ("leased", "workers", f"dead:{TENANT}", f"tenant:{TENANT}", f"state:{TENANT}:succeeded"):
        redis.zadd(f"kms:{key}", {junk: now + 60})
    redis.zadd("kms:ended", {junk: "inf"})

    found = workers.read(store)
    (known,) = [each for each in found.workers if each.name == "host:aa"]
    assert (known.processes, known.stuck, known.started) == (0, 0, 0)
    assert (known.jobs, found.expires) == ((claim.accepted.job_id,), 0)
    assert usage.shared_usage(redis)["operations encrypt ok"] == 3
    stats = gauges.survey_queues(store)
    assert (stats.stuck, stats.spooled[TENANT], store.spooled_bytes(TENANT)) == (0, 0, 0)
    assert sum(each.counts["succeeded"] for each in charts.intervals(store, TENANT, HOUR_S, 3)) <= 1
    jobs, _ = store.page(TENANT, state=None, limit=9, before=None)
    assert [job.job_id for job in jobs] == [claim.accepted.job_id]
    assert store.dead(TENANT, 9) == []
