"""Jobs over many files: what is named, where it goes, what sinks no other, and each way to die in between."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution import results
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.execution.tree import PART_BYTES, PART_FILES
from kms_core.jobs.model import Attempt, Checkpoint, Job, part_id
from kms_core.jobs.spec import Fields, JobSpec, Work
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import Reference, SubmissionOptions
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import InvalidRequest, JobsUnavailable, PathRefused
from kms_protocol.wire import JobState
from support.job_stores import (
    LONG,
    TENANT,
    forge,
    lapse,
    remove_inputs,
    spool_folder,
    store_of,
    with_jobs,
)

WHO = Principal("local")
CONTEXT = Context.parse("env=test")


class Killed(BaseException):
    """As near to SIGKILL as an exception comes: nothing of ours handles it."""


class StumblingStore(JobStore):
    """A store at which something happens at the ``at``-th step of a part, or when it ends."""

    at = -1
    after = False
    error: BaseException = Killed()
    steps = 0

    def step(self, claim: Attempt, log: Checkpoint, counts: Fields) -> None:
        self._meet(lambda: super(StumblingStore, self).step(claim, log, counts))

    def finish(self, claim: Attempt, state: JobState, code: str = "", work: Work | None = None) -> None:
        self._meet(lambda: super(StumblingStore, self).finish(claim, state, code, work))

    def split(self, claim: Attempt, parts: list[JobSpec]) -> None:  # type: ignore[override]  # as it is called
        self._meet(lambda: super(StumblingStore, self).split(claim, parts))

    def _meet(self, step: Callable[[], None]) -> None:
        turn, self.steps = self.steps, self.steps + 1
        if turn == self.at and not self.after:
            raise self.error
        step()
        if turn == self.at:
            raise self.error


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of file jobs of ``core``."""
    return tmp_path / "state" / "files"


@pytest.fixture
def worker_context(core: Core) -> WorkerContext:
    """A worker with short leases."""
    return WorkerContext(
        core.kms, store_of(core, LONG, []), core.worker_context.spool, core.worker_context.places
    )


def stumbling(core: Core, at: int, *, after: bool, error: BaseException | None = None) -> WorkerContext:
    found = core.worker_context.store
    store = StumblingStore(found.redis, found.record_key, lambda *_: None, LONG)
    store.at, store.after, store.error = at, after, error or Killed()
    return WorkerContext(core.kms, store, core.worker_context.spool, core.worker_context.places)


def fill(folder: Path, **files: bytes) -> None:
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def submit(core: Core, kind: wire.JobKind, source: str, target: str | None, **more: object) -> str:
    body = wire.JobIn(kind=kind, source=source, target=target, **more)  # type: ignore[arg-type]  # fields by name
    return core.submitter.submit(SubmissionOptions(WHO, kind, CONTEXT), body).job_id


def url(path: Path, pattern: str = "") -> str:
    return f"file://{path}/{pattern}"


def now(core: Core, job_id: str) -> Job:
    return core.worker_context.store.get(job_id, TENANT)


def work(worker_context: WorkerContext, job_id: str) -> None:
    """Run the whole, then its parts."""
    run_job(job_id, worker_context, "w/1")
    for number in range(worker_context.store.get(job_id, TENANT).parts):
        run_job(part_id(job_id, number), worker_context, "w/1")


def done(core: Core, kind: wire.JobKind, source: str, target: str | None, **more: object) -> str:
    job_id = submit(core, kind, source, target, **more)
    work(core.worker_context, job_id)
    return job_id


def lines(core: Core, job_id: str) -> list[dict[str, object]]:
    found = results.of(now(core, job_id), core.worker_context.store, core.worker_context.spool)
    whole = b"".join(found.slabs(0, found.size))
    assert len(whole) == found.size
    return [json.loads(line) for line in whole.splitlines()]


def refused(core: Core, job_id: str) -> dict[str, object]:
    """Name of the source and code of each line that has one."""
    told = [line for line in lines(core, job_id) if "error" in line]
    return {str(line["source"]).rpartition("/")[2]: line["error"]["code"] for line in told}  # type: ignore[index]  # an object


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def opened(core: Core, path: Path, context: Context = CONTEXT) -> bytes:
    return core.kms.decrypt(WHO, path.read_bytes(), context).plaintext


# -- there and back ----------------------------------------------------------------------------------------


def test_tree_goes_there_and_back(core: Core, root: Path) -> None:
    plain = {"a.csv": b"1", "b/c.csv": b"22", "b/d/.env": b"", "z z/ü%*": os.urandom(70_000)}
    fill(root / "in", **{name.replace("/", "__"): data for name, data in plain.items()})

    there = done(core, "encrypt", url(root / "in", "**"), url(root / "sealed"))
    back = done(core, "decrypt", url(root / "sealed", "**/*.age"), url(root / "out/deep"))

    assert set(tree(root / "sealed")) == {f"{name}.age" for name in plain}
    assert tree(root / "out" / "deep") == plain
    job = now(core, there)
    assert (job.state, job.items, job.items_done, job.items_failed) == ("succeeded", 4, 4, 0)
    assert (job.bytes, job.bytes_done) == (70_003, 70_003)
    assert now(core, back).state == "succeeded"
    assert lines(core, there)[0] == {
        "index": 0,
        "source": url(root / "in", "a.csv"),
        "target": url(root / "sealed", "a.csv.age"),
    }
    assert [line["index"] for line in lines(core, there)] == [0, 1, 2, 3]
    assert {path.stat().st_mode & 0o777 for path in (root / "sealed").rglob("*.age")} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (root / "out").rglob("*") if path.is_dir()} == {0o700}


def test_pattern_chooses(core: Core, root: Path) -> None:
    fill(root / "in", a__x=b"1", b__x=b"2", b__y=b"3", c=b"4")

    done(core, "encrypt", url(root / "in", "*/x"), url(root / "out"))

    assert set(tree(root / "out")) == {"a/x.age", "b/x.age"}


def test_root_itself_may_be_named(core: Core, root: Path) -> None:
    fill(root, a=b"1")

    done(core, "encrypt", url(root, "*"), url(root))

    assert set(tree(root)) == {"a", "a.age"}


