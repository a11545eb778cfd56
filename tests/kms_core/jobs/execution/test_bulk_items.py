"""Bulk jobs in parts: several workers at once, one result in order, one end."""

import json
from collections.abc import Collection, Iterator
from typing import cast

import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution import one_file, results
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import Job, part_id
from kms_core.jobs.storage.spool import ITEMS
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import RateLimited, ResultExpired
from support.job_stores import lapse, remove_inputs, spool_folder, with_jobs

WHO = Principal("local")
CONTEXT = Context.parse("env=test")


def items(count: int, bad: Collection[int] = ()) -> Iterator[wire.JobItem]:
    for index in range(count):
        yield wire.JobItem(plaintext=f"{index}".encode(), context="no equals sign" if index in bad else None)


def submit(core: Core, count: int, bad: Collection[int] = ()) -> Job:
    return core.submitter.items(SubmissionOptions(WHO, "encrypt", CONTEXT), items(count, bad))


def run(core: Core, job: Job, *, parts: bool = True) -> list[str]:
    """Have a job cut into parts, or run it whole; the ids of its parts, which run in reverse."""
    run_job(job.job_id, core.worker_context, "w/1")
    found = [part_id(job.job_id, number) for number in range(now(core, job).parts)]
    for part in reversed(found if parts else []):
        run_job(part, core.worker_context, "w/2")
    return found


def now(core: Core, job: Job) -> Job:
    return core.worker_context.store.get(job.job_id, WHO.tenant)


def lines(core: Core, job: Job) -> list[wire.ItemResult]:
    found = results.of(now(core, job), core.worker_context.store, core.worker_context.spool)
    whole = b"".join(found.slabs(0, found.size))
    assert len(whole) == found.size
    return [wire.ItemResult(**json.loads(line)) for line in whole.splitlines()]


@pytest.mark.parametrize(
    ("count", "most", "parts", "bad"),
    [
        (1, 100, 0, ()),
        (500, 100, 0, ()),
        (501, 100, 2, ()),
        (1_500, 100, 3, ()),
        (1_501, 3, 2, (700,)),
        (2_001, 3, 3, ()),
    ],
)
def test_every_item_has_its_line_in_order(  # noqa: PLR0913 -- a row of the table
    core: Core, monkeypatch: pytest.MonkeyPatch, *, count: int, most: int, parts: int, bad: tuple[int, ...]
) -> None:
    """Also beside a bad one, which fails the whole and no other item."""
    monkeypatch.setattr(one_file, "MOST_PARTS", most)
    job = submit(core, count, bad)
    assert len(run(core, job)) == parts

    ended = now(core, job)
    assert (ended.state, ended.error) == (("failed", "items_failed") if bad else ("succeeded", ""))
    assert (ended.items_done, ended.items_failed) == (count, len(bad))
    assert ended.bytes_done <= ended.bytes
    assert [line.index for line in lines(core, job)] == list(range(count))
    assert [line.index for line in lines(core, job) if line.error] == [*bad]


def test_splitting_twice_makes_the_same_parts_and_a_part_counts_once(core: Core) -> None:
    """And transitions of the whole are told once, those of parts not at all."""
    job = submit(core, 1_001)
    run(core, job, parts=False)
    for part in run(core, job):
        run_job(part, core.worker_context, "w/1")

    assert (now(core, job).state, now(core, job).items_done) == ("succeeded", 1_001)
    stream = core.worker_context.store.redis.xrange("kms:events")
    events = cast("list[tuple[bytes, dict[bytes, bytes]]]", stream)
    told = [fields[b"type"].decode() for _, fields in events]
    assert told == ["kms.job.queued", "kms.job.running", "kms.job.succeeded"]


def test_a_part_that_uses_up_its_attempts_has_error_lines(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_file, "MOST_PARTS", 2)  # so a part has 1,000 items
    job, store = submit(core, 1_501), core.worker_context.store
    other, dead = run(core, job, parts=False)
    for _ in range(store.rules.attempts):
        assert store.claim(dead, "w/9")  # and dies
        lapse(store)
        assert store.reap_all([dead]) == ["requeued"]
    for part in (dead, other):
        run_job(part, core.worker_context, "w/1")

    ended = now(core, job)
    assert (ended.state, ended.error, ended.items_failed) == ("failed", "items_failed", 501)
    assert ended.end
    assert ended.end.failures[0] == (1_000, "attempts_exhausted")
    assert [line.index for line in lines(core, job) if line.error] == list(range(1_000, 1_501))


def test_cancelling_the_whole_stops_its_parts_and_leaves_nothing(core: Core) -> None:
    job = submit(core, 1_001)
    parts = run(core, job, parts=False)
    core.worker_context.store.cancel(job.job_id, WHO.tenant)
    for part in parts:
        run_job(part, core.worker_context, "w/1")

    assert now(core, job).state == "cancelled"
    remove_inputs(core)
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []
    with pytest.raises(ResultExpired):
        results.of(now(core, job), core.worker_context.store, core.worker_context.spool)


def test_items_leave_the_spool_with_the_last_part(core: Core) -> None:
    job = submit(core, 1_001)
    kept = spool_folder(core) / job.job_id / ITEMS
    first, *others = run(core, job, parts=False)
    run_job(first, core.worker_context, "w/1")
    remove_inputs(core)
    assert kept.exists()
    for part in others:
        run_job(part, core.worker_context, "w/1")

    remove_inputs(core)
    assert not kept.exists()


def test_submission_above_the_bound_of_open_jobs_leaves_nothing(core: Core) -> None:
    core.worker_context.store.rules = with_jobs(open_jobs=1).jobs
    submit(core, 1)

    with pytest.raises(RateLimited):
        submit(core, 1_001)
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []
