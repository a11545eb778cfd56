"""Bulk jobs in parts: several workers at once, one result in order, one end."""

from pathlib import Path

import pytest

from kms_core.container import Core
from kms_core.jobs.execution import one_file, results
from kms_core.jobs.recovery.reaper import reap_all
from kms_core.jobs.storage.spool import ITEMS, UPLOAD, Label
from kms_core.jobs.submission.submitter import new_id
from kms_protocol.errors import RateLimited, ResultExpired, SpoolFull
from support.core_jobs import end_of, lines, now, run_job, split_into_parts, submit_items
from support.job_stores import TENANT, events, expire_leases, forge, remove_inputs, spool_folder, with_jobs
from support.service import Service, core_of


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
    job_id = submit_items(core, count, bad)
    found = split_into_parts(core, job_id)
    assert len(found) == parts
    for part in reversed(found):
        run_job(part, core.worker_context, "w/2")

    ended = now(core, job_id)
    assert (ended.state, ended.error) == (("failed", "items_failed") if bad else ("succeeded", ""))
    assert (ended.items_done, ended.items_failed) == (count, len(bad))
    assert ended.bytes_done <= ended.bytes
    told = lines(core, job_id)
    assert [line["index"] for line in told] == list(range(count))
    assert [line["index"] for line in told if line.get("error")] == [*bad]


def test_splitting_twice_makes_the_same_parts_and_a_part_counts_once(core: Core) -> None:
    """And transitions of the whole are told once, those of parts not at all."""
    job_id = submit_items(core, 1_001)
    for part in [*split_into_parts(core, job_id), *split_into_parts(core, job_id)]:
        run_job(part, core.worker_context, "w/1")

    assert (now(core, job_id).state, now(core, job_id).items_done) == ("succeeded", 1_001)
    told = [event["type"] for event in events(core.worker_context.store)]
    assert told == ["kms.job.queued", "kms.job.running", "kms.job.succeeded"]


def test_a_part_that_uses_up_its_attempts_has_error_lines(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_file, "MOST_PARTS", 2)  # so a part has 1,000 items
    job_id, store = submit_items(core, 1_501), core.worker_context.store
    other, dead = split_into_parts(core, job_id)
    for _ in range(store.rules.attempts):
        assert store.claim(dead, "w/9")  # and dies
        expire_leases(store)
        assert reap_all(store, [dead]) == ["requeued"]
    for part in (dead, other):
        run_job(part, core.worker_context, "w/1")

    ended = now(core, job_id)
    assert (ended.state, ended.error, ended.items_failed) == ("failed", "items_failed", 501)
    assert ended.end
    assert ended.end.failures[0] == (1_000, "attempts_exhausted")
    told = [line["index"] for line in lines(core, job_id) if line.get("error")]
    assert told == list(range(1_000, 1_501))


def test_full_spool_is_told_to_a_submitter_and_costs_an_accepted_job_time_alone(
    tmp_path: Path, redis_url: str
) -> None:
    """No attempt, and no item: it goes on once there is room."""
    install = Service(tmp_path, "[kms.jobs]\ninline_bytes = 0\nspool_max_bytes = 10_000_000\n", redis_url)
    core = core_of(install)
    job_id = submit_items(core, 1_000)
    parts = split_into_parts(core, job_id)
    spool, ballast = core.worker_context.spool, Label(TENANT, new_id(), UPLOAD)
    with spool.writing(ballast) as out:
        out.write(bytes(10_000_000 - spool.use().used_bytes - 20_000))
    with pytest.raises(SpoolFull):
        submit_items(core, 1_000)
    for part in parts:
        run_job(part, core.worker_context, "w/1")
        found = core.worker_context.store.part(part).job
        assert (found.state, found.attempt) == ("queued", 0)
        forge(core.worker_context.store, part, not_before="0")

    spool.delete(ballast.job_id)
    core = core_of(install)  # which counts what there is
    for part in parts:
        run_job(part, core.worker_context, "w/1")
    assert end_of(core, job_id) == ("succeeded", "")
    assert not [line for line in lines(core, job_id) if line.get("error")]


def test_cancelling_the_whole_stops_its_parts_and_leaves_nothing(core: Core) -> None:
    job_id = submit_items(core, 1_001)
    parts = split_into_parts(core, job_id)
    core.worker_context.store.cancel(job_id, TENANT)
    for part in parts:
        run_job(part, core.worker_context, "w/1")

    assert now(core, job_id).state == "cancelled"
    remove_inputs(core)
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []
    with pytest.raises(ResultExpired):
        results.of(now(core, job_id), core.worker_context.store, core.worker_context.spool)


def test_items_leave_the_spool_with_the_last_part(core: Core) -> None:
    job_id = submit_items(core, 1_001)
    kept = spool_folder(core) / job_id / ITEMS
    first, *others = split_into_parts(core, job_id)
    run_job(first, core.worker_context, "w/1")
    remove_inputs(core)
    assert kept.exists()
    for part in others:
        run_job(part, core.worker_context, "w/1")

    remove_inputs(core)
    assert not kept.exists()


def test_submission_above_the_bound_of_open_jobs_leaves_nothing(core: Core) -> None:
    core.worker_context.store.rules = with_jobs(open_jobs=1).jobs
    submit_items(core, 1)

    with pytest.raises(RateLimited):
        submit_items(core, 1_001)
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []
