"""The end of a job in parts: made by a worker from the signed ends of all parts, whoever dies or overlaps."""

import json
import threading
import time
from pathlib import Path
from typing import cast

import msgspec
import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution import results, runner
from kms_core.jobs.execution.runner import run_job, run_next
from kms_core.jobs.model import Attempt, Following, Job, part_id
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.spec import BULK, QUEUES
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_core.observability import metrics
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import RecordRefused
from support.job_stores import TENANT, forge, record

WHO = Principal("local")
CONTEXT = Context.parse("env=test")
REFUSED = ("failed", "record_refused")
ITEMS = 1_001  # three parts
FORGED = {"state": "succeeded", "error": "", "items_failed": "0"}


def submit(core: Core, bad: frozenset[int] = frozenset()) -> list[str]:
    """The ids of a job that was cut into three parts, and of those."""
    items = (
        wire.JobItem(plaintext=b"x", context="no equals sign" if index in bad else None)
        for index in range(ITEMS)
    )
    job_id = core.submitter.items(SubmissionOptions(WHO, "encrypt", CONTEXT), items).job_id
    run_job(job_id, core.worker_context, "w/1")
    return [job_id, *(part_id(job_id, number) for number in range(3))]


def run(core: Core, *job_ids: str) -> None:
    for job_id in job_ids:
        run_job(job_id, core.worker_context, "w/1")


def now(core: Core, job_id: str) -> Job:
    return core.worker_context.store.get(job_id, TENANT)


def told(core: Core, job_id: str) -> tuple[str, str]:
    job = now(core, job_id)
    return job.state, job.error


def events(core: Core) -> list[str]:
    stream = cast(
        "list[tuple[bytes, dict[bytes, bytes]]]", core.worker_context.store.redis.xrange("kms:events")
    )
    return [fields[b"type"].decode() for _, fields in stream]


