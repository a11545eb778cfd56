"""The end of a job in parts: made by a worker from the signed ends of all parts, whoever dies or overlaps."""

import threading
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest

from kms_core.container import Core
from kms_core.jobs.execution import results, runner
from kms_core.jobs.execution.runner import run_next
from kms_core.jobs.model import Attempt, Following, Job
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_protocol.errors import RecordRefused
from support.core_jobs import end_of, lines, now, run_job, split_into_parts, submit_items
from support.job_stores import TENANT, events, forge, record

REFUSED = ("failed", "record_refused")
ITEMS = 1_001  # three parts


def submit(core: Core, bad: Collection[int] = ()) -> list[str]:
    """The ids of a job that was cut into three parts, and of those."""
    job_id = submit_items(core, ITEMS, bad)
    return [job_id, *split_into_parts(core, job_id)]


def run(core: Core, *job_ids: str) -> None:
    for job_id in job_ids:
        run_job(job_id, core.worker_context, "w/1")


def successes(core: Core) -> int:
    return sum(event["type"] == "kms.job.succeeded" for event in events(core.worker_context.store))


def skip(core: Core, job_id: str, part: str, **fields: bytes) -> None:
    """Make a part that nobody ran look as if it had ended."""
    forge(core.worker_context.store, part, state="succeeded", error="", items_failed="0", **fields)
    core.worker_context.store.redis.hincrby(f"kms:job:{job_id}", "parts_left", -1)


@pytest.fixture
def unended(core: Core, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A job whose parts have all succeeded; its worker was killed before it could end the whole."""
    job_id, *parts = submit(core)
    with monkeypatch.context() as patched:
        patched.setattr(runner, "end_parent", lambda job, _: job)
        run(core, *parts)
    assert (now(core, job_id).state, now(core, job_id).parts_left) == ("running", 0)
    assert now(core, job_id).parts_ended
    assert successes(core) == 0
    return [job_id, *parts]


def result(core: Core, job_id: str) -> results.Result:
    return results.of(now(core, job_id), core.worker_context.store, core.worker_context.spool)


# -- together ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(), (700, 3)], ids=["good", "bad"])
def test_end_of_the_whole_is_signed_with_the_sums_of_its_parts(core: Core, bad: tuple[int, ...]) -> None:
    counter = metrics.JOBS.labels("encrypt", "failed" if bad else "succeeded")
    before = counter._value.get()  # noqa: SLF001 -- as its own tests do
    job_id, *parts = submit(core, bad)
    run(core, *parts)
    job = now(core, job_id)

    assert (job.state, job.error) == (("failed", "items_failed") if bad else ("succeeded", ""))
    assert (job.items, job.items_done, job.items_failed) == (ITEMS, ITEMS, len(bad))
    assert job.end
    assert (job.end.parts, len(job.end.result_digest)) == (3, 32)
    assert job.bytes_done == sum(core.worker_context.store.part(part).job.bytes for part in parts)
    assert counter._value.get() == before + 1  # noqa: SLF001 -- as above


# -- workers that die, and that overlap -----------------------------------------------------------------


def test_last_part_extends_the_lease_of_the_whole(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one nobody would end the whole, if the worker of that part dies."""
    job_id, *parts = submit(core)
    monkeypatch.setattr(runner, "end_parent", lambda job, _: job)
    leased = [core.worker_context.store.redis.zscore("kms:leased", job_id)]
    for part in parts:
        run(core, part)
        leased.append(core.worker_context.store.redis.zscore("kms:leased", job_id))

    assert [until == leased[0] for until in leased] == [True, True, True, False]


def test_reaper_sends_for_another_worker(core: Core, unended: list[str]) -> None:
    job_id, *_ = unended
    store = core.worker_context.store
    reaper = Reaper(store, "r1")
    reaper.step()
    assert store.next("w/1", QUEUES, woken=False) is None  # the worker has some seconds

    forge(store, job_id, lease_until="0")
    store.redis.zadd("kms:leased", {job_id: 0})
    reaper.step()
    assert run_next(core.worker_context, Following("w/1", QUEUES, lambda: False), woken=False)

    assert end_of(core, job_id) == ("succeeded", "")
    assert now(core, job_id).end


@pytest.mark.parametrize("expires_in_s", [60, -1])
def test_message_that_comes_early_ends_the_whole_too(
    core: Core, unended: list[str], expires_in_s: float
) -> None:
    """Also after its expiry: its work was done in time, and no attempt begins."""
    forge(core.worker_context.store, unended[0], expires_at=str(time.time() + expires_in_s))
    run(core, unended[0], unended[0])

    assert end_of(core, unended[0]) == ("succeeded", "")


def test_two_workers_that_end_the_last_parts_come_to_one_end(core: Core) -> None:
    job_id, first, *last = submit(core)
    run(core, first)
    meet = threading.Barrier(2)

    class Meeting(JobStore):
        def end_parent(self, job: Job, *rest: object) -> None:
            seen.append(job.job_id)
            meet.wait(30)  # both have looked at the whole before one ends it
            super().end_parent(job, *rest)  # type: ignore[arg-type]  # what it was given

        def finish(self, claim: Attempt, *rest: object) -> None:
            meet.wait(30)
            super().finish(claim, *rest)  # type: ignore[arg-type]  # what it was given
            meet.wait(30)  # both have finished before one looks at the whole

    seen: list[str] = []
    found = core.worker_context.store
    store = Meeting(found.redis, found.record_key, lambda *_: None, found.section)
    worker_context = replace(core.worker_context, store=store)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: run_job(part, worker_context, f"w{part}/1"), last))

    assert seen == [job_id, job_id]
    assert end_of(core, job_id) == ("succeeded", "")
    assert successes(core) == 1


def test_worker_of_an_earlier_attempt_does_not_end_it(core: Core, unended: list[str]) -> None:
    store = core.worker_context.store
    runner.end_parent(msgspec.structs.replace(now(core, unended[0]), attempt_id="earlier"), store)

    assert now(core, unended[0]).state == "running"


def test_cancelled_in_between_it_ends_as_cancelled(core: Core, unended: list[str]) -> None:
    core.worker_context.store.cancel(unended[0], TENANT)
    run(core, unended[0])

    assert end_of(core, unended[0]) == ("cancelled", "cancelled")
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []


# -- what others write -------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [(), ("end",), ("end", "sealed")], ids=str)
def test_part_that_nobody_ran_makes_the_whole_refused(core: Core, taken: tuple[str, ...]) -> None:
    """Also with the end of another part."""
    job_id, skipped, other, last = submit(core)
    store = core.worker_context.store
    run(core, other)
    skip(core, job_id, skipped, **{name: record(store, other)[name.encode()] for name in taken})
    run(core, last)

    assert end_of(core, job_id) == REFUSED
    assert [job.job_id for job in store.dead(TENANT, 10)] == [job_id]


@pytest.mark.parametrize(
    "forged",
    [{}, {"parts": "2"}, {"parts": "2", "split": ""}, {"split": "another job's"}],
    ids=str,
)
def test_part_cannot_be_left_out(core: Core, forged: dict[str, str | bytes]) -> None:
    job_id, first, second, _ = submit(core)
    run(core, first, second)
    store = core.worker_context.store
    if forged.get("split") == "another job's":
        forged = {"split": record(store, submit(core)[0])[b"split"]}
    forge(store, job_id, parts_left="0", **forged)
    run(core, job_id)

    assert end_of(core, job_id) == REFUSED


@pytest.mark.parametrize("forged", [{"sealed": b"junk"}, {"end": b"junk"}, {}], ids=str)
def test_changed_record_of_a_part_makes_the_whole_refused(
    core: Core, unended: list[str], forged: dict[str, bytes]
) -> None:
    """Or a missing one."""
    change(core, unended[2], forged)
    run(core, unended[0])

    assert end_of(core, unended[0]) == REFUSED