def test_nothing_that_is_no_plain_file_beneath_the_root_is_touched(
    core: Core, root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    fill(outside, secret=b"secret")
    fill(root / "in", good=b"1")
    inside = root / "in"
    (inside / "link").symlink_to(outside / "secret")
    (inside / "linked").symlink_to(outside, target_is_directory=True)
    (inside / "hard").hardlink_to(outside / "secret")
    os.mkfifo(inside / "fifo")
    (inside / ".kms-1-1.tmp").write_bytes(b"half")

    job_id = done(core, "encrypt", url(root / "in", "**"), url(root / "out"))

    assert set(tree(root / "out")) == {"good.age"}
    assert refused(core, job_id) == {"hard": "path_refused"}


def test_refused_file_sinks_no_other(core: Core, root: Path) -> None:
    fill(root / "in", a=b"1", c=b"3")
    done(core, "encrypt", url(root / "in", "*"), url(root / "sealed"))
    fill(root / "sealed", b=b"no age file", d=b"")
    fill(root / "out", c=b"precious")
    (root / "sealed" / os.fsdecode(b"caf\xe9")).write_bytes(b"x")

    job_id = done(core, "decrypt", url(root / "sealed", "**"), url(root / "out"))

    assert tree(root / "out") == {"a": b"1", "c": b"precious"}
    job = now(core, job_id)
    assert (job.state, job.error, job.items_done, job.items_failed) == ("failed", "items_failed", 5, 4)
    assert refused(core, job_id) == {
        "b": "not_a_ciphertext",
        "c.age": "target_exists",
        "caf%E9": "path_refused",
        "d": "not_a_ciphertext",
    }


def test_nothing_named_is_nothing_done(core: Core, root: Path) -> None:
    (root / "in").mkdir()

    job_id = done(core, "encrypt", url(root / "in", "**"), url(root / "out"))

    assert (now(core, job_id).state, now(core, job_id).items) == ("succeeded", 0)
    assert lines(core, job_id) == []


def test_more_files_than_allowed_are_refused_and_none_is_touched(core: Core, root: Path) -> None:
    fill(root / "in", a=b"1", b=b"2", c=b"3")
    job_id = submit(core, "encrypt", url(root / "in", "**"), url(root / "out"))

    store = store_of(core, with_jobs(fanout_files=2))

    run_job(
        job_id, WorkerContext(core.kms, store, core.worker_context.spool, core.worker_context.places), "w"
    )

    assert (now(core, job_id).state, now(core, job_id).error) == ("failed", "too_large")
    assert not (root / "out").exists()
    assert list(core.worker_context.spool.folders(older_than_s=-1)) == []


@pytest.mark.parametrize("limit", ["resource", "tenant"])
def test_parts_count_as_running_jobs(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr("kms_core.jobs.execution.tree.PART_FILES", 1)
    fill(root / "in", a=b"1", b=b"2", c=b"3")
    job_id = submit(core, "encrypt", url(root / "in", "*"), url(root / "out"))
    is_tenant = limit == "tenant"
    settings = with_jobs(tenant_leases=2) if is_tenant else with_jobs(resource_leases={f"root:{root}": 2})
    store = store_of(core, settings)
    run_job(
        job_id, WorkerContext(core.kms, store, core.worker_context.spool, core.worker_context.places), "w"
    )

    first, second, third = (store.claim(part_id(job_id, number), "w") for number in range(3))

    assert first
    assert second
    assert third is None
    store.defer(first, 0, counts=False, away=False)
    assert store.claim(part_id(job_id, 2), "w")


def test_two_files_that_would_be_one_are_one_and_a_refusal(core: Core, root: Path) -> None:
    fill(root / "in", a=b"1")
    done(core, "encrypt", url(root / "in", "*"), url(root / "sealed"))
    (root / "sealed" / "a").write_bytes((root / "sealed" / "a.age").read_bytes())

    job_id = done(core, "decrypt", url(root / "sealed", "*"), url(root / "out"))

    assert tree(root / "out") == {"a": b"1"}
    assert refused(core, job_id) == {"a.age": "target_exists"}


# -- parts ---------------------------------------------------------------------------------------------------


def test_many_files_are_few_parts(core: Core, root: Path) -> None:
    fill(root / "in", **{f"f{number:04}": b"x" for number in range(PART_FILES + 1)})

    job_id = done(core, "encrypt", url(root / "in", "*"), url(root / "out"))

    job = now(core, job_id)
    assert (job.state, job.parts, job.items_done) == ("succeeded", 2, PART_FILES + 1)
    assert [line["index"] for line in lines(core, job_id)] == list(range(PART_FILES + 1))
    assert len(list((root / "out").iterdir())) == PART_FILES + 1


def test_large_files_are_parts_of_their_own(core: Core, root: Path) -> None:
    fill(root / "in", a=b"", b=b"", c=b"", d=b"")
    for name, size in (("a", PART_BYTES // 2), ("b", PART_BYTES), ("c", PART_BYTES + 1), ("d", 1)):
        os.truncate(root / "in" / name, size)
    job_id = submit(core, "encrypt", url(root / "in", "*"), url(root / "out"))

    run_job(job_id, core.worker_context, "w")

    store = core.worker_context.store
    parts = [store.part(part_id(job_id, number)).job for number in range(now(core, job_id).parts)]
    assert [part.items for part in parts] == [1, 1, 1, 1]
    assert now(core, job_id).bytes == PART_BYTES * 5 // 2 + 2


def test_listing_that_was_cut_off_is_made_anew_and_what_comes_later_is_not_in_it(
    core: Core, worker_context: WorkerContext, root: Path
) -> None:
    fill(root / "in", a=b"1")
    job_id = submit(core, "encrypt", url(root / "in", "*"), url(root / "out"))
    with pytest.raises(Killed):
        run_job(job_id, stumbling(core, 0, after=False), "w1")  # before it was split
    fill(root / "in", b=b"2")
    lapse(worker_context.store)
    run_job(job_id, worker_context, "w2")
    fill(root / "in", c=b"3")
    for _ in range(2):
        lapse(worker_context.store)
        worker_context.store.reap_all([job_id])
        work(worker_context, job_id)

    assert set(tree(root / "out")) == {"a.age", "b.age"}
    assert (now(core, job_id).state, now(core, job_id).items_done) == ("succeeded", 2)


def test_directory_that_becomes_a_link_after_the_listing_leads_nowhere(
    core: Core, root: Path, tmp_path: Path
) -> None:
    fill(tmp_path / "outside", x=b"secret")
    fill(root / "in", d__x=b"1")
    job_id = submit(core, "encrypt", url(root / "in", "**"), url(root / "out"))
    run_job(job_id, core.worker_context, "w")
    (root / "in" / "d").rename(root / "in" / "e")
    (root / "in" / "d").symlink_to(tmp_path / "outside")

    run_job(part_id(job_id, 0), core.worker_context, "w")

    assert refused(core, job_id) == {"x": "path_refused"}
    assert tree(root / "out") == {}


def test_target_that_becomes_a_link_leads_nowhere(core: Core, root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    fill(root / "in", d__x=b"1")
    job_id = submit(core, "encrypt", url(root / "in", "**"), url(root / "out"))
    (root / "out").mkdir()
    (root / "out" / "d").symlink_to(tmp_path / "outside")

    work(core.worker_context, job_id)

    assert refused(core, job_id) == {"x": "path_refused"}
    assert list((tmp_path / "outside").iterdir()) == []


# -- killed in the middle ------------------------------------------------------------------------------------

STEPS = 5  # of a part of three files: one for each commit, one for the last, and the end


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(STEPS))
@pytest.mark.parametrize("how", ["create", "overwrite", "reseal in place"])
def test_part_of_a_killed_worker_is_finished_and_each_file_is_done_once(  # noqa: PLR0913 -- two fixtures more
    core: Core, worker_context: WorkerContext, root: Path, how: str, at: int, *, after: bool
) -> None:
    plain = {"a": b"1", "b": b"22", "c": b"333"}
    fill(root / "in", **plain)
    source, target, kind = url(root / "in", "*"), url(root / "out"), "encrypt"
    if how == "overwrite":
        fill(root / "out", **{f"{name}.age": b"old" for name in plain})
    elif how == "reseal in place":
        done(core, "encrypt", source, target)
        core.kms.rotate(WHO, "default")
        source, target, kind = url(root / "out", "*"), url(root / "out", "*"), "reseal"
    job_id = submit(core, kind, source, target, overwrite=how != "create")  # type: ignore[arg-type]  # a kind
    run_job(job_id, worker_context, "w")
    part = part_id(job_id, 0)

    with pytest.raises(Killed):
        run_job(part, stumbling(core, at, after=after), "w1")
    before = {path.name: path.stat().st_ino for path in (root / "out").glob("*.age")}
    settled = len(core.worker_context.store.part(part).log.outcomes)
    lapse(worker_context.store)
    worker_context.store.reap_all([part])
    run_job(part, worker_context, "w2")

    job = now(core, job_id)
    assert (job.state, job.items_done, job.items_failed, job.bytes_done) == (
        "succeeded",
        3,
        0,
        job.bytes,
    )
    assert refused(core, job_id) == {}
    assert {path.name for path in (root / "out").iterdir()} == {f"{name}.age" for name in plain}
    assert {name: opened(core, root / "out" / f"{name}.age") for name in plain} == plain
    for name in sorted(plain)[:settled]:  # what was done before is left as it is
        assert (root / "out" / f"{name}.age").stat().st_ino == before[f"{name}.age"]


@pytest.mark.parametrize("after", [False, True], ids=["unheard", "heard"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_redis_lost_in_the_middle_of_a_part_costs_nothing(
    core: Core, worker_context: WorkerContext, root: Path, at: int, *, after: bool
) -> None:
    fill(root / "in", a=b"1", b=b"2", c=b"3")
    job_id = submit(core, "encrypt", url(root / "in", "*"), url(root / "out"))
    run_job(job_id, worker_context, "w")

    with pytest.raises(JobsUnavailable):
        run_job(part_id(job_id, 0), stumbling(core, at, after=after, error=JobsUnavailable()), "w1")
    lapse(worker_context.store)
    run_job(part_id(job_id, 0), worker_context, "w2")

    assert now(core, job_id).state == "succeeded"
    assert set(tree(root / "out")) == {"a.age", "b.age", "c.age"}


def test_worker_that_was_overtaken_in_the_middle_has_no_effect(
    core: Core, worker_context: WorkerContext, root: Path
) -> None:
    fill(root / "in", a=b"1", b=b"2")
    job_id = submit(core, "encrypt", url(root / "in", "*"), url(root / "out"))
    run_job(job_id, worker_context, "w")
    part = part_id(job_id, 0)

    class Slow(JobStore):
        def step(self, claim: Attempt, log: Checkpoint, counts: Fields) -> None:
            if len(log.outcomes) == 1:
                forge(worker_context.store, part, lease_until="0")
                run_job(part, worker_context, "w2")
            super().step(claim, log, counts)

    found = core.worker_context.store
    slow = Slow(found.redis, found.record_key, lambda *_: None, LONG)
    run_job(part, WorkerContext(core.kms, slow, core.worker_context.spool, core.worker_context.places), "w1")

    assert now(core, job_id).state == "succeeded"
    assert {path.name for path in (root / "out").iterdir()} == {"a.age", "b.age"}
    assert opened(core, root / "out" / "b.age") == b"2"


def test_part_that_comes_further_each_time_is_no_dead_letter(
    core: Core, worker_context: WorkerContext, root: Path
) -> None:
    names = [f"f{number}" for number in range(LONG.jobs.attempts + 3)]
    fill(root / "in", **dict.fromkeys(names, b"x"))
    job_id = submit(core, "encrypt", url(root / "in", "*"), url(root / "out"))
    run_job(job_id, worker_context, "w")
    for _ in names:
        with pytest.raises(Killed):
            run_job(part_id(job_id, 0), stumbling(core, 1, after=False), "w1")
        lapse(worker_context.store)
    run_job(part_id(job_id, 0), worker_context, "w2")

    assert (now(core, job_id).state, now(core, job_id).items_failed) == ("succeeded", 0)
    assert set(tree(root / "out")) == {f"{name}.age" for name in names}


def test_part_that_kills_every_worker_ends_and_tells_what_was_done(
    core: Core, worker_context: WorkerContext, root: Path
) -> None:
    fill(root / "in", a=b"1", b=b"2", c=b"3")
    job_id = submit(core, "encrypt", url(root / "in", "*"), url(root / "out"))
    run_job(job_id, worker_context, "w")
    part = part_id(job_id, 0)
    for at in (2, 1, *[0] * (LONG.jobs.attempts - 1)):  # at c, at c once b is in place, at c
        with pytest.raises(Killed):
            run_job(part, stumbling(core, at, after=False), "w1")
        lapse(worker_context.store)
    run_job(part, worker_context, "w2")

    job = now(core, job_id)
    assert (job.state, job.error, job.items_done, job.items_failed) == ("failed", "items_failed", 3, 1)
    assert refused(core, job_id) == {"c": "attempts_exhausted"}
    assert {path.name for path in (root / "out").iterdir()} == {"a.age", "b.age"}


def test_forged_log_ends_its_part_at_once(core: Core, worker_context: WorkerContext, root: Path) -> None:
    fill(root / "in", a=b"1")
    job_id = submit(core, "encrypt", url(root / "in", "*"), url(root / "out"))
    run_job(job_id, worker_context, "w")
    part = part_id(job_id, 0)
    forge(worker_context.store, part, log=bytes(32) + b"\x80")

    run_job(part, worker_context, "w")

    assert refused(core, job_id) == {"a": "record_refused"}
    assert not (root / "out").exists()


def test_log_of_another_part_is_refused(core: Core, worker_context: WorkerContext, root: Path) -> None:
    fill(root / "in", a=b"1")
    ids = [submit(core, "encrypt", url(root / "in", "*"), url(root / name)) for name in ("one", "two")]
    for job_id in ids:
        run_job(job_id, worker_context, "w")
    first, second = (part_id(job_id, 0) for job_id in ids)
    run_job(first, worker_context, "w")
    stolen = worker_context.store.redis.hget(f"kms:job:{first}", "log")
    forge(worker_context.store, second, log=stolen)  # type: ignore[arg-type]  # sync client

    run_job(second, worker_context, "w")

    assert refused(core, ids[1]) == {"a": "record_refused"}


# -- cancelled, expired --------------------------------------------------------------------------------------


def test_cancelled_job_keeps_what_was_done_and_leaves_nothing_else(
    core: Core, worker_context: WorkerContext, root: Path
) -> None:
    fill(root / "in", a=b"1", b=b"2", c=b"3")
    job_id = submit(core, "encrypt", url(root / "in", "*"), url(root / "out"))
    run_job(job_id, worker_context, "w")
    with pytest.raises(Killed):
        run_job(part_id(job_id, 0), stumbling(core, 1, after=True), "w1")

    core.worker_context.store.cancel(job_id, TENANT)
    lapse(worker_context.store)
    run_job(part_id(job_id, 0), worker_context, "w2")

    assert now(core, job_id).state == "cancelled"
    assert {path.name for path in (root / "out").iterdir()} == {"a.age"}
    told = [line.get("error") for line in lines(core, job_id)]
    assert told == [None, {"code": "cancelled"}, {"code": "cancelled"}]
    remove_inputs(core)
    folder = spool_folder(core) / job_id
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {"files"}, "the list, for its result"


# -- what is asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("encrypt", {"target": "file:///out"}),
        ("encrypt", {"target": "file:///*/"}),
        ("encrypt", {}),
        ("encrypt", {"overwrite": True}),
        ("encrypt", {"target": "file:///out/", "dry_run": True}),
        ("decrypt", {"target": "SOURCE", "overwrite": True}),
        ("rewrap", {}),
        ("reseal", {"target": "SOURCE"}),
        ("rewrap", {"source": "file:///a", "overwrite": True, "dry_run": True}),
        ("encrypt", {"source": "file:///**.csv", "target": "file:///out/"}),
    ],
    ids=str,
)
def test_fields_that_do_not_go_together_are_refused(kind: wire.JobKind, fields: dict[str, object]) -> None:
    asked = {"source": "file:///in/**"} | fields
    asked |= {"target": asked["source"]} if fields.get("target") == "SOURCE" else {}

    with pytest.raises(InvalidRequest):
        Reference.of(wire.JobIn(kind=kind, **asked))  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("file:///etc/**", "file://{root}/out/"),
        ("file://{root}/../**", "file://{root}/out/"),
        ("file://{root}/missing/**", "file://{root}/out/"),
        ("file://{root}/link/**", "file://{root}/out/"),
        ("file://{root}/file/*", "file://{root}/out/"),
        ("file://{root}/in/**", "file:///tmp/out/"),
        ("file://{root}/in/**", "file://{root}/a/../out/"),
        ("*", "file://{root}/out/"),
        ("ftp://{root}/*", "file://{root}/out/"),
        ("file://{root}/in//*", "file://{root}/out/"),
    ],
)
def test_tree_outside_the_roots_is_refused_at_once(core: Core, root: Path, source: str, target: str) -> None:
    fill(root, file=b"", in__a=b"")
    (root / "link").symlink_to("/etc")

    with pytest.raises(PathRefused):
        submit(core, "encrypt", source.format(root=root), target.format(root=root))
