"""Jobs and operations of the last hours, as charts are drawn of them."""

import time
from pathlib import Path
from typing import Any, cast

import pytest

from kms_core.jobs.store import charts, tenants, workers
from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import JobState
from support.job_stores import TENANT, accepted, alone, commands, forge, take

HOUR_S = 3600
MINUTE_S = 60


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

    found = charts.intervals(store, TENANT, HOUR_S, 6)
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

    first, *_, last = charts.intervals(store, TENANT, HOUR_S, 3)
    assert first.waited_s == pytest.approx(2)
    assert first.ran_s == pytest.approx(8)
    assert (last.waited_s, last.ran_s) == (None, None)


def test_failed_jobs_of_a_tenant_are_counted_up_to_a_bound_of_all_tenants(store: JobStore) -> None:
    since = time.time() - HOUR_S
    ended(store, submitted(store, 0), "failed", "decrypt_failed")
    (told,) = tenants.by_tenant(store, since)
    assert (told.failed, told.unseen) == (1, 0)

    pipeline = store.redis.pipeline()
    for number in range(2_002):
        pipeline.hset(f"kms:job:{number}", mapping={"ended_at": since + 60, "error": "path_refused"})
        pipeline.zadd(f"kms:state:{TENANT}:failed", {str(number): since})
    pipeline.execute()
    (told,) = tenants.by_tenant(store, since)
    assert (told.failed, told.unseen) == (2_000, 3)
    assert told.causes == {"decrypt_failed": 1, "path_refused": 1_999}
    (told,) = tenants.by_tenant(store, since + 120)
    assert (told.failed, told.unseen) == (1, 0), "older ones ended before, too"


def test_ten_times_as_many_jobs_cost_no_more_reads(store: JobStore, tmp_path: Path) -> None:
    costs, count = [], 0
    with alone(store, tmp_path / "own") as own:
        for many in (10, 100):
            while count < many:
                ended(own, submitted(own, 1))
                count += 1
            before = commands(own)
            charts.intervals(own, TENANT, HOUR_S, 24)
            workers.read(own)
            costs.append(commands(own) - before)

    assert costs[0] == costs[1]


def point(store: JobStore, minute: float, succeeded: object, failed: object, **more: object) -> None:
    """A point in this minute after the start of the hour two hours ago."""
    at = time.time() // HOUR_S * HOUR_S - 2 * HOUR_S + minute * MINUTE_S
    fields: dict[Any, Any] = {"succeeded": succeeded, "failed": failed, **more}
    store.redis.xadd("kms:operations", fields, id=f"{at * 1000:.0f}-0")


def told(store: JobStore) -> list[tuple[int, int]]:
    """Operations that succeeded and failed in each of the last three hours."""
    return [(each.succeeded, each.failed) for each in charts.operations(store, HOUR_S, 3)]


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
        charts.add_point(store)

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
