"""Bulk jobs in parts: several workers at once, one result in order, one end; caps and dead letters."""

import json
from collections.abc import Iterator
from typing import cast

import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution import one_file, results
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import Job, part_id
from kms_core.jobs.spec import BULK
from kms_core.jobs.storage.spool import ITEMS
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import JobNotDead, RateLimited, ResultExpired
from support.job_stores import remove_inputs, spool_folder, with_jobs

WHO = Principal("local")
CONTEXT = Context.parse("env=test")


def items(count: int, bad: frozenset[int] = frozenset()) -> Iterator[wire.JobItem]:
    for index in range(count):
        yield wire.JobItem(plaintext=f"{index}".encode(), context="no equals sign" if index in bad else None)


def submit(core: Core, count: int, bad: frozenset[int] = frozenset()) -> Job:
    return core.submitter.items(SubmissionOptions(WHO, "encrypt", CONTEXT), items(count, bad))


def parts_of(core: Core, job: Job) -> list[str]:
    whole = core.worker_context.store.get(job.job_id, WHO.tenant)
    return [part_id(job.job_id, number) for number in range(whole.parts)]


def now(core: Core, job: Job) -> Job:
    return core.worker_context.store.get(job.job_id, WHO.tenant)


def lines(core: Core, job: Job) -> list[wire.ItemResult]:
    found = results.of(now(core, job), core.worker_context.store, core.worker_context.spool)
    whole = b"".join(found.slabs(0, found.size))
    assert len(whole) == found.size
    return [wire.ItemResult(**json.loads(line)) for line in whole.splitlines()]


@pytest.mark.parametrize(
    ("count", "most", "parts"),
    [(1, 100, 0), (500, 100, 0), (501, 100, 2), (1_500, 100, 3), (1_501, 3, 2), (2_001, 3, 3)],
)
def test_every_item_has_its_line_in_order(
    core: Core, count: int, most: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_file, "MOST_PARTS", most)
    job = submit(core, count)
    run_job(job.job_id, core.worker_context, "w/1")
    for part in reversed(parts_of(core, job)):
        run_job(part, core.worker_context, "w/2")

    ended = now(core, job)
    assert (ended.state, ended.items_done, ended.items_failed) == ("succeeded", count, 0)
    assert ended.bytes_done <= ended.bytes
    assert [line.index for line in lines(core, job)] == list(range(count))
    assert len(parts_of(core, job)) == parts


def test_one_bad_item_fails_the_whole_and_no_other_item(core: Core) -> None:
    job = submit(core, 1_001, frozenset({700}))
    run_job(job.job_id, core.worker_context, "w/1")
    for part in parts_of(core, job):
        run_job(part, core.worker_context, "w/1")

    ended = now(core, job)
    assert (ended.state, ended.error, ended.items_failed) == ("failed", "items_failed", 1)
    assert [line.index for line in lines(core, job) if line.error] == [700]


def test_splitting_twice_makes_the_same_parts_and_a_part_counts_once(core: Core) -> None:
    job = submit(core, 1_001)
    for _ in range(2):
        run_job(job.job_id, core.worker_context, "w/1")
    for part in parts_of(core, job) * 2:
        run_job(part, core.worker_context, "w/1")

    assert (now(core, job).state, now(core, job).items_done) == ("succeeded", 1_001)


def test_a_part_that_uses_up_its_attempts_has_error_lines(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_file, "MOST_PARTS", 2)  # so a part has 1,000 items
    core.worker_context.store.rules = with_jobs(lease_s=0.01, attempts=1).jobs
    job = submit(core, 1_501)
    run_job(job.job_id, core.worker_context, "w/1")
    other, dead = parts_of(core, job)
    assert core.worker_context.store.claim(dead, "w/9") is not None  # and dies
    core.worker_context.store.rules = with_jobs(lease_s=30, attempts=1).jobs
    while core.worker_context.store.reap_all([dead])[0] != "requeued":
        pass
    for part in (dead, other):
        run_job(part, core.worker_context, "w/1")

    ended = now(core, job)
    assert (ended.state, ended.error, ended.items_failed) == ("failed", "items_failed", 501)
    assert ended.end is not None
    assert ended.end.failures[0] == (1_000, "attempts_exhausted")
    codes = {line.index: line.error for line in lines(core, job) if line.error}
    assert sorted(codes) == list(range(1_000, 1_501))


def test_cancelling_the_whole_stops_its_parts_and_leaves_nothing(core: Core) -> None:
    job = submit(core, 1_001)
    run_job(job.job_id, core.worker_context, "w/1")
    core.worker_context.store.cancel(job.job_id, WHO.tenant)
    for part in parts_of(core, job):
        run_job(part, core.worker_context, "w/1")

    assert now(core, job).state == "cancelled"
    remove_inputs(core)
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []
    with pytest.raises(ResultExpired):
        results.of(now(core, job), core.worker_context.store, core.worker_context.spool)


def test_items_leave_the_spool_with_the_last_part(core: Core) -> None:
    job = submit(core, 1_001)
    run_job(job.job_id, core.worker_context, "w/1")
    folder = spool_folder(core) / job.job_id
    first, *others = parts_of(core, job)
    run_job(first, core.worker_context, "w/1")
    assert (folder / ITEMS).exists()
    for part in others:
        run_job(part, core.worker_context, "w/1")

    remove_inputs(core)
    assert not (folder / ITEMS).exists()


def test_submissions_are_turned_away_before_the_broker_drowns(core: Core) -> None:
    core.worker_context.store.rules = with_jobs(open_jobs=1).jobs
    submit(core, 1)

    with pytest.raises(RateLimited):
        submit(core, 1)


def test_a_tenant_runs_so_many_jobs_at_a_time(core: Core) -> None:
    core.worker_context.store.rules = with_jobs(tenant_leases=1).jobs
    first, second = submit(core, 1), submit(core, 1)
    held = core.worker_context.store.claim(first.job_id, "w/1")
    assert held is not None
    assert core.worker_context.store.claim(second.job_id, "w/2") is None

    core.worker_context.store.finish(held, "succeeded")

    assert core.worker_context.store.claim(second.job_id, "w/2") is not None


def test_a_dead_letter_is_listed_and_can_be_retried(core: Core) -> None:
    store = core.worker_context.store
    store.rules = with_jobs(attempts=0).jobs
    job = submit(core, 1)
    assert store.claim(job.job_id, "w/1") is None
    assert [found.job_id for found in store.dead(WHO.tenant, 10)] == [job.job_id]
    store.rules = with_jobs().jobs

    store.retry(job.job_id, WHO.tenant)
    run_job(job.job_id, core.worker_context, "w/1")

    assert now(core, job).state == "succeeded"
    assert store.dead(WHO.tenant, 10) == []
    with pytest.raises(JobNotDead):
        store.retry(job.job_id, WHO.tenant)


def test_a_transition_is_told_once_and_parts_are_not(core: Core) -> None:
    job = submit(core, 1_001)
    run_job(job.job_id, core.worker_context, "w/1")
    for part in parts_of(core, job):
        run_job(part, core.worker_context, "w/1")

    stream = cast(
        "list[tuple[bytes, dict[bytes, bytes]]]", core.worker_context.store.redis.xrange("kms:events")
    )
    told = [fields[b"type"].decode() for _, fields in stream]
    assert told == ["kms.job.queued", "kms.job.running", "kms.job.succeeded"]
    assert now(core, job).queue == BULK
