"""Workers go by the sealed expiry and their own clock: an old job that is put back changes no file."""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import msgspec
import pytest

from kms_core.container import Core
from kms_core.jobs.model import Attempt
from kms_core.jobs.spec import ClocksApart
from kms_core.jobs.store.store import JobStore
from support.core_jobs import now, run_job, split_into_parts, submit, submit_items
from support.failing_store import run_until_killed, worker_calling_at, worker_calling_at_each_step
from support.file_tree import names
from support.job_stores import COMMIT, clock_ahead, forge, later, put_back_as_due, record, take

NEWER = b"written later, by somebody else"


def overwrite(core: Core, files: Path) -> str:
    (files / "in").write_bytes(b"salary")
    (files / "out").write_bytes(b"before")
    return submit(core, "encrypt", files / "in", files / "out", overwrite=True)


def age(core: Core, job_id: str, seconds: float) -> None:
    """The sealed record as it looks so long after its expiry, with plain fields that say otherwise."""
    store = core.worker_context.store
    at, far = time.time() - seconds, str(time.time() + 3600)
    old = msgspec.structs.replace(store.accepted(job_id), expires_at=at, start_by=at, run_by=at)
    forge(store, job_id, sealed=store.record_key.seal(old), expires_at=far, start_by=far, run_by=far)


def ended(core: Core, job_id: str) -> tuple[str, str]:
    """The state of a job, and why it failed."""
    found = record(core.worker_context.store, job_id)
    return found[b"state"].decode(), found[b"error"].decode()


def test_clock_that_goes_ahead_while_a_job_runs_puts_nothing_in_place(core: Core, files: Path) -> None:
    job_id = overwrite(core, files)
    claim = take(core.worker_context.store, job_id)

    with clock_ahead(), pytest.raises(ClocksApart):
        core.worker_context.store.committing(claim, COMMIT)
    assert record(core.worker_context.store, job_id)[b"state"] == b"running"


@pytest.mark.parametrize(("past_s", "end"), [(50, ("succeeded", "")), (70, ("failed", "expired"))])
def test_worker_has_the_last_word_on_expiry(
    core: Core, files: Path, past_s: float, end: tuple[str, str]
) -> None:
    """With a minute's leeway, since clocks differ."""
    over_a_file = overwrite(core, files)
    over_items = submit_items(core)
    for job_id in (over_a_file, over_items):
        age(core, job_id, past_s)
        run_job(job_id, core.worker_context, "w/1")

        assert ended(core, job_id) == end
    assert ((files / "out").read_bytes() == b"before") is (end[0] == "failed")
    blobs = cast("list[bytes]", core.worker_context.store.redis.hkeys(f"kms:blobs:{over_items}"))
    assert any(name.startswith(b"result") for name in blobs) is (end[0] == "succeeded")


def begun(core: Core, files: Path, step: str = "committing", *, after: bool = True) -> str:
    """An overwrite whose worker died around its commit."""
    job_id = overwrite(core, files)
    run_until_killed(core, job_id, step, after=after)
    return job_id


@pytest.mark.parametrize("is_commit", [False, True], ids=["job", "commit"])
def test_overwrite_job_that_is_put_back_does_not_overwrite_again(
    core: Core, files: Path, *, is_commit: bool
) -> None:
    job_id = begun(core, files) if is_commit else overwrite(core, files)
    dump = record(core.worker_context.store, job_id)
    forge(core.worker_context.store, job_id, lease_until="0")
    run_job(job_id, core.worker_context, "w/2")
    assert now(core, job_id).state == "succeeded"
    (files / "out").unlink()
    (files / "out").write_bytes(NEWER)
    put_back_as_due(core.worker_context.store, job_id, dump)
    with later():
        run_job(job_id, core.worker_context, "w/3")

    assert ended(core, job_id) == ("failed", "expired")
    assert (files / "out").read_bytes() == NEWER


def test_commit_that_is_put_back_with_its_temporary_file_puts_nothing_in_place(
    core: Core, files: Path
) -> None:
    job_id = begun(core, files)
    (files / "out").write_bytes(NEWER)
    put_back_as_due(core.worker_context.store, job_id, record(core.worker_context.store, job_id))
    with later():
        run_job(job_id, core.worker_context, "w/2")

    assert ended(core, job_id) == ("failed", "expired")
    assert (files / "out").read_bytes() == NEWER
    assert names(files) == ["in", "out"]


