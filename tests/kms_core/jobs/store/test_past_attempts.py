"""The attempts of a job before its last one: who made each, when, and how it ended."""

import os
from collections.abc import Sequence

import pytest

from kms_core.jobs.model import Attempt, Job, part_id
from kms_core.jobs.recovery.reaper import reap_all
from kms_core.jobs.spec import WorkResult
from kms_core.jobs.store.heartbeats import process_ended
from kms_core.jobs.store.store import JobStore
from support.job_stores import (
    COMMIT,
    TENANT,
    accepted,
    claimed,
    expire_leases,
    forge,
    record,
    take,
)

LINE = b'[1,"stalled","",1,1000.000,2000.000,"host-1:aa/7",0]'


def job_of(store: JobStore, claim: Attempt) -> Job:
    return store.get(claim.accepted.job_id, TENANT)


def told(store: JobStore, claim: Attempt) -> list[tuple[int, str, str, int, str]]:
    """What is told of the attempts before the last one, but for their times."""
    return [
        (each.number, each.how, each.cause, each.times, each.worker) for each in job_of(store, claim).past
    ]


def lose(store: JobStore, claim: Attempt) -> None:
    """Let the lease of an attempt run out, and the reaper see it."""
    expire_leases(store)
    assert reap_all(store, [claim.accepted.job_id]) == ["requeued"]


def test_each_attempt_is_told_with_its_process_its_times_and_its_end(store: JobStore) -> None:
    claim = claimed(store, "host-1:aa/7")
    job_id = claim.accepted.job_id
    store.defer(claim, 0, "backend_unavailable")

    claim = take(store, job_id, "host-2:bb/8")
    process_ended(store, "host-2:bb/8", -9)
    lose(store, claim)
    claim = take(store, job_id, "host-3:cc/9")
    process_ended(store, "host-3:cc/9", 1)
    lose(store, claim)
    claim = take(store, job_id, "host-4:dd/10")
    store.stalled(claim)
    assert job_of(store, claim).attempt_id == "", "none is at work"
    forge(store, job_id, attempt="1")  # or it would have had all
    claim = take(store, job_id, "host-5:ee/11")

    assert told(store, claim) == [
        (1, "deferred", "backend_unavailable", 1, "host-1:aa/7"),
        (1, "lease_lost", "signal_9", 1, "host-2:bb/8"),
        (2, "lease_lost", "status_1", 1, "host-3:cc/9"),
        (3, "stalled", "", 1, "host-4:dd/10"),
    ]
    job = job_of(store, claim)
    times = [at for each in job.past for at in (each.began_at, each.ended_at)]
    assert times == sorted(times)
    assert job.started_at - 0.001 <= times[0]
    assert times[-1] <= job.began_at + 0.001 <= store.ask_clock() + 0.001
    assert (job.worker, bool(job.attempt_id)) == ("host-5:ee/11", True)


@pytest.mark.parametrize(("seen_s", "cause"), [(1, ""), (10, "worker_gone")], ids=["alive", "gone"])
def test_a_lease_that_ran_out_tells_whether_its_worker_is_gone(
    store: JobStore, seen_s: float, cause: str
) -> None:
    """Another worker takes the job, or the reaper does."""
    claim = claimed(store, "host-1:aa/7")
    store.redis.zadd("kms:workers", {"host-1:aa": store.ask_clock() - seen_s})
    expire_leases(store)
    claim = take(store, claim.accepted.job_id, "host-1:aa/8")
    lose(store, claim)

    assert told(store, claim) == [
        (1, "lease_lost", cause, 1, "host-1:aa/7"),
        (2, "lease_lost", cause, 1, "host-1:aa/8"),
    ]


@pytest.mark.parametrize("take_up", ["reap", "claim"])
def test_an_attempt_that_was_the_last_one_is_told_once(store: JobStore, take_up: str) -> None:
    """Of a job that ends because its attempts are used up."""
    claim = claimed(store, "host-1:aa/7")
    job_id, most = claim.accepted.job_id, store.rules.attempts
    for _ in range(most - 1):
        lose(store, claim)
        claim = take(store, job_id, "host-1:aa/7")
    expire_leases(store)
    if take_up == "reap":
        reap_all(store, [job_id])
    assert store.claim(job_id, "host-2:bb/8") is None

    job = job_of(store, claim)
    assert (job.error, job.attempt_id, len(job.past)) == ("attempts_exhausted", "", most)


def test_an_attempt_that_was_to_put_its_target_in_place_is_told_and_may_still_do_so(store: JobStore) -> None:
    claim = claimed(store, "host-1:aa/7")
    store.committing(claim, COMMIT)
    expire_leases(store)
    assert reap_all(store, [claim.accepted.job_id]) == ["committing"]
    store.renew(claim, {})
    expire_leases(store)
    take(store, claim.accepted.job_id, "host-2:bb/8")

    assert told(store, claim) == [(1, "lease_lost", "worker_gone", 1, "host-1:aa/7")]


def test_what_is_away_for_long_leaves_room_for_what_came_before(store: JobStore) -> None:
    claim = claimed(store, "host-1:aa/7")
    job_id = claim.accepted.job_id
    lose(store, claim)
    for number in range(30):
        claim = take(store, job_id, f"host-{number}:bb/8")
        store.defer(claim, 0, "spool_unavailable")
    claim = take(store, job_id)
    store.defer(claim, 0, "backend_unavailable")

    found = job_of(store, claim).past
    assert [(each.cause, each.times) for each in found] == [
        ("worker_gone", 1),
        ("spool_unavailable", 30),
        ("backend_unavailable", 1),
    ]
    assert found[0].ended_at <= found[1].began_at < found[1].ended_at <= found[2].began_at


def test_the_last_ten_are_kept_in_few_bytes(store: JobStore) -> None:
    worker = f"{'ü' * 80}.example:{'a' * 300}/7"
    claim = claimed(store, worker)
    for number in range(13):
        store.defer(claim, 0, f"cause_{number}{'x' * 200}")
        claim = take(store, claim.accepted.job_id, worker)

    causes = [each.cause.rstrip("x") for each in job_of(store, claim).past]
    assert causes == [f"cause_{number}" for number in range(3, 13)]
    assert len(record(store, claim.accepted.job_id)[b"history"]) <= 10 * 300


def test_the_end_that_a_retry_undid_is_told(store: JobStore) -> None:
    claim = claimed(store, "host-1:aa/7")
    store.finish(claim, "failed", "record_refused")
    store.retry(claim.accepted.job_id, TENANT)
    assert told(store, claim) == [(1, "retried", "record_refused", 1, "host-1:aa/7")]
    claim = take(store, claim.accepted.job_id, "host-2:bb/8")

    assert job_of(store, claim).began_at == 0, "it is that of started_at"
    forge(store, claim.accepted.job_id, attempt=str(store.rules.attempts))
    expire_leases(store)
    store.claim(claim.accepted.job_id, "host-3:cc/9")
    store.retry(claim.accepted.job_id, TENANT)
    assert [(each.how, each.worker) for each in job_of(store, claim).past[1:]] == [
        ("lease_lost", "host-2:bb/8"),
        ("retried", ""),
    ]


def test_an_attempt_at_a_part_is_told_with_the_whole(store: JobStore) -> None:
    whole = claimed(store, source="items", items=2, starts=(0, 1))
    names = [part_id(whole.accepted.job_id, number) for number in range(2)]
    fields = {"source": "items", "parent": whole.accepted.job_id, "items": 1, "starts": (0,)}
    store.split(whole, [accepted(job_id=name, **fields) for name in names])
    take(store, names[0], "host-1:aa/7")
    expire_leases(store)
    reap_all(store, names)
    assert [(each.is_part, each.how, each.worker) for each in job_of(store, whole).past] == [
        (1, "lease_lost", "host-1:aa/7")
    ]

    take(store, names[1], "host-1:aa/7")
    store.redis.delete(f"kms:job:{whole.accepted.job_id}")
    forge(store, names[1], lease_until="1")
    reap_all(store, names)
    assert not store.redis.exists(f"kms:job:{whole.accepted.job_id}"), "nothing is noted in what has gone"


def test_a_job_that_succeeds_at_once_has_no_field_more(store: JobStore) -> None:
    claim = claimed(store)
    store.finish(claim, "succeeded", "", WorkResult(items_done=1, result_digest=bytes(32)))

    assert not {b"history", b"began_at"} & record(store, claim.accepted.job_id).keys()


JUNK: Sequence[bytes] = (
    b"junk",
    b"\xff\xfe",
    b"[" * 2000,
    LINE.replace(b"1000.000", b"1e300"),
    LINE.replace(b"1000.000", b"-1"),
    LINE.replace(b"stalled", b"<b>"),
    LINE.replace(b"[1,", b"[null,"),
    LINE[:-3],
)


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_what_others_wrote_is_no_history(store: JobStore, junk: bytes) -> None:
    """The job is told without it, and goes on."""
    claim = claimed(store)
    forge(store, claim.accepted.job_id, history=LINE + b"\n" + junk)
    assert job_of(store, claim).past == []
    store.defer(claim, 0)

    assert job_of(store, claim).state == "queued"


def test_a_text_that_others_wrote_as_a_process_is_told_as_text(store: JobStore) -> None:
    claim = claimed(store)
    forge(store, claim.accepted.job_id, history=LINE.replace(b"host-1", b"<b>\xff"))

    assert [each.worker for each in job_of(store, claim).past] == ["<b>\ufffd:aa/7"]


def test_a_history_of_any_length_is_replaced(store: JobStore) -> None:
    claim = claimed(store, "host-1:aa/7")
    forge(store, claim.accepted.job_id, history=os.urandom(1_000_000))
    store.defer(claim, 0)

    assert told(store, claim) == [(1, "deferred", "unavailable", 1, "host-1:aa/7")]


def test_how_a_process_ended_is_forgotten(store: JobStore) -> None:
    process_ended(store, "host-1:aa/7", -9)

    assert 0 < store.redis.ttl("kms:died:host-1:aa/7") <= store.rules.lease_s + 600
