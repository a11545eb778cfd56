"""The reaper over a real Valkey and spool: what it takes up, what it leaves alone, what it deletes."""

import os
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kms_core.container import Core
from kms_core.jobs.model import LeaseLost
from kms_core.jobs.recovery.reaper import TRIM_EVERY, Reaper
from kms_core.jobs.storage.spool import Label
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import new_id
from kms_protocol.errors import JobsUnavailable
from support.job_stores import LONG, TENANT, accepted, claimed, lapse, state, store_of
from support.waiting import until


@pytest.fixture
def store(core: Core) -> JobStore:
    return store_of(core, LONG)


@pytest.fixture
def brief(core: Core) -> JobStore:
    return store_of(core, LONG)


def reaper_of(core: Core, store: JobStore) -> Reaper:
    return Reaper(store, core.worker_context.spool, "r1")


def test_reaper_requeues_what_a_dead_worker_held(core: Core, brief: JobStore) -> None:
    claim = claimed(brief)
    lapse(brief)

    reaper_of(core, brief).reap()

    assert state(brief, claim) == "queued"
    with pytest.raises(LeaseLost):
        brief.finish(claim, "succeeded")


def test_reaper_leaves_live_leases_alone(core: Core, store: JobStore) -> None:
    claim = claimed(store)

    reaper_of(core, store).reap()

    assert state(store, claim) == "running"


def test_reaper_deletes_expired_results_and_orphans(core: Core, store: JobStore) -> None:
    claim = claimed(store, expires_at=time.time() + 1)
    store.finish(claim, "succeeded")
    with core.worker_context.spool.writing(Label(TENANT, claim.accepted.job_id, "head", "1")) as out:
        out.write(b"x")
    until(store.expired, "the result has expired")

    reaper_of(core, store).reap()

    assert store.get(claim.accepted.job_id, TENANT).purged == 1
    assert list(core.worker_context.spool.folders(older_than_s=-10)) == []


def test_redis_that_is_new_makes_no_orphans(core: Core, store: JobStore) -> None:
    orphan, spool = new_id(), core.worker_context.spool
    with spool.writing(Label(TENANT, orphan, "upload")) as out:
        out.write(b"x", more=False)
    folder = core.worker_context.spool.store.path / orphan  # type: ignore[attr-defined]  # a directory
    os.utime(folder, (0, 0))

    Reaper(store, spool, "r1", may_sweep=lambda: False).reap()
    assert folder.exists()
    Reaper(store, spool, "r2").reap()
    assert not folder.exists()


@pytest.mark.parametrize(("age_s", "kept"), [(0, True), (3500, True), (3700, False)])
def test_uploads_are_orphans_when_nothing_changed_them_for_an_hour(
    core: Core, store: JobStore, tmp_path: Path, age_s: float, *, kept: bool
) -> None:
    """An upload has no record before it has arrived: what is young may be one under way."""
    orphan, known = new_id(), store.submit(accepted()).job_id
    for job_id in (orphan, known):
        with core.worker_context.spool.writing(Label(TENANT, job_id, "head", "1")) as out:
            out.write(b"x")
        past = time.time() - age_s
        os.utime(tmp_path / "state/spool" / job_id, (past, past))

    reaper_of(core, store).reap()

    assert (orphan in core.worker_context.spool.folders(older_than_s=-10)) is kept
    assert known in core.worker_context.spool.folders(older_than_s=-10)


@pytest.mark.parametrize("count", [1, 1000, 2001], ids=str)
def test_reaper_forgets_the_ids_of_expired_records_that_nobody_lists(
    core: Core, store: JobStore, count: int
) -> None:
    kept = store.submit(accepted()).job_id
    store.redis.sadd("kms:tenants", "gone")
    for key in ("kms:tenant:default", "kms:tenant:gone", "kms:dead"):
        store.redis.zadd(key, {f"expired-{number}": number for number in range(count)})
    store.redis.zadd("kms:dead", {kept: 1e10})
    reaper = reaper_of(core, store)

    for _ in range(41):
        reaper.reap()

    for key in ("kms:tenant:default", "kms:dead"):
        assert store.redis.zrange(key, 0, -1) == [kept.encode()]
    assert not store.redis.exists("kms:tenant:gone")
    assert store.redis.smembers("kms:tenants") == {b"default"}


def test_reaper_looks_at_the_oldest_jobs_of_a_list_each_time(core: Core, store: JobStore) -> None:
    ids = [store.submit(accepted()).job_id for _ in range(40)]
    reaper = reaper_of(core, store)
    for _ in range(3 * TRIM_EVERY + 1):
        reaper.reap()
    for job_id in ids[:3]:
        store.redis.delete(f"kms:job:{job_id}")

    for _ in range(TRIM_EVERY):
        reaper.reap()

    assert store.redis.zrange("kms:tenant:default", 0, -1) == [job_id.encode() for job_id in ids[3:]]


def test_one_reaper_at_a_time(store: JobStore) -> None:
    assert store.lock("caretaker", "c1", 10)
    assert store.lock("caretaker", "c1", 10)
    assert not store.lock("caretaker", "c2", 10)


# -- what others wrote stops nothing ---------------------------------------------------------------------


def expiring(core: Core, store: JobStore) -> str:
    """A job whose results are to be deleted: behind all that others put there."""
    claim = claimed(store)
    job_id = claim.accepted.job_id
    store.finish(claim, "failed", "nothing")
    with core.worker_context.spool.writing(Label(TENANT, job_id, "head", "1")) as out:
        out.write(b"x")
    store.redis.zadd("kms:ended", {job_id: 3})
    return job_id


def test_what_is_no_job_among_the_ended_keeps_no_result(core: Core, store: JobStore) -> None:
    good = expiring(core, store)
    store.redis.zadd("kms:ended", {"junk": 1, "../..": 1})

    reaper_of(core, store).reap()

    assert store.get(good, TENANT).purged == 1
    assert list(core.worker_context.spool.folders(older_than_s=-10)) == []
    assert store.redis.zcard("kms:ended") == 0


def test_a_step_that_fails_keeps_the_reaper_from_no_other(
    core: Core, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, orphan = expiring(core, store), new_id()

    def fails() -> list[str]:
        raise JobsUnavailable

    for read in ("due", "lists"):
        monkeypatch.setattr(store, read, fails)
    with core.worker_context.spool.writing(Label(TENANT, orphan, "head", "1")) as out:
        out.write(b"x")
    folder = tmp_path / "state/spool" / orphan
    os.utime(folder, (0, 0))

    with capture_logs() as logs:
        reaper = reaper_of(core, store)
        for _ in range(3):
            reaper.reap()

    assert store.get(good, TENANT).purged == 1
    assert not folder.exists()
    failed = [line["step"] for line in logs if line["event"] == "caretaker.step_failed"]
    assert sorted(failed) == ["take_up_due", "trim"], "each is told once"