def test_file_that_was_put_in_place_in_time_is_recognised_after_the_expiry(core: Core, files: Path) -> None:
    """Its worker died between the rename and the end."""
    job_id = begun(core, files, "finish", after=False)
    placed = (files / "out").stat().st_ino
    forge(core.worker_context.store, job_id, lease_until="0")
    with later(core.worker_context.store.accepted(job_id).run_by - time.time() + 70):
        run_job(job_id, core.worker_context, "w/2")

    assert ended(core, job_id) == ("succeeded", "")
    assert (files / "out").stat().st_ino == placed
    assert names(files) == ["in", "out"]


def test_worker_whose_clock_is_ahead_leaves_a_commit_to_others(core: Core, files: Path) -> None:
    """A wrong clock must not lose what was accepted."""
    job_id = begun(core, files)
    forge(core.worker_context.store, job_id, lease_until="0")
    with clock_ahead():
        run_job(job_id, core.worker_context, "w/2")

    found = record(core.worker_context.store, job_id)
    assert (found[b"state"], found[b"attempt"]) == (b"committing", b"1")
    assert (files / "out").read_bytes() == b"before"
    forge(core.worker_context.store, job_id, lease_until="0")
    run_job(job_id, core.worker_context, "w/3")
    assert now(core, job_id).state == "succeeded"


def test_commit_of_an_earlier_life_of_the_id_is_refused(core: Core, files: Path) -> None:
    """Or a job whose work was never done would end as succeeded, by what stands at its target already."""
    job_id = begun(core, files, "finish", after=False)
    store = core.worker_context.store
    accepted, commit = store.accepted(job_id), record(store, job_id)[b"commit"]
    store.redis.delete(f"kms:job:{job_id}")
    store.submit(accepted)
    forge(store, job_id, state="committing", commit=commit, fence="1", attempt="1")
    run_job(job_id, core.worker_context, "w/2")

    assert ended(core, job_id) == ("failed", "record_refused")


def test_job_that_expires_while_it_runs_changes_nothing(core: Core, files: Path) -> None:
    job_id = overwrite(core, files)
    with ExitStack() as stack:
        passing = worker_calling_at(core, "committing", lambda: stack.enter_context(later()), after=False)
        run_job(job_id, passing, "w/1")

    assert ended(core, job_id) == ("failed", "expired")
    assert (files / "out").read_bytes() == b"before"
    assert names(files) == ["in", "out"]


# -- jobs over many files ------------------------------------------------------------------------------


@pytest.fixture
def part(core: Core, files: Path) -> str:
    """The part of a job that seals two files of ``in`` into ``out``."""
    (files / "in").mkdir()
    for name in ("a", "b"):
        (files / "in" / name).write_bytes(name.encode())
    job_id = submit(core, "encrypt", f"file://{files}/in/*", f"file://{files}/out/")
    (part,) = split_into_parts(core, job_id)
    return part


def test_part_that_has_expired_writes_no_file(core: Core, files: Path, part: str) -> None:
    with later():
        run_job(part, core.worker_context, "w/1")

    assert ended(core, part) == ("failed", "expired")
    assert not (files / "out").exists()


class ExpiringStore(JobStore):
    """A store at which time passes once a part is claimed."""

    passing: ExitStack

    def claim(self, job_id: str, worker: str) -> Attempt | None:
        claim = super().claim(job_id, worker)
        self.passing.enter_context(later())
        return claim


def test_commit_of_a_part_that_expires_before_it_is_finished_puts_nothing_in_place(
    core: Core, files: Path, part: str
) -> None:
    found = core.worker_context.store
    run_until_killed(core, part, 0, after=True)  # once the commit of the first file is noted
    assert [path.suffix for path in (files / "out").iterdir()] == [".tmp"]
    forge(found, part, lease_until="0")
    aging = ExpiringStore(found.redis, found.record_key, lambda *_: None, found.section)
    with ExitStack() as aging.passing:
        run_job(part, replace(core.worker_context, store=aging), "w/2")

    assert ended(core, part) == ("failed", "expired")
    assert names(files / "out") == []


def test_part_that_expires_while_it_runs_writes_no_further_file(core: Core, files: Path, part: str) -> None:
    with ExitStack() as stack:  # time passes once the commit of the first file is noted
        run_job(
            part, worker_calling_at_each_step(core, lambda _: stack.enter_context(later()), after=True), "w/1"
        )

    assert ended(core, part) == ("failed", "expired")
    assert names(files / "out") == ["a.age"]
