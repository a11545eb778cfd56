"""The caretaker over a real Valkey and spool: what it takes up, what it leaves alone, what it deletes."""

import os
import time
from itertools import product
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kms_core.container import Core
from kms_core.jobs.model import BULK, QUEUES, LeaseLost
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.storage.spool import Label
from kms_core.jobs.store import broker_messages
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import new_id
from kms_protocol.errors import JobsUnavailable
from kms_protocol.wire import PRIORITIES
from service import until
from stores import LONG, SHORT, TENANT, accepted, claimed, lapse, state, store_of


@pytest.fixture
def nudged() -> list[str]:
    return []


@pytest.fixture
def store(core: Core, nudged: list[str]) -> JobStore:
    return store_of(core, LONG, nudged)


@pytest.fixture
def brief(core: Core, nudged: list[str]) -> JobStore:
    return store_of(core, SHORT, nudged)


def caretaker(core: Core, store: JobStore, waiting: int) -> Reaper:
    lanes = dict.fromkeys(product(QUEUES, PRIORITIES), waiting)
    return Reaper(store, core.shop.spool, "c1", lambda: lanes)


def test_caretaker_requeues_what_a_dead_worker_held(core: Core, brief: JobStore, nudged: list[str]) -> None:
    claim = claimed(brief)
    lapse()
    nudged.clear()

    caretaker(core, brief, waiting=5).round()

    assert nudged == [claim.accepted.job_id]
    assert state(brief, claim) == "queued"
    with pytest.raises(LeaseLost):
        brief.finish(claim, "succeeded")


def test_caretaker_leaves_live_leases_alone(core: Core, store: JobStore, nudged: list[str]) -> None:
    claim = claimed(store)
    nudged.clear()

    caretaker(core, store, waiting=0).round()

    assert (state(store, claim), nudged) == ("running", [])


@pytest.mark.parametrize(("waiting", "again"), [(0, 1), (3, 0)], ids=["lost", "queue-is-slow"])
def test_lost_message_is_sent_again_only_when_none_waits(
    core: Core, store: JobStore, nudged: list[str], waiting: int, again: int
) -> None:
    store.submit(accepted())
    nudged.clear()
    care = caretaker(core, store, waiting)

    care.round()
    care.round()  # the next look is some seconds away

    assert len(nudged) == again


@pytest.mark.parametrize(
    ("others", "lost"), [(9, True), (1, False), (-9, False)], ids=["later", "soon", "before"]
)
def test_lost_message_is_missed_in_a_lane_that_is_never_empty(
    core: Core, store: JobStore, others: int, *, lost: bool
) -> None:
    posting = JobStore(store.redis, store.record_key, None, LONG)
    job = posting.submit(accepted(items=1, created_at=time.time() - 60))
    lane = broker_messages.where(job.lane)
    message = store.redis.lpop(lane)
    assert job.job_id in str(message)
    store.redis.lpush(lane, broker_messages.write("another", job.lane, job.created_at + others))

    for _ in range(2):
        store.redis.zadd("kms:open", {job.job_id: 0})
        caretaker(core, posting, waiting=1).round()

    assert store.redis.llen(lane) == (2 if lost else 1)  # and the second look finds it sent for


def test_job_and_its_message_are_one_step(store: JobStore) -> None:
    posting = JobStore(store.redis, store.record_key, None, LONG)
    asked = accepted(items=1, priority="low")

    for _ in range(2):
        posting.submit(asked, idempotency="once")

    assert posting.depths()[BULK, "low"] == sum(posting.depths().values()) == 1


def test_caretaker_deletes_expired_results_and_orphans(core: Core, store: JobStore) -> None:
    claim = claimed(store, expires_at=time.time() + 1)
    store.finish(claim, "succeeded")
    with core.shop.spool.writing(Label(TENANT, claim.accepted.job_id, "head", 1)) as out:
        out.write(b"x")
    until(store.expired, "the result has expired")

    caretaker(core, store, waiting=0).round()

    assert store.get(claim.accepted.job_id, TENANT).purged == 1
    assert list(core.shop.spool.folders(older_than_s=-10)) == []


@pytest.mark.parametrize(("age_s", "kept"), [(0, True), (3500, True), (3700, False)])
def test_uploads_are_orphans_when_nothing_changed_them_for_an_hour(
    core: Core, store: JobStore, tmp_path: Path, age_s: float, *, kept: bool
) -> None:
    """An upload has no record before it has arrived: what is young may be one under way."""
    orphan, known = new_id(), store.submit(accepted()).job_id
    for job_id in (orphan, known):
        with core.shop.spool.writing(Label(TENANT, job_id, "head", 1)) as out:
            out.write(b"x")
        past = time.time() - age_s
        os.utime(tmp_path / "state/spool" / job_id, (past, past))

    caretaker(core, store, waiting=1).round()

    assert (orphan in core.shop.spool.folders(older_than_s=-10)) is kept
    assert known in core.shop.spool.folders(older_than_s=-10)


@pytest.mark.parametrize("count", [1, 1000, 2001], ids=str)
def test_caretaker_forgets_the_ids_of_expired_records_that_nobody_lists(
    core: Core, store: JobStore, count: int
) -> None:
    kept = store.submit(accepted()).job_id
    gone = store.submit(accepted(tenant="gone")).job_id
    for key in ("kms:tenant:default", "kms:tenant:gone", "kms:dead"):
        store.redis.zadd(key, {f"expired-{number}": number for number in range(count)})
    store.redis.zadd("kms:dead", {kept: 1e10})
    store.redis.delete(f"kms:job:{gone}")
    care = caretaker(core, store, waiting=1)

    for _ in range(41):
        care.round()

    for key in ("kms:tenant:default", "kms:dead"):
        assert store.redis.zrange(key, 0, -1) == [kept.encode()]
    assert not store.redis.exists("kms:tenant:gone")
    assert store.redis.smembers("kms:tenants") == {b"default"}


def test_one_caretaker_at_a_time(store: JobStore) -> None:
    assert store.lock("caretaker", "c1", 10)
    assert store.lock("caretaker", "c1", 10)
    assert not store.lock("caretaker", "c2", 10)


@pytest.mark.parametrize("seconds", [None, 10_000], ids=["for ever", "long"])
def test_a_lock_that_no_caretaker_took_is_over_in_time(store: JobStore, seconds: int | None) -> None:
    store.redis.set("kms:lock:caretaker", "x", ex=seconds)
    assert not store.lock("caretaker", "c1", 0.2)
    time.sleep(0.3)

    assert store.lock("caretaker", "c1", 0.2)


def test_a_lock_of_a_wrong_type_is_over_in_time(store: JobStore) -> None:
    store.redis.sadd("kms:lock:courier", "x")
    with pytest.raises(JobsUnavailable):
        store.lock("courier", "c1", 0.2)
    time.sleep(0.3)

    assert store.lock("courier", "c1", 0.2)


# -- what others wrote stops nothing ---------------------------------------------------------------------


def expiring(core: Core, store: JobStore) -> str:
    """A job whose results are to be deleted: behind all that others put there."""
    claim = claimed(store)
    job_id = claim.accepted.job_id
    store.finish(claim, "failed", "nothing")
    with core.shop.spool.writing(Label(TENANT, job_id, "head", 1)) as out:
        out.write(b"x")
    store.redis.zadd("kms:ended", {job_id: 3})
    return job_id


def test_what_is_no_job_among_the_ended_keeps_no_result(core: Core, store: JobStore) -> None:
    good, wrong = expiring(core, store), new_id()
    store.redis.set(f"kms:job:{wrong}", "no hash")
    store.redis.zadd("kms:ended", {"junk": 1, "../..": 1, wrong: 2})

    caretaker(core, store, waiting=1).round()

    assert store.get(good, TENANT).purged == 1
    assert list(core.shop.spool.folders(older_than_s=-10)) == []
    assert store.redis.zcard("kms:ended") == 0


def test_a_list_of_a_wrong_type_keeps_no_other_from_being_trimmed(core: Core, store: JobStore) -> None:
    store.redis.sadd("kms:tenants", "a", "b")
    store.redis.set("kms:tenant:a", "no list")
    store.redis.zadd("kms:tenant:b", {"expired": 1})

    caretaker(core, store, waiting=1).round()

    assert not store.redis.exists("kms:tenant:a", "kms:tenant:b")


def test_a_step_that_fails_keeps_the_caretaker_from_no_other(
    core: Core, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, orphan = expiring(core, store), new_id()

    def fails() -> list[str]:
        raise JobsUnavailable

    for read in ("due", "lists"):
        monkeypatch.setattr(store, read, fails)
    with core.shop.spool.writing(Label(TENANT, orphan, "head", 1)) as out:
        out.write(b"x")
    folder = tmp_path / "state/spool" / orphan
    os.utime(folder, (0, 0))

    with capture_logs() as logs:
        care = caretaker(core, store, waiting=1)
        for _ in range(3):
            care.round()

    assert store.get(good, TENANT).purged == 1
    assert not folder.exists()
    failed = [line["step"] for line in logs if line["event"] == "caretaker.step_failed"]
    assert sorted(failed) == ["take_up_due", "trim"], "each is told once"
