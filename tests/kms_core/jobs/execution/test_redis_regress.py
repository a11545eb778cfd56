"""Jobs after Redis has gone back in time: attempts that are not confused, ends that are recognised."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.model import LeaseLost
from kms_core.jobs.storage.commit_marks import ATTRIBUTE
from kms_core.jobs.store.store import JobStore
from kms_protocol.context import Context
from kms_protocol.errors import Forbidden
from support.core_jobs import CONTEXT, NEW, WHO, done, opened, result, run, run_job, submit, submit_items
from support.embedded_valkey import unrestricted
from support.failing_store import worker_calling_at
from support.file_tree import names
from support.job_options import job_options
from support.job_stores import (
    COMMIT,
    TENANT,
    accepted,
    claimed,
    connect,
    events,
    forge,
    remove_inputs,
    take,
    uploaded,
)
from support.redis_regress import Snapshot

DATA = os.urandom(300_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with unrestricted(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def redis_url(server: str) -> str:
    """That of ``core``."""
    connect(server).flushall()
    return server


@pytest.fixture
def files(files: Path) -> Path:
    """The root of file jobs of ``core``, with one file."""
    (files / "in").write_bytes(DATA)
    return files


def snapshot(core: Core) -> Snapshot:
    return Snapshot.of(core.worker_context.store.redis)


def regressed(core: Core, files: Path) -> tuple[str, Snapshot]:
    """A job that seals ``in`` into ``out``, of whose end Redis knows nothing any more; Redis as it is now."""
    job_id = submit(core, "encrypt", files / "in", files / "out")
    before = snapshot(core)
    assert run(core, job_id).state == "succeeded"
    before.restore()
    return job_id, before


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


# -- attempts ----------------------------------------------------------------------------------------------


def test_two_attempts_of_the_same_number_are_not_confused(core: Core, store: JobStore) -> None:
    job_id = store.submit(accepted()).job_id
    before = snapshot(core)
    first = take(store, job_id)
    before.restore()
    second = take(store, job_id, "w/2")

    assert (first.attempt, first.fence) == (second.attempt, second.fence)
    assert first.attempt_id != second.attempt_id
    with pytest.raises(LeaseLost):
        store.finish(first, "succeeded")
    store.finish(second, "succeeded")
    assert store.get(job_id, TENANT).state == "succeeded"


def test_attempt_ids_have_128_random_bits(store: JobStore) -> None:
    ids = {claimed(store).attempt_id for _ in range(50)}

    assert len(ids) == 50
    assert all(len(each) == 26 and each.isalnum() for each in ids)  # 5 bits a character: 130


def test_commit_that_is_taken_back_leaves_a_running_job(store: JobStore) -> None:
    claim = claimed(store)
    store.committing(claim, COMMIT)

    for _ in range(2):
        store.committing(claim, None)

    assert store.get(claim.accepted.job_id, TENANT).state == "running"
    store.defer(claim, 0)
    assert take(store, claim.accepted.job_id).commit is None


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
def test_zombie_of_a_lost_time_puts_nothing_in_place(core: Core, files: Path, *, overwrite: bool) -> None:
    """It has recorded its commit in a Redis that is no more, and is about to rename."""
    job_id = submit(core, "encrypt", files / "in", files / "out", overwrite=overwrite)
    before, placed = snapshot(core), []

    def regress() -> None:
        before.restore()
        assert run(core, job_id).state == "succeeded"
        placed.append(identity(files / "out"))

    run_job(job_id, worker_calling_at(core, "committing", regress, after=True), "zombie/1")

    assert core.worker_context.store.get(job_id, TENANT).state == "succeeded"
    assert [identity(files / "out")] == placed
    assert opened(core, files / "out") == DATA
    assert names(files) == ["in", "out"]


def test_attempt_whose_result_a_zombie_has_swept_does_it_again(core: Core, files: Path) -> None:
    job_id = submit(core, "encrypt", files / "in", files / "out")

    def sweep() -> None:
        core.worker_context.places.sweep({job_id: (files / "out").as_uri()}, {"z" * 26})

    run_job(job_id, worker_calling_at(core, "committing", sweep, after=True), "w/1")
    waiting = core.worker_context.store.get(job_id, TENANT)
    assert (waiting.state, waiting.attempt, (files / "out").exists()) == ("queued", 0, False)
    forge(core.worker_context.store, job_id, not_before="0")

    assert run(core, job_id).state == "succeeded"
    assert opened(core, files / "out") == DATA


def test_temporary_files_of_all_attempts_but_its_own_are_removed(core: Core, files: Path) -> None:
    """Those of other jobs stay for a month, and so does what only looks like one."""
    job_id = submit(core, "encrypt", files / "in", files / "out")
    left = [f".kms-{job_id}-{attempt}.tmp" for attempt in ("1", "a" * 26, "b" * 26)]
    others = [f".kms-{'0' * 8}{job_id[8:]}-1.tmp", f".kms-{job_id}.tmp", f"{job_id}-1.tmp"]
    forgotten = f".kms-{'1' * 8}{job_id[8:]}-1.tmp"
    for name in [*left, *others, forgotten]:
        (files / name).write_bytes(b"half")
    a_month_ago = time.time() - 32 * 86_400
    for name in (forgotten, others[2]):
        os.utime(files / name, (a_month_ago, a_month_ago))

    assert run(core, job_id).state == "succeeded"
    assert {path.name for path in files.iterdir()} == {"in", "out", *others}


# -- ends --------------------------------------------------------------------------------------------------


class Denied:
    """Allows nothing."""

    def require(
        self, who: Principal, operation: str, key_id: str | None = None, context: Context | None = None
    ) -> None:
        del who, operation, key_id, context
        raise Forbidden

    def sees(self, who: Principal, key_id: str) -> bool:
        del who, key_id
        return False


@pytest.mark.parametrize("how", ["create", "overwrite", "in place"])
@pytest.mark.parametrize("lost", ["nothing", "source", "permission"])
def test_file_that_is_in_place_is_recognised_and_stays(core: Core, files: Path, how: str, lost: str) -> None:
    source, target, kind, new = files / "in", files / "out", "encrypt", None
    if how == "overwrite":
        target.write_bytes(b"old")
    if how == "in place":
        done(core, "encrypt", source, target)
        source, kind, new = target, "reseal", NEW
    job_id = submit(core, kind, source, target, overwrite=how != "create", new=new)  # type: ignore[arg-type]  # a kind
    before = snapshot(core)
    assert run(core, job_id).state == "succeeded"
    placed = identity(target)
    before.restore()
    with pytest.MonkeyPatch.context() as patched:
        if lost == "permission":
            patched.setattr(core.kms, "policy", Denied())
        elif lost == "source" and how != "in place":
            source.unlink()  # by a client that was told that the job has succeeded
        job = run(core, job_id)

    assert (job.state, job.error) == ("succeeded", "")
    assert job.end
    assert job.end.target
    assert (job.end.target.inode, job.end.target.mtime_ns) == placed == identity(target)
    assert opened(core, target, NEW if how == "in place" else CONTEXT) == DATA
    assert not list(files.glob(".kms-*"))


@pytest.mark.parametrize("how", ["create", "overwrite", "in place"])
def test_files_of_a_job_over_many_are_recognised(core: Core, files: Path, how: str) -> None:
    """The job is split again, into parts that are sealed anew; a file has come before all others."""
    (files / "many").mkdir()
    for name in ("b", "c"):
        (files / "many" / name).write_bytes(DATA + name.encode())
    source, target, kind, new = f"file://{files}/many/*", f"file://{files}/out/", "encrypt", None
    if how == "in place":
        done(core, "encrypt", source, target)
        source, target, kind, new = f"{target}*", f"{target}*", "reseal", NEW
    job_id = submit(core, kind, source, target, overwrite=how != "create", new=new)  # type: ignore[arg-type]  # a kind
    before = snapshot(core)
    assert run(core, job_id).state == "succeeded"
    placed = {path.name: identity(path) for path in (files / "out").iterdir()}
    before.restore()
    if how != "in place":
        (files / "many" / "a").write_bytes(DATA)

    job = run(core, job_id)

    assert (job.state, job.items_failed) == ("succeeded", 0)
    assert {name: identity(files / "out" / name) for name in placed} == placed


def forged_copy(path: Path, other: Path) -> None:
    """The same bytes and attributes, in another inode."""
    shutil.copy2(path, other)
    other.replace(path)


def touched(path: Path, other: Path) -> None:
    del other
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def rewritten(path: Path, other: Path) -> None:
    del other
    at = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(at, at))


def unmarked(path: Path, other: Path) -> None:
    del other
    os.removexattr(path, ATTRIBUTE)


def marked_for_another(path: Path, other: Path) -> None:
    del other
    mark = os.getxattr(path, ATTRIBUTE)
    os.setxattr(path, ATTRIBUTE, mark[:-1] + (b"0" if mark[-1:] != b"0" else b"1"))


@pytest.mark.parametrize("change", [forged_copy, touched, rewritten, unmarked, marked_for_another])
def test_other_file_of_that_name_is_not_recognised(
    core: Core, files: Path, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    job_id, _ = regressed(core, files)
    change(files / "out", tmp_path / "other")
    found = identity(files / "out")

    job = run(core, job_id)

    assert (job.state, job.error) == ("failed", "target_exists")
    assert identity(files / "out") == found


def test_result_of_another_job_is_not_recognised(core: Core, files: Path) -> None:
    assert done(core, "encrypt", files / "in", files / "out").state == "succeeded"

    job = done(core, "encrypt", files / "in", files / "out")

    assert (job.state, job.error) == ("failed", "target_exists")


def test_note_takes_the_place_of_a_mark_where_there_are_no_attributes(
    core: Core, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def setxattr(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "as on vfat")

    monkeypatch.setattr(os, "setxattr", setxattr)
    job_id, before = regressed(core, files)
    placed = identity(files / "out")
    assert os.listxattr(files / "out") == []

    assert run(core, job_id).state == "succeeded"
    assert identity(files / "out") == placed
    before.restore()
    touched(files / "out", files)
    assert run(core, job_id).error == "target_exists"


def test_ends_of_two_generations_have_different_ids(store: JobStore) -> None:
    claim = claimed(store, callback="ci")
    job_id, ids = claim.accepted.job_id, set()
    for generation in (0, 1, 2):
        store.finish(claim, "failed", "attempts_exhausted")
        ids.add(events(store)[-1]["id"])
        assert store.get(job_id, TENANT).generation == generation
        store.retry(job_id, TENANT)
        claim = take(store, job_id)
    assert ids == {f"{job_id}.{generation}.failed" for generation in (0, 1, 2)}


# -- the spool ---------------------------------------------------------------------------------------------


def upload(core: Core) -> str:
    return uploaded(core, job_options(WHO, "encrypt", CONTEXT), DATA)


@pytest.mark.parametrize("make", [submit_items, upload], ids=["items", "upload"])
def test_job_over_the_spool_ends_well_again(core: Core, make: Callable[[Core], str]) -> None:
    job_id = make(core)
    before = snapshot(core)
    assert run(core, job_id).state == "succeeded"
    first = result(core, job_id)
    remove_inputs(core, 60)
    before.restore()

    assert run(core, job_id).state == "succeeded"
    assert len(result(core, job_id)) == len(first)
    remove_inputs(core)
    assert len(result(core, job_id)) == len(first)
    assert not core.worker_context.store.redis.hexists(f"kms:blobs:{job_id}", "items")


def test_end_that_was_told_before_is_still_whole_after_a_run_of_a_lost_time(core: Core) -> None:
    """The end that Redis comes back to names the blob of its own attempt, which no other has written to."""
    job_id = submit_items(core)
    before = snapshot(core)
    run(core, job_id)
    first, ended = result(core, job_id), snapshot(core)
    before.restore()
    run(core, job_id)
    assert result(core, job_id) != first

    ended.restore()

    assert result(core, job_id) == first


def test_run_that_fails_deletes_no_result(core: Core) -> None:
    job_id = upload(core)
    before = snapshot(core)
    run(core, job_id)
    first, ended = result(core, job_id), snapshot(core)
    before.restore()
    core.kms.policy = Denied()
    assert run(core, job_id).error == "forbidden"
    remove_inputs(core)
    ended.restore()

    assert result(core, job_id) == first
