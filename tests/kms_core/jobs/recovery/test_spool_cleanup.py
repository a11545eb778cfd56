"""The cleanup of a spool: what it deletes, and what it leaves alone."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from kms_core.container import Core
from kms_core.jobs.recovery import reaper
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.recovery.spool_cleanup import SpoolCleanup, expired
from kms_core.jobs.storage.spool import Label
from kms_core.jobs.store import gauges
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import new_id
from kms_protocol.errors import JobsUnavailable
from support.job_stores import TENANT, accepted, alone, claimed, reap, round_trips, spool_folder
from support.waiting import until


def spooled(core: Core, job_id: str, age_s: float = 0) -> None:
    """Put a blob of this job into the spool, which changed so long ago."""
    with core.worker_context.spool.writing(Label(TENANT, job_id, "head", "1")) as out:
        out.write(b"x")
    past = time.time() - age_s
    os.utime(spool_folder(core) / job_id, (past, past))


def in_spool(core: Core) -> list[str]:
    """The jobs of which something rests in the spool."""
    return list(core.worker_context.spool.folders(older_than_s=-10))


def test_reaper_deletes_expired_results(core: Core, store: JobStore) -> None:
    claim = claimed(store, expires_at=time.time() + 1)
    store.finish(claim, "succeeded")
    spooled(core, claim.accepted.job_id)
    until(lambda: expired(store), "the result has expired")

    reap(store, core.worker_context.spool)

    assert store.get(claim.accepted.job_id, TENANT).purged == 1
    assert expired(store) == in_spool(core) == []


def test_expired_results_are_noted_together(core: Core, store: JobStore, tmp_path: Path) -> None:
    with alone(store, tmp_path / "own") as own:
        taken, jobs = [], list[str]()
        for count in (0, 1, 60):
            claims = [claimed(own) for _ in range(count)]
            jobs = [each.accepted.job_id for each in claims]
            for claim, job_id in zip(claims, jobs, strict=True):
                own.finish(claim, "failed", "nothing")
                own.redis.hset(f"kms:blobs:{job_id}", "result0.1", b"x")
                own.redis.zadd("kms:ended", {job_id: 1})
            before = round_trips(own)
            reap(own, core.worker_context.spool)
            taken.append(round_trips(own) - before)

        assert [own.get(job_id, TENANT).purged for job_id in jobs] == [1] * len(jobs)
        assert not any(own.redis.exists(f"kms:blobs:{job_id}") for job_id in jobs)
    assert taken[2] - taken[1] < 5


def test_redis_that_is_new_makes_no_orphans(core: Core, store: JobStore) -> None:
    orphan, spool = new_id(), core.worker_context.spool
    spooled(core, orphan, 1e9)

    SpoolCleanup(store, spool, "r1", may_sweep=lambda: False).step()
    assert in_spool(core) == [orphan]
    SpoolCleanup(store, spool, "r2").step()
    assert in_spool(core) == []


@pytest.mark.parametrize(("age_s", "kept"), [(0, True), (3500, True), (3700, False)])
def test_uploads_are_orphans_when_nothing_changed_them_for_an_hour(
    core: Core, store: JobStore, age_s: float, *, kept: bool
) -> None:
    """An upload has no record before it has arrived: what is young may be one under way."""
    orphan, known = new_id(), store.submit(accepted()).job_id
    for job_id in (orphan, known):
        spooled(core, job_id, age_s)

    reap(store, core.worker_context.spool)

    assert set(in_spool(core)) == ({orphan, known} if kept else {known})


def expiring(core: Core, store: JobStore) -> str:
    """A job whose results are to be deleted: behind all that others put there."""
    claim = claimed(store)
    job_id = claim.accepted.job_id
    store.finish(claim, "failed", "nothing")
    spooled(core, job_id)
    store.redis.zadd("kms:ended", {job_id: 3})
    return job_id


def failing(_store: JobStore) -> list[str]:
    raise JobsUnavailable


def test_a_step_of_the_cleanup_ends_after_a_second_and_goes_on_in_the_next_round(
    core: Core, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket may take its time for each of thousands of jobs: others have the lock renewed in between."""
    for _ in range(3):
        expiring(core, store)
    spool, clock = core.worker_context.spool, [0.0]
    delete = spool.delete

    def slowly(job_id: str, *, in_redis: bool) -> bool:
        clock[0] += 0.6
        return delete(job_id, in_redis=in_redis)

    monkeypatch.setattr(spool, "delete", slowly)
    monkeypatch.setattr(
        "kms_core.jobs.recovery.spool_cleanup.time", SimpleNamespace(monotonic=lambda: clock[0])
    )
    cleanup = SpoolCleanup(store, spool, "r")
    cleanup.step()
    assert (len(in_spool(core)), cleanup._wake.is_set()) == (1, True)  # noqa: SLF001 -- the next round is at once

    cleanup._wake.clear()  # noqa: SLF001 -- as above
    cleanup.step()
    assert (in_spool(core), cleanup._wake.is_set()) == ([], False)  # noqa: SLF001 -- as above


def test_what_is_no_job_among_the_ended_keeps_no_result(core: Core, store: JobStore) -> None:
    good = expiring(core, store)
    store.redis.zadd("kms:ended", {"junk": 1, "../..": 1})

    reap(store, core.worker_context.spool)

    assert store.get(good, TENANT).purged == 1
    assert in_spool(core) == []
    assert store.redis.zcard("kms:ended") == 0


def test_a_step_that_fails_keeps_the_reaper_from_no_other(
    core: Core, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, orphan = expiring(core, store), new_id()
    spooled(core, orphan, 1e9)
    monkeypatch.setattr(reaper, "due", failing)
    monkeypatch.setattr(gauges, "for_newer_workers", failing)

    with capture_logs() as logs:
        for steps in (Reaper(store, "r"), SpoolCleanup(store, core.worker_context.spool, "r")):
            for _ in range(3):
                steps.step()

    assert store.get(good, TENANT).purged == 1
    assert in_spool(core) == []
    failed = [line["step"] for line in logs if line["event"] == "caretaker.step_failed"]
    assert sorted(failed) == ["take_up_due", "tell_of_newer"], "each is told once"
