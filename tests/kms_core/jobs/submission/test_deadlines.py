"""Deadlines of a job: what a submission asks for, what holds until its end, when its result goes."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
import pytest

from kms_core.container import Core
from kms_core.jobs.execution.lease import Lease
from kms_core.jobs.model import Checkpoint, Job, LeaseLost, part_id
from kms_core.jobs.recovery.reaper import due, reap_all
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import deadlines
from kms_protocol.errors import InvalidDeadline, JobExpired
from kms_protocol.wire import JobIn, JobItem
from support.core_jobs import WHO
from support.job_options import job_options
from support.job_stores import COMMIT, LASTING_LEASES, TENANT, accepted, attempt, expire_leases, record
from support.waiting import monotonic_ahead, until

NOW: Final = 1_900_000_000.0
DAY: Final = 86_400
KEEP_S: Final = 7_200


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(NOW + seconds, UTC)


def job_in(**asked: Any) -> JobIn:  # noqa: ANN401 -- fields of it
    return JobIn(kind="encrypt", **asked)


def fields(start_by: float, run_by: float, keep_for_s: float) -> dict[str, float]:
    return {
        "start_by": NOW + start_by,
        "run_by": NOW + run_by,
        "keep_for_s": keep_for_s,
        "expires_at": NOW + run_by + keep_for_s,
    }


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, fields(DAY, DAY, KEEP_S)),
        ({"start_by": at(60)}, fields(60, DAY, KEEP_S)),
        ({"start_by": at(2 * DAY)}, fields(2 * DAY, 2 * DAY, KEEP_S)),
        ({"run_by": at(60)}, fields(60, 60, KEEP_S)),
        ({"run_by": at(2 * DAY)}, fields(DAY, 2 * DAY, KEEP_S)),
        ({"start_by": at(10), "run_by": at(20), "keep_for": 60}, fields(10, 20, 60)),
        ({"keep_for": 60}, fields(DAY, DAY, 60)),
        # the term of old clients is all three
        ({"ttl_s": 60}, {"start_by": NOW + 60, "run_by": NOW + 60, "expires_at": NOW + 60}),
    ],
    ids=str,
)
def test_what_is_not_asked_for_has_a_default(asked: dict[str, Any], found: dict[str, float]) -> None:
    assert deadlines(job_in(**asked), NOW, KEEP_S) == found


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"start_by": at(-1)}, "start_by is in the past"),
        ({"run_by": at(0)}, "run_by is in the past"),
        ({"start_by": at(20), "run_by": at(10)}, "run_by is before start_by"),
        ({"run_by": at(31 * DAY)}, "name an earlier one"),
        ({"start_by": at(31 * DAY)}, "name an earlier one"),
        ({"keep_for": 30 * DAY + 1}, "name a shorter time"),
        ({"ttl_s": 60, "keep_for": 60}, "ttl_s stands for"),
        ({"ttl_s": 60, "run_by": at(60)}, "ttl_s stands for"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_wrong_deadlines_are_refused_and_nothing_is_stored(
    core: Core, asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidDeadline, match=told):
        deadlines(job_in(**asked), NOW, KEEP_S)

    past = datetime.now(UTC) - timedelta(seconds=5)
    with pytest.raises(InvalidDeadline):
        submitted(core, past)
    assert list(core.worker_context.spool.folders(0)) == []
    assert core.worker_context.store.page("default", state=None, limit=5, before=None) == ([], None)


# -- while a job waits and runs --------------------------------------------------------------------------


def submitted(core: Core, run_by: datetime) -> Job:
    terms = job_options(WHO, "encrypt", "a=1", run_by=run_by)
    return core.submitter.items(terms, [JobItem(plaintext=b"x")])


def job(store: JobStore, **times: float) -> str:
    now = time.time()
    terms = {"start_by": now + 600, "run_by": now + 600, "keep_for_s": 60.0}
    terms |= {name: now + value if name.endswith("_by") else value for name, value in times.items()}
    found = accepted(items=1, source="items", expires_at=terms["run_by"] + terms["keep_for_s"], **terms)
    return store.submit(found).job_id


def over(store: JobStore, time_of_redis: float) -> None:
    until(lambda: store.ask_clock() > time_of_redis, "a deadline, by the clock of Redis")


def ended(store: JobStore, job_id: str) -> tuple[str, str]:
    found = store.get(job_id, TENANT)
    return found.state, found.error


@pytest.mark.parametrize(
    ("times", "is_given_back", "code"),
    [
        ({"start_by": 0.3}, False, "not_started"),
        ({"start_by": 0.3, "run_by": 0.3}, False, "expired"),
        ({"run_by": 0.6}, True, "expired"),
    ],
    ids=["not started", "expired", "given back for long"],
)
def test_a_job_whose_time_is_over_ends_without_a_worker(
    store: JobStore, times: dict[str, float], code: str, *, is_given_back: bool
) -> None:
    """A worker tidies."""
    job_id = job(store, **times)
    if is_given_back:
        store.defer(attempt(store), 600)

    until(lambda: due(store), "its time is over")
    assert reap_all(store, due(store)) == ["expired"]

    assert ended(store, job_id) == ("failed", code)
    assert store.get(job_id, TENANT).fence == 1 + is_given_back
    assert store.next("w/1", QUEUES, woken=False) == job_id
    assert store.next("w/1", QUEUES, woken=False) is None


def test_a_worker_starts_no_job_late(store: JobStore) -> None:
    job_id = job(store, start_by=-1)

    assert store.next("w/1", QUEUES, woken=False) == job_id
    assert ended(store, job_id) == ("failed", "not_started")


def test_a_job_that_has_started_may_go_on(store: JobStore) -> None:
    job_id = job(store, start_by=0.3)
    first = attempt(store)
    started_at = store.get(job_id, TENANT).started_at
    over(store, store.accepted(job_id).start_by)
    assert due(store) == []
    store.defer(first, 0)

    assert due(store) == []
    store.finish(attempt(store), "succeeded")
    assert ended(store, job_id) == ("succeeded", "")
    assert store.get(job_id, TENANT).started_at == started_at > 0


def test_a_running_job_hears_that_its_time_is_over(store: JobStore) -> None:
    job(store, run_by=0.4)
    claim = attempt(store)
    with Lease(store, claim) as lease, pytest.raises(JobExpired):
        until(lease.check, "the lease tells")


def test_a_job_whose_worker_hears_nothing_ends_all_the_same(store: JobStore) -> None:
    """Its lease of 600 s is over three seconds after ``run_by``."""
    job_id = job(store, run_by=0.2)
    claim = attempt(store)

    until(lambda: due(store), "its time is over")

    assert reap_all(store, due(store)) == ["expired"]
    assert ended(store, job_id) == ("failed", "expired")
    with pytest.raises(LeaseLost):
        store.finish(claim, "succeeded")


def test_a_commit_that_was_recorded_in_time_is_finished_under_a_whole_lease(store: JobStore) -> None:
    job_id = job(store, run_by=1)
    store.committing(attempt(store), COMMIT)
    over(store, store.accepted(job_id).run_by)
    expire_leases(store)

    again = store.claim(job_id, "w/2")

    assert again
    assert again.commit == COMMIT
    assert float(record(store, job_id)[b"lease_until"]) == pytest.approx(time.time() + 600, abs=60)


def test_a_part_that_no_worker_takes_ends_with_its_time(store: JobStore) -> None:
    whole = job(store, run_by=1)
    claim = attempt(store)
    part = msgspec.structs.replace(claim.accepted, job_id=part_id(whole, 0), parent=whole)
    store.split(claim, [part])

    until(lambda: part.job_id in due(store), "its time is over")

    assert reap_all(store, [part.job_id]) == ["expired"]
    assert store.part(part.job_id).job.error == "expired"


# -- afterwards ------------------------------------------------------------------------------------------


def test_a_result_is_kept_from_the_end_on(store: JobStore) -> None:
    job_id = job(store, keep_for_s=60)
    store.finish(attempt(store), "succeeded")

    found = store.get(job_id, TENANT)

    assert found.expires_at == pytest.approx(time.time() + 60, abs=5)
    assert found.end
    assert found.end.kept_until == pytest.approx(found.expires_at + LASTING_LEASES.jobs.result_ttl_s, abs=5)
    assert store.redis.zscore("kms:ended", job_id) == pytest.approx(found.expires_at, abs=1)
    assert store.redis.ttl(f"kms:job:{job_id}") == pytest.approx(60 + LASTING_LEASES.jobs.result_ttl_s, abs=5)


def test_a_job_of_an_old_client_is_kept_from_its_submission_on(store: JobStore) -> None:
    spec = accepted(items=1, source="items")
    job_id = store.submit(spec).job_id
    store.finish(attempt(store), "succeeded")

    assert store.get(job_id, TENANT).expires_at == spec.expires_at
    assert store.redis.zscore("kms:ended", job_id) == pytest.approx(spec.expires_at, abs=1)


def test_the_end_of_a_job_cannot_be_forged_to_keep_it(store: JobStore) -> None:
    job_id = job(store, keep_for_s=60)
    store.finish(attempt(store), "succeeded")
    store.redis.hset(f"kms:job:{job_id}", mapping={"ended_at": time.time() + 1e6, "expires_at": 1e10})

    assert store.get(job_id, TENANT).expires_at <= time.time() + 661


def test_a_repeated_submission_finds_a_job_whose_run_by_is_over(core: Core) -> None:
    store = core.worker_context.store
    spec = msgspec.structs.replace(
        accepted(items=1, source="items"), run_by=time.time() - 100, start_by=time.time() - 100
    )
    job_id = store.submit(spec, idempotency="a key").job_id

    again = store.submit(msgspec.structs.replace(spec, job_id=accepted().job_id), idempotency="a key")

    assert again.job_id == job_id


def test_a_record_of_an_old_version_has_one_term(store: JobStore) -> None:
    job_id = job(store)
    for name in ("start_by", "run_by", "keep_for", "started_at"):
        store.redis.hdel(f"kms:job:{job_id}", name)
    store.redis.hset(f"kms:job:{job_id}", "expires_at", time.time() - 1)

    assert store.next("w/1", QUEUES, woken=False) == job_id
    assert record(store, job_id)[b"error"] == b"expired"


# -- clocks that are wrong -------------------------------------------------------------------------------


def test_a_worker_whose_clock_is_a_day_behind_puts_nothing_in_place_late(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job(store, run_by=0.3)
    last = job(store, run_by=0.3)
    claim, part = attempt(store), attempt(store)
    monkeypatch.setattr(time, "time", lambda real=time.time: real() - 86_400)
    over(store, store.accepted(last).run_by)

    with pytest.raises(JobExpired):
        store.committing(claim, COMMIT)
    with pytest.raises(JobExpired):
        store.step(part, Checkpoint(words=("x",), outcomes=(0,)), {})


def test_a_worker_whose_clock_is_a_day_ahead_leaves_jobs_to_others(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = job(store)
    with monkeypatch.context() as wrong:
        wrong.setattr(time, "time", lambda real=time.time: real() + 86_400)
        assert store.next("w/1", QUEUES, woken=False) == job_id
        assert store.get(job_id, TENANT).state == "queued"
    store.redis.hset(f"kms:job:{job_id}", "not_before", 0)
    reap_all(store, [job_id])

    assert attempt(store).attempt == 1


def test_redis_is_asked_for_its_clock_every_ten_seconds(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.ask_clock()
    monkeypatch.setattr(store, "ask_clock", lambda: NOW)
    with monotonic_ahead(5):
        assert store.now() != NOW

    with monotonic_ahead(10):
        assert store.now() == NOW


def test_a_submission_goes_by_the_clock_of_redis(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    run_by = datetime.now(UTC) + timedelta(minutes=5)
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 86_400)

    assert submitted(core, run_by).state == "queued"