@pytest.fixture
def unended(core: Core, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A job whose parts have all succeeded; its worker was killed before it could end the whole."""
    job_id, *parts = submit(core)
    with monkeypatch.context() as patched:
        patched.setattr(runner, "end_parent", lambda job, _: job)
        run(core, *parts)
    assert (now(core, job_id).state, now(core, job_id).parts_left) == ("running", 0)
    return [job_id, *parts]


# -- together ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [frozenset[int](), frozenset({700, 3})], ids=["good", "bad"])
def test_end_of_the_whole_is_signed_with_the_sums_of_its_parts(core: Core, bad: frozenset[int]) -> None:
    job_id, *parts = submit(core, bad)
    run(core, *parts)
    job = now(core, job_id)

    assert (job.state, job.error) == (("failed", "items_failed") if bad else ("succeeded", ""))
    assert (job.items, job.items_done, job.items_failed) == (ITEMS, ITEMS, len(bad))
    assert job.end
    assert (job.end.parts, len(job.end.result_digest)) == (3, 32)
    assert job.bytes_done == sum(core.worker_context.store.part(part).job.bytes for part in parts)


def test_end_of_the_whole_is_counted(core: Core) -> None:
    before = metrics.JOBS.labels("encrypt", "succeeded")._value.get()  # noqa: SLF001 -- as its own tests do
    _, *parts = submit(core)
    run(core, *parts)

    assert metrics.JOBS.labels("encrypt", "succeeded")._value.get() == before + 1  # noqa: SLF001 -- as above


def test_whole_has_not_ended_before_a_worker_has_ended_it(core: Core, unended: list[str]) -> None:
    job_id, *_ = unended

    assert "kms.job.succeeded" not in events(core)
    assert now(core, job_id).parts_ended


# -- workers that die, and that overlap -----------------------------------------------------------------


def test_reaper_sends_for_another_worker(core: Core, unended: list[str]) -> None:
    job_id, *_ = unended
    store = core.worker_context.store
    reaper = Reaper(store, core.worker_context.spool, "r1")
    reaper.reap()
    assert store.next("w/1", BULK, QUEUES, woken=False) is None  # the worker has some seconds

    forge(store, job_id, lease_until="0")
    store.redis.zadd("kms:leased", {job_id: 0})
    reaper.reap()
    assert run_next(core.worker_context, Following("w/1", [BULK, *QUEUES], lambda: False), woken=False)

    assert told(core, job_id) == ("succeeded", "")
    assert now(core, job_id).end


def test_message_that_comes_early_ends_the_whole_too(core: Core, unended: list[str]) -> None:
    run(core, unended[0], unended[0])

    assert told(core, unended[0]) == ("succeeded", "")


def test_whole_is_ended_after_its_expiry_too(core: Core, unended: list[str]) -> None:
    """Its work was done in time; no attempt begins."""
    forge(core.worker_context.store, unended[0], expires_at=str(time.time() - 1), lease_until="0")
    run(core, unended[0])

    assert told(core, unended[0]) == ("succeeded", "")


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
    worker_context = type(core.worker_context)(
        core.kms, store, core.worker_context.spool, core.worker_context.places
    )
    threads = [threading.Thread(target=run_job, args=(part, worker_context, f"w{part}/1")) for part in last]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == [job_id, job_id]
    assert told(core, job_id) == ("succeeded", "")
    assert events(core).count("kms.job.succeeded") == 1


def test_worker_of_an_earlier_attempt_does_not_end_it(core: Core, unended: list[str]) -> None:
    store = core.worker_context.store
    runner.end_parent(msgspec.structs.replace(now(core, unended[0]), attempt_id="earlier"), store)

    assert now(core, unended[0]).state == "running"


def test_cancelled_in_between_it_ends_as_cancelled(core: Core, unended: list[str]) -> None:
    core.worker_context.store.cancel(unended[0], TENANT)
    run(core, unended[0])

    assert told(core, unended[0]) == ("cancelled", "cancelled")
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []


# -- what others write -------------------------------------------------------------------------------


def test_part_that_nobody_ran_makes_the_whole_refused(core: Core) -> None:
    job_id, skipped, *others = submit(core)
    store = core.worker_context.store
    forge(store, skipped, **FORGED)
    store.redis.hincrby(f"kms:job:{job_id}", "parts_left", -1)
    run(core, *others)

    assert told(core, job_id) == REFUSED
    assert [job.job_id for job in store.dead(TENANT, 10)] == [job_id]


@pytest.mark.parametrize("taken", [("end",), ("end", "sealed")], ids=str)
def test_end_of_another_part_does_not_prove_one(core: Core, taken: tuple[str, ...]) -> None:
    job_id, skipped, other, last = submit(core)
    store = core.worker_context.store
    run(core, other)
    stolen = {name: record(store, other)[name.encode()] for name in taken}
    forge(store, skipped, **FORGED, **stolen)
    store.redis.hincrby(f"kms:job:{job_id}", "parts_left", -1)
    run(core, last)

    assert told(core, job_id) == REFUSED


@pytest.mark.parametrize(
    "forged",
    [
        {"parts_left": "0"},
        {"parts": "2", "parts_left": "0"},
        {"parts": "2", "parts_left": "0", "split": ""},
        {"parts_left": "0", "split": "other"},
    ],
    ids=str,
)
def test_part_cannot_be_left_out(core: Core, forged: dict[str, str]) -> None:
    job_id, first, second, _ = submit(core)
    run(core, first, second)
    store = core.worker_context.store
    other, *_ = submit(core)
    if forged.get("split") == "other":
        forge(store, job_id, parts_left="0", split=record(store, other)[b"split"])
    else:
        forge(store, job_id, **forged)
    run(core, job_id)

    assert told(core, job_id) == REFUSED


@pytest.mark.parametrize("field", ["sealed", "end"])
def test_changed_record_of_a_part_makes_the_whole_refused(core: Core, unended: list[str], field: str) -> None:
    forge(core.worker_context.store, unended[2], **{field: b"junk"})
    run(core, unended[0])

    assert told(core, unended[0]) == REFUSED


def test_part_that_is_not_there_makes_the_whole_refused(core: Core, unended: list[str]) -> None:
    core.worker_context.store.redis.delete(f"kms:job:{unended[2]}")
    run(core, unended[0])

    assert told(core, unended[0]) == REFUSED


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

    assert told(core, job_id) == (REFUSED if field == "end" else ("succeeded", ""))


@pytest.mark.parametrize(
    "forged",
    [{"state": "failed", "error": "denied"}, {"end": b"junk"}, {"sealed": b"junk"}, {"state": "junk"}, {}],
    ids=str,
)
def test_result_is_refused_once_a_part_was_changed(core: Core, forged: dict[str, str | bytes]) -> None:
    """Or is missing."""
    job_id, *parts = submit(core)
    run(core, *parts)
    assert results.of(now(core, job_id), core.worker_context.store, core.worker_context.spool).size
    if forged:
        forge(core.worker_context.store, parts[1], **forged)
    else:
        core.worker_context.store.redis.delete(f"kms:job:{parts[1]}")

    with pytest.raises(RecordRefused):
        results.of(now(core, job_id), core.worker_context.store, core.worker_context.spool)


def test_given_up_part_has_a_line_for_each_item_that_it_was_cut_with(core: Core) -> None:
    """Its plain count is not signed: a large one would cost as much memory when the result is read."""
    job_id, given_up, *parts = submit(core)
    store = core.worker_context.store
    forge(store, given_up, attempt=str(store.rules.attempts))
    run(core, given_up, *parts)
    assert told(core, job_id) == ("failed", "items_failed")
    before = results.of(now(core, job_id), store, core.worker_context.spool).size
    forge(store, given_up, items=str(10**6))

    result = results.of(now(core, job_id), store, core.worker_context.spool)
    assert result.size == before
    lines = b"".join(map(bytes, result.slabs(0, result.size))).splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(ITEMS))


@pytest.mark.parametrize("gone", [False, True])
def test_given_up_part_whose_record_was_changed_makes_the_result_refused(core: Core, *, gone: bool) -> None:
    job_id, given_up, *parts = submit(core)
    store = core.worker_context.store
    forge(store, given_up, attempt=str(store.rules.attempts))
    run(core, given_up, *parts)
    if gone:
        store.redis.delete(f"kms:job:{given_up}")
    else:
        forge(store, given_up, sealed=b"junk")

    with pytest.raises(RecordRefused):
        results.of(now(core, job_id), store, core.worker_context.spool)


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
    assert told(core, job_id) == REFUSED


# -- jobs over many files ------------------------------------------------------------------------------


def test_log_of_an_earlier_life_settles_no_file(core: Core, tmp_path: Path) -> None:
    """Or files that were never written would count as done."""
    root = tmp_path / "state" / "files"
    (root / "in").mkdir()
    (root / "in" / "a").write_bytes(b"a")
    body = wire.JobIn(kind="encrypt", source=f"file://{root}/in/*", target=f"file://{root}/out/")
    job_id = core.submitter.submit(SubmissionOptions(WHO, "encrypt", CONTEXT), body).job_id
    part, store = part_id(job_id, 0), core.worker_context.store
    run(core, job_id, part)
    accepted, log = store.accepted(job_id), record(store, part)[b"log"]
    for name in (job_id, part):
        store.redis.delete(f"kms:job:{name}")
    (root / "out" / "a.age").unlink()
    store.submit(accepted)
    run(core, job_id)
    forge(store, part, log=log)
    run(core, part)

    assert store.part(part).job.error == "record_refused"
    assert told(core, job_id) == ("failed", "items_failed")