def change(core: Core, job_id: str, forged: Mapping[str, str | bytes]) -> None:
    """Write these fields into a record, or delete it where there are none."""
    if forged:
        forge(core.worker_context.store, job_id, **forged)
    else:
        core.worker_context.store.redis.delete(f"kms:job:{job_id}")


def test_plain_counts_of_parts_are_not_believed(core: Core, unended: list[str]) -> None:
    job_id, *parts = unended
    for name in unended:
        forge(core.worker_context.store, name, items_failed="7", items="9", items_done="9", bytes="1")
    run(core, job_id)

    job = now(core, job_id)
    assert (job.state, job.items, job.items_done, job.items_failed) == ("succeeded", ITEMS, ITEMS, 0)
    assert job.bytes_done == sum(core.worker_context.store.part(part).job.bytes for part in parts)


@pytest.mark.parametrize("field", ["end", "split"])
def test_end_of_the_whole_is_refused_once_it_was_changed(core: Core, field: str) -> None:
    job_id, *parts = submit(core)
    run(core, *parts)
    core.worker_context.store.redis.hdel(f"kms:job:{job_id}", field)

    assert end_of(core, job_id) == (REFUSED if field == "end" else ("succeeded", ""))


def given_up(core: Core, part: str) -> None:
    """Have the part used up its attempts."""
    forge(core.worker_context.store, part, attempt=str(core.worker_context.store.rules.attempts))


@pytest.mark.parametrize(
    ("is_given_up", "forged"),
    [
        (False, {"state": "failed", "error": "denied"}),
        (False, {"state": "junk"}),
        (False, {"end": b"junk"}),
        (False, {"sealed": b"junk"}),
        (False, {}),
        (True, {"sealed": b"junk"}),
        (True, {}),
    ],
    ids=str,
)
def test_result_is_refused_once_a_part_was_changed(
    core: Core, forged: dict[str, str | bytes], *, is_given_up: bool
) -> None:
    """Or is missing."""
    job_id, first, *others = submit(core)
    if is_given_up:
        given_up(core, first)
    run(core, first, *others)
    assert result(core, job_id).size
    change(core, first, forged)

    with pytest.raises(RecordRefused):
        result(core, job_id)


def test_given_up_part_has_a_line_for_each_item_that_it_was_cut_with(core: Core) -> None:
    """Its plain count is not signed: a large one would cost as much memory when the result is read."""
    job_id, first, *others = submit(core)
    given_up(core, first)
    run(core, first, *others)
    assert end_of(core, job_id) == ("failed", "items_failed")
    before = result(core, job_id).size
    forge(core.worker_context.store, first, items=str(10**6))

    assert result(core, job_id).size == before
    assert [line["index"] for line in lines(core, job_id)] == list(range(ITEMS))


def test_refused_whole_is_cut_anew_by_a_retry(core: Core, unended: list[str]) -> None:
    job_id, *parts = unended
    store = core.worker_context.store
    forge(store, parts[1], end=b"junk")
    run(core, job_id)
    stale = record(store, parts[1])
    store.retry(job_id, TENANT)
    run(core, job_id)
    assert [store.part(part).job.state for part in parts] == ["queued"] * 3
    assert int(record(store, parts[1])[b"fence"]) > int(stale[b"fence"])
    run(core, *parts)

    job = now(core, job_id)
    assert (job.state, job.items_done, job.items_failed) == ("succeeded", ITEMS, 0)


def test_part_of_an_earlier_life_does_not_count(core: Core) -> None:
    """Its end fits its record. But the job was cut anew since then, and that part has not run."""
    job_id, skipped, *others = submit(core)
    store = core.worker_context.store
    run(core, skipped)
    accepted, earlier = store.accepted(job_id), record(store, skipped)
    for name in (job_id, skipped, *others):
        store.redis.delete(f"kms:job:{name}")
    store.submit(accepted)
    run(core, job_id)
    forge(store, skipped, **{name.decode(): value for name, value in earlier.items()})
    store.redis.hincrby(f"kms:job:{job_id}", "parts_left", -1)
    run(core, *others)

    assert store.part(skipped).job.state == "succeeded"
    assert end_of(core, job_id) == REFUSED
