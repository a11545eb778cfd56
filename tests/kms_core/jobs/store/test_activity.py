"""Workers, queues and the jobs of the last hours, as the pages are told of them."""

import time
from pathlib import Path
from typing import Any, cast

import pytest

from kms_core.jobs.spec import BULK, FILES, QUEUES
from kms_core.jobs.store import activity
from kms_core.jobs.store.activity import QueueActivity, WorkerActivity
from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import JobState
from support.job_stores import TENANT, accepted, alone, claimed, commands, forge, take

HOUR_S = 3600


def only_worker(store: JobStore) -> WorkerActivity:
    (found,) = activity.read(store).workers
    return found


def queue(store: JobStore, name: str) -> QueueActivity:
    return {each.name: each for each in activity.read(store).queues}[name]


def test_worker_is_told_with_version_slots_and_the_jobs_that_it_runs(store: JobStore) -> None:
    store.worker_seen("host:aa", 4, QUEUES, "9.9.1 1700000000")
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
    store.worker_seen("host:aa", 2, queues)  # as a worker of 0.1 does

    found = only_worker(store)
    assert (found.state, found.version, found.started) == (state, "", 0)


def test_killed_worker_is_not_seen_and_serves_no_queue(store: JobStore) -> None:
    store.worker_seen("host:aa", 4, QUEUES)
    assert not queue(store, FILES).is_unserved
    store.submit(accepted())
    store.redis.zadd("kms:workers", {"host:aa": time.time() - 60})

    found = only_worker(store)
    assert found.state == "not seen"
    assert found.silent_s == pytest.approx(60, abs=5)
    assert queue(store, FILES).is_unserved
    assert (queue(store, FILES).count, queue(store, FILES).processes) == (1, 0)


def test_worker_that_was_told_to_stop_is_told_until_its_jobs_end(store: JobStore) -> None:
    store.worker_seen("host:aa", 4, QUEUES)
    claim = claimed(store, "host:aa/71")
    store.worker_left("host:aa")
    assert (only_worker(store).state, only_worker(store).jobs) == ("stopping", (claim.accepted.job_id,))

    store.finish(claim, "succeeded")
    assert activity.read(store).workers == []
    assert activity.read(store).results == 1


def test_processes_that_hang_and_what_a_worker_leaves_alone_are_told(store: JobStore) -> None:
    store.worker_seen("host:aa", 4, QUEUES)
    store.stuck("host:aa", 2, 600, ["root:/srv/archive"])

    assert (only_worker(store).stuck, only_worker(store).left_alone) == (2, ("root:/srv/archive",))


def test_part_counts_for_its_whole_and_a_whole_uses_no_slot(store: JobStore) -> None:
    store.worker_seen("host:aa", 4, QUEUES)
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


# -- the last hours ----------------------------------------------------------------------------------------


def submitted(store: JobStore, hours_ago: float, **changes: object) -> str:
    """A job of that age, at the middle of an hour."""
    at = time.time() // HOUR_S * HOUR_S + HOUR_S / 2 - hours_ago * HOUR_S
    return store.submit(accepted(created_at=at, expires_at=time.time() + HOUR_S, **changes)).job_id


def ended(store: JobStore, job_id: str, state: JobState = "succeeded", code: str = "") -> None:
    store.finish(take(store, job_id), state, code)


def test_job_counts_in_the_interval_of_its_submission_and_by_its_state(store: JobStore) -> None:
    ended(store, submitted(store, 5), "failed", "decrypt_failed")
    ended(store, submitted(store, 5))
    ended(store, submitted(store, 3), "failed", "decrypt_failed")
    store.cancel(submitted(store, 2), TENANT)
    submitted(store, 1)
    submitted(store, 1, tenant="another")
    submitted(store, 30)  # too old

    found = activity.intervals(store, TENANT, HOUR_S, 6)
    told = [{state: count for state, count in each.counts.items() if count} for each in found]
    assert told == [{"failed": 1, "succeeded": 1}, {}, {"failed": 1}, {"cancelled": 1}, {"queued": 1}, {}]
    assert [each.start for each in found] == [found[0].start + HOUR_S * number for number in range(6)]
    assert found[-1].start <= time.time() < found[-1].start + HOUR_S


def test_durations_are_means_of_the_newest_five_that_succeeded(store: JobStore) -> None:
    for number in range(7):  # the two oldest took an hour
        job_id = submitted(store, 2 - number / 1000)
        ended(store, job_id)
        at = float(store.redis.hget(f"kms:job:{job_id}", "created_at") or 0)
        waited_s, ran_s = (2, 8) if number >= 2 else (HOUR_S, HOUR_S)
        forge(store, job_id, started_at=str(at + waited_s), ended_at=str(at + waited_s + ran_s))

    first, *_, last = activity.intervals(store, TENANT, HOUR_S, 3)
    assert first.waited_s == pytest.approx(2)
    assert first.ran_s == pytest.approx(8)
    assert (last.waited_s, last.ran_s) == (None, None)


def test_failed_jobs_of_a_tenant_are_counted_up_to_a_bound_of_all_tenants(store: JobStore) -> None:
    since = time.time() - HOUR_S
    ended(store, submitted(store, 0), "failed", "decrypt_failed")
    (told,) = activity.by_tenant(store, since)
    assert (told.failed, told.unseen) == (1, 0)

    pipeline = store.redis.pipeline()
    for number in range(2_002):
        pipeline.hset(f"kms:job:{number}", mapping={"ended_at": since + 60, "error": "path_refused"})
        pipeline.zadd(f"kms:state:{TENANT}:failed", {str(number): since})
    pipeline.execute()
    (told,) = activity.by_tenant(store, since)
    assert (told.failed, told.unseen) == (2_000, 3)
    assert told.causes == {"decrypt_failed": 1, "path_refused": 1_999}
    (told,) = activity.by_tenant(store, since + 120)
    assert (told.failed, told.unseen) == (1, 0), "older ones ended before, too"


def test_ten_times_as_many_jobs_cost_no_more_reads(store: JobStore, tmp_path: Path) -> None:
    costs, count = [], 0
    with alone(store, tmp_path / "own") as own:
        for many in (10, 100):
            while count < many:
                ended(own, submitted(own, 1))
                count += 1
            before = commands(own)
            activity.intervals(own, TENANT, HOUR_S, 24)
            activity.read(own)
            costs.append(commands(own) - before)

    assert costs[0] == costs[1]


# -- operations --------------------------------------------------------------------------------------------

MINUTE_S = 60


def point(store: JobStore, minute: float, succeeded: object, failed: object, **more: object) -> None:
    """A point in this minute after the start of the hour two hours ago."""
    at = time.time() // HOUR_S * HOUR_S - 2 * HOUR_S + minute * MINUTE_S
    fields: dict[Any, Any] = {"succeeded": succeeded, "failed": failed, **more}
    store.redis.xadd("kms:operations", fields, id=f"{at * 1000:.0f}-0")


def told(store: JobStore) -> list[tuple[int, int]]:
    """Operations that succeeded and failed in each of the last three hours."""
    return [(each.succeeded, each.failed) for each in activity.operations(store, HOUR_S, 3)]


def test_operations_of_an_hour_are_the_difference_of_its_points_and_missing_ones_lose_nothing(
    store: JobStore,
) -> None:
    assert told(store) == [(0, 0)] * 3
    point(store, -90, 900, 9)  # too old
    point(store, -1, 1_000, 10)
    point(store, 0, 1_005, 10)
    point(store, 1, 1_010, 11)
    point(store, 59, 1_400, 11)  # an hour without Redis
    point(store, 119, 1_500, 21)
    point(store, 120, 1_507, 21)

    assert told(store) == [(400, 1), (100, 10), (7, 0)]


def test_sums_that_begin_again_count_from_zero(store: JobStore) -> None:
    for minute, succeeded, failed in ((1, 1_000, 10), (2, 30, 4), (3, 50, 4)):
        point(store, minute, succeeded, failed)

    assert told(store) == [(50, 4), (0, 0), (0, 0)]


def test_points_are_the_sums_of_all_operations_and_those_of_a_day_are_kept(store: JobStore) -> None:
    for name, count in (
        ("operations encrypt ok", 5),
        ("operations decrypt ok", 2),
        ("operations decrypt forbidden", 3),
        ("tenant default encrypt ok", 5),
        ("messages default 1 age", 5),
    ):
        store.redis.hset("kms:tally", name, str(count))
    for _ in range(1_442):
        activity.add_point(store)

    assert store.redis.xlen("kms:operations") == 1_440
    ((_, newest),) = cast("list[tuple[bytes, object]]", store.redis.xrevrange("kms:operations", count=1))
    assert newest == {b"succeeded": b"7", b"failed": b"3"}


@pytest.mark.parametrize(
    "fields",
    [("many", "1", {}), ("-1", "1", {}), ("1" * 16, "1", {}), ("1", "", {}), ("1", "1", {"more": "1"})],
)
def test_a_point_that_no_worker_wrote_is_left_out(
    store: JobStore, fields: tuple[str, str, dict[str, str]]
) -> None:
    succeeded, failed, more = fields
    point(store, 1, 5, 1)
    point(store, 2, succeeded, failed, **more)
    point(store, 3, 7, 1)

    assert told(store) == [(2, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize(
    "junk",
    [b"\xff\x00", b"many words of junk", b"-1", b"1e999", b"9" * 400, b"nan", b""],
    ids=["bytes", "words", "negative", "infinite", "digits", "nan", "empty"],
)
def test_what_no_process_wrote_is_left_out_or_unknown(store: JobStore, junk: bytes) -> None:
    now, redis = time.time(), store.redis
    store.worker_seen("host:aa", 4, QUEUES)
    claim = claimed(store, "host:aa/71")
    for key in ("slots", "stuck"):
        redis.hset(f"kms:{key}", "host:aa", junk)
    redis.hset("kms:tally", mapping={junk: junk, "operations encrypt ok": "3"})
    redis.hset(f"kms:spooled:{TENANT}", "sum", cast("Any", junk))
    redis.sadd("kms:tenants", junk)
    for key in ("leased", "workers", f"dead:{TENANT}", f"tenant:{TENANT}", f"state:{TENANT}:succeeded"):
        redis.zadd(f"kms:{key}", {junk: now + 60})
    redis.zadd("kms:ended", {junk: "inf"})

    found = activity.read(store)
    (known,) = [each for each in found.workers if each.name == "host:aa"]
    assert (known.processes, known.stuck, known.started) == (0, 0, 0)
    assert (known.jobs, found.expires) == ((claim.accepted.job_id,), 0)
    assert activity.shared_usage(redis)["operations encrypt ok"] == 3
    stats = activity.survey_queues(store)
    assert (stats.stuck, stats.spooled[TENANT], store.spooled_bytes(TENANT)) == (0, 0, 0)
    assert sum(each.counts["succeeded"] for each in activity.intervals(store, TENANT, HOUR_S, 3)) <= 1
    jobs, _ = store.page(TENANT, state=None, limit=9, before=None)
    assert [job.job_id for job in jobs] == [claim.accepted.job_id]
    assert store.dead(TENANT, 9) == []
