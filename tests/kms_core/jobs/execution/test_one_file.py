"""What a worker does with a job from file to file: each way to die in the middle, and what is left behind."""

import contextvars
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kms_core import audit
from kms_core.container import Core
from kms_core.jobs.storage.local import OpenSource, Roots
from kms_protocol.errors import JobsUnavailable, PathRefused
from kms_protocol.wire import JobKind
from support.audit_logs import room_for
from support.core_jobs import (
    NEW,
    done,
    end_of,
    now,
    opened,
    run_after_lease_expiry,
    run_job,
    submit,
    submit_items,
)
from support.failing_store import CRASH_POINTS, Killed, run_until_killed, worker_calling_at
from support.file_tree import names
from support.job_stores import forge

DATA = bytes(range(256)) * 10_000  # 2.5 MB: three slabs


@pytest.fixture
def files(files: Path) -> Path:
    """The root of file jobs of ``core``, with one file."""
    (files / "in").write_bytes(DATA)
    return files


# -- what is logged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["succeeded", "failed", "committing"])
def test_lines_after_a_job_do_not_carry_its_ids(core: Core, files: Path, end: str) -> None:
    """Also where it was cut off."""

    def run() -> tuple[str, str, str]:
        job_id = submit(core, "encrypt", files / "in", files / "out")
        if end == "failed":
            (files / "in").unlink()
        if end == "committing":
            run_until_killed(core, job_id, "finish", after=False)
        else:
            run_job(job_id, core.worker_context, "w")
        return now(core, job_id).state, audit.request_id.get(), audit.job_id.get()

    assert contextvars.Context().run(run) == (end, "", "")


# -- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 1_048_576, 3_000_001], ids=str)
def test_file_goes_there_and_back(core: Core, files: Path, size: int) -> None:
    data = os.urandom(size)
    (files / "in").write_bytes(data)

    sealed = done(core, "encrypt", files / "in", files / "sealed")
    back = done(core, "decrypt", files / "sealed", files / "back")

    assert (sealed.state, sealed.bytes_done, back.state) == ("succeeded", size, "succeeded")
    assert (files / "back").read_bytes() == data
    assert names(files) == ["back", "in", "sealed"]
    assert {path.stat().st_mode & 0o777 for path in (files / "sealed", files / "back")} == {0o600}


def file_id(path: Path) -> str:
    """The id of a file, from its nonce: in an age file the 16 bytes after the line of the header's MAC."""
    data = path.read_bytes()
    mac_line = data.index(b"\n", data.index(b"\n--- ") + 1)
    label = b"kms-service/file-id/1"
    parts = [len(part).to_bytes(4, "big") + part for part in (label, data[mac_line + 1 :][:16])]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


@pytest.mark.parametrize("kind", ["encrypt", "decrypt", "rewrap", "reseal"])
def test_job_names_the_file_that_it_made_or_opened(core: Core, files: Path, kind: JobKind) -> None:
    done(core, "encrypt", files / "in", files / "sealed")
    new = NEW if kind == "rewrap" else None
    job = done(core, kind, files / ("in" if kind == "encrypt" else "sealed"), files / "out", new=new)

    assert job.end
    assert job.end.file_id == file_id(files / ("sealed" if kind == "decrypt" else "out"))
    assert (job.end.file_id == file_id(files / "sealed")) is (kind in {"decrypt", "rewrap"})


def test_overwriting_replaces_and_may_replace_the_source(core: Core, files: Path) -> None:
    (files / "out").write_bytes(b"old")

    assert done(core, "encrypt", files / "in", files / "out", overwrite=True).state == "succeeded"
    assert done(core, "encrypt", files / "in", files / "in", overwrite=True).state == "succeeded"

    assert opened(core, files / "out") == opened(core, files / "in") == DATA
    assert names(files) == ["in", "out"]


def test_source_that_becomes_a_link_after_submission_is_refused(core: Core, files: Path) -> None:
    job_id = submit(core, "encrypt", files / "in", files / "out")
    (files / "in").unlink()
    (files / "in").symlink_to("/etc/hostname")

    run_job(job_id, core.worker_context, "w")

    assert end_of(core, job_id) == ("failed", "path_refused")
    assert names(files) == ["in"]


@pytest.mark.parametrize(
    "place", ["keys", "spool.key", "spool/x", "audit/x", "../outside", "files/../spool.key"]
)
def test_path_outside_the_roots_is_refused(core: Core, files: Path, place: str) -> None:
    for source, target in ((files / "in", files.parent / place), (files.parent / place, files / "out")):
        with pytest.raises(PathRefused):
            submit(core, "encrypt", source, target)


class ConcurrentWriter(Roots):
    """Whoever opens a source here finds that somebody else writes to it."""

    @contextmanager
    def open_source(self, url: str, *, may_have_links: bool = False) -> Iterator[OpenSource]:
        with super().open_source(url, may_have_links=may_have_links) as found:
            with Path(unquote(urlsplit(url).path)).open("ab") as file:
                file.write(b"more")
            yield found


def test_source_that_changes_meanwhile_fails_the_job(core: Core, files: Path) -> None:
    job_id = submit(core, "encrypt", files / "in", files / "out")

    places = replace(core.worker_context.places, roots=ConcurrentWriter([files]))
    run_job(job_id, replace(core.worker_context, places=places), "w")

    assert end_of(core, job_id) == ("failed", "invalid_request")
    assert names(files) == ["in"]


def test_file_that_may_not_be_that_large_fails_at_once(core: Core, files: Path) -> None:
    """To wait for room would be in vain."""
    job_id = submit(core, "encrypt", files / "in", files / "out")
    with room_for(len(DATA)):
        run_job(job_id, core.worker_context, "w")

    assert end_of(core, job_id) == ("failed", "path_refused")
    assert names(files) == ["in"]


@pytest.mark.parametrize("at", [-1, 1_500_000, 100], ids=["last", "middle", "header"])
def test_damaged_file_leaves_no_target(core: Core, files: Path, at: int) -> None:
    done(core, "encrypt", files / "in", files / "sealed")
    damaged = bytearray((files / "sealed").read_bytes())
    damaged[at] ^= 1
    (files / "sealed").write_bytes(damaged)

    job = done(core, "decrypt", files / "sealed", files / "out")

    assert (job.state, job.error) == ("failed", "decrypt_failed")
    assert names(files) == ["in", "sealed"]


# -- killed in the middle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("death", CRASH_POINTS, ids=["-".join(moment) for moment in CRASH_POINTS])
@pytest.mark.parametrize("how", ["encrypt", "encrypt over", "decrypt", "decrypt over", "Redis is lost"])
def test_job_of_a_killed_worker_is_finished_once(
    core: Core, files: Path, death: tuple[str, str], how: str
) -> None:
    kind: JobKind = "decrypt" if how.startswith("decrypt") else "encrypt"
    overwrite, (moment, step) = how.endswith("over"), death
    done(core, "encrypt", files / "in", files / "sealed")
    source = files / ("in" if kind == "encrypt" else "sealed")
    if overwrite:
        (files / "out").write_bytes(b"old")
    job_id = submit(core, kind, source, files / "out", overwrite=overwrite)

    error = JobsUnavailable if how == "Redis is lost" else Killed
    run_until_killed(core, job_id, step, after=moment == "after", error=error)
    placed = (files / "out").stat() if step == "finish" else None
    run_after_lease_expiry(core, job_id)
    job = now(core, job_id)

    assert (job.state, job.error) == ("succeeded", "")
    assert (opened(core, files / "out") if kind == "encrypt" else (files / "out").read_bytes()) == DATA
    assert names(files) == ["in", "out", "sealed"]
    if placed:
        assert (files / "out").stat().st_ino == placed.st_ino
    assert job.end
    assert job.end.file_id == file_id(files / ("out" if kind == "encrypt" else "sealed"))


def test_target_taken_before_the_finish_is_left_alone(core: Core, files: Path) -> None:
    job_id = submit(core, "encrypt", files / "in", files / "out")
    run_until_killed(core, job_id, "committing", after=True)
    (files / "out").write_bytes(b"somebody else's")

    run_after_lease_expiry(core, job_id)

    assert end_of(core, job_id) == ("failed", "target_exists")
    assert (files / "out").read_bytes() == b"somebody else's"
    assert names(files) == ["in", "out"]


def test_worker_that_was_overtaken_has_no_effect(core: Core, files: Path) -> None:
    job_id = submit(core, "encrypt", files / "in", files / "out")

    def overtake() -> None:
        forge(core.worker_context.store, job_id, lease_until="0")
        run_job(job_id, core.worker_context, "w2")

    run_job(job_id, worker_calling_at(core, "committing", overtake, after=False), "w1")

    assert (now(core, job_id).state, now(core, job_id).fence) == ("succeeded", 2)
    assert opened(core, files / "out") == DATA
    assert names(files) == ["in", "out"]


# -- other kinds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_bulk_job_of_a_killed_worker_has_one_result(core: Core, *, after: bool) -> None:
    job_id = submit_items(core, 20)

    run_until_killed(core, job_id, "finish", after=after)
    run_after_lease_expiry(core, job_id)
    job = now(core, job_id)

    assert (job.state, job.items_done, job.items_failed) == ("succeeded", 20, 0)


def test_outage_costs_time_and_no_attempt(core: Core, files: Path) -> None:
    """From 5 s on twice as long each time, up to a minute, of which the upper half is random."""
    audit, store = files.parent / "audit", core.worker_context.store
    job_id = submit(core, "encrypt", files / "in", files / "out")
    audit.rename(files.parent / "kept")
    audit.write_text("a file where the folder of the trail should be")

    for number in range(10):
        run_job(job_id, core.worker_context, "w")
        assert (now(core, job_id).state, now(core, job_id).attempt) == ("queued", 0)
        longest = min(60, 5 * 2**number)
        assert longest / 2 - 2 < now(core, job_id).not_before - store.now() <= longest + 0.5
        assert names(files) == ["in"]
        forge(store, job_id, not_before="0")
    audit.unlink()
    run_job(job_id, core.worker_context, "w")

    assert (now(core, job_id).state, now(core, job_id).attempt) == ("succeeded", 1)
