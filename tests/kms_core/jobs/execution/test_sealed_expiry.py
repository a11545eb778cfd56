"""Workers go by the sealed expiry and their own clock: an old job that is put back changes no file."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import Attempt, Checkpoint, Commit, Job, part_id
from kms_core.jobs.spec import ClocksApart, Fields, spec_digest
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import Reference, SubmissionOptions
from kms_protocol import wire
from kms_protocol.context import Context
from support.failing_store import Killed, interrupted, stumbling
from support.job_stores import COMMIT, TENANT, forge, record, spool_folder
from support.service import Service, core_of
from support.waiting import until

WHO = Principal("local")
CONTEXT = Context.parse("env=test")
NEWER = b"written later, by somebody else"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of file jobs of ``core``."""
    return tmp_path / "state" / "files"


def overwrite(core: Core, root: Path) -> str:
    (root / "in").write_bytes(b"salary")
    (root / "out").write_bytes(b"before")
    source, target = (root / "in").as_uri(), (root / "out").as_uri()
    return core.submitter.files(
        SubmissionOptions(WHO, "encrypt", CONTEXT), Reference(source, target, overwrite=True)
    ).job_id


def now(core: Core, job_id: str) -> Job:
    return core.worker_context.store.get(job_id, TENANT)


def age(core: Core, job_id: str, seconds: float) -> None:
    """The sealed record as it looks so long after its expiry, with plain fields that say otherwise."""
    store = core.worker_context.store
    at, far = time.time() - seconds, str(time.time() + 3600)
    old = msgspec.structs.replace(store.accepted(job_id), expires_at=at, start_by=at, run_by=at)
    forge(store, job_id, sealed=store.record_key.seal(old), expires_at=far, start_by=far, run_by=far)


def put_back(core: Core, job_id: str, dump: dict[bytes, bytes]) -> None:
    """What was taken down of a record earlier, as if it were due."""
    store, far = core.worker_context.store, str(time.time() + 10 * 86_400)
    store.redis.delete(f"kms:job:{job_id}")
    forge(store, job_id, **{name.decode(): value for name, value in dump.items()})
    forge(store, job_id, expires_at=far, start_by=far, run_by=far, lease_until="0", not_before="0")


@contextmanager
def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[None]:
    """So many seconds later, for this machine and as Redis is asked for the time."""
    clock = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: clock() + seconds)
        patched.setattr(JobStore, "now", lambda _: clock() + seconds)
        yield


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine's clock, two days ahead of Redis's."""
    clock = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: clock() + 2 * 86_400)
        yield


@pytest.mark.usefixtures("ahead")
def test_worker_whose_clock_is_ahead_leaves_a_job_to_others(core: Core, root: Path) -> None:
    """A wrong clock must not lose what was accepted."""
    job_id = overwrite(core, root)
    run_job(job_id, core.worker_context, "w/1")

    waiting = now(core, job_id)
    assert (waiting.state, waiting.attempt, (root / "out").read_bytes()) == ("queued", 0, b"before")


def test_clock_that_goes_ahead_while_a_job_runs_puts_nothing_in_place(
    core: Core, root: Path, request: pytest.FixtureRequest
) -> None:
    job_id = overwrite(core, root)
    claim = core.worker_context.store.claim(job_id, "w/1")
    assert claim
    request.getfixturevalue("ahead")

    with pytest.raises(ClocksApart):
        core.worker_context.store.committing(claim, COMMIT)
    assert record(core.worker_context.store, job_id)[b"state"] == b"running"


@pytest.mark.parametrize(("past_s", "end"), [(50, "succeeded"), (70, "failed")])
def test_worker_has_the_last_word_on_expiry(core: Core, root: Path, past_s: float, end: str) -> None:
    """With a minute's leeway, since clocks differ."""
    job_id = overwrite(core, root)
    age(core, job_id, past_s)
    run_job(job_id, core.worker_context, "w/1")

    found = record(core.worker_context.store, job_id)
    assert (found[b"state"], found[b"error"]) == (end.encode(), b"" if end == "succeeded" else b"expired")
    assert ((root / "out").read_bytes() == b"before") is (end == "failed")


def test_items_of_an_expired_job_are_not_worked_through(core: Core) -> None:
    items = [wire.JobItem(plaintext=b"x")]
    job_id = core.submitter.items(SubmissionOptions(WHO, "encrypt", CONTEXT), items).job_id
    age(core, job_id, 70)
    run_job(job_id, core.worker_context, "w/1")

    assert (now(core, job_id).state, now(core, job_id).error) == ("failed", "expired")
    assert not list((spool_folder(core) / job_id).glob("result*"))


def test_overwrite_job_that_is_put_back_does_not_overwrite_again(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = overwrite(core, root)
    dump = record(core.worker_context.store, job_id)
    run_job(job_id, core.worker_context, "w/1")
    assert now(core, job_id).state == "succeeded"
    (root / "out").write_bytes(NEWER)
    put_back(core, job_id, dump)
    with later(monkeypatch, 2 * 86_400):
        run_job(job_id, core.worker_context, "w/1")

        assert (now(core, job_id).state, now(core, job_id).error) == ("failed", "expired")
    assert (root / "out").read_bytes() == NEWER


def test_commit_that_is_put_back_does_not_overwrite_again(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = overwrite(core, root)
    with pytest.raises(Killed):
        run_job(job_id, stumbling(core, "committing", after=True), "w/1")
    dump = record(core.worker_context.store, job_id)
    forge(core.worker_context.store, job_id, lease_until="0")
    run_job(job_id, core.worker_context, "w/2")
    assert now(core, job_id).state == "succeeded"
    (root / "out").unlink()
    (root / "out").write_bytes(NEWER)
    put_back(core, job_id, dump)
    with later(monkeypatch, 2 * 86_400):
        run_job(job_id, core.worker_context, "w/3")

        assert now(core, job_id).state == "failed"
    assert (root / "out").read_bytes() == NEWER


def begun(core: Core, root: Path, step: str = "committing", *, after: bool = True) -> str:
    """An overwrite whose worker died around its commit."""
    job_id = overwrite(core, root)
    with pytest.raises(Killed):
        run_job(job_id, stumbling(core, step, after=after), "w/1")
    return job_id


def test_commit_that_is_put_back_with_its_temporary_file_puts_nothing_in_place(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = begun(core, root)
    (root / "out").write_bytes(NEWER)
    put_back(core, job_id, record(core.worker_context.store, job_id))
    with later(monkeypatch, 2 * 86_400):
        run_job(job_id, core.worker_context, "w/2")

        assert (now(core, job_id).state, now(core, job_id).error) == ("failed", "expired")
    assert (root / "out").read_bytes() == NEWER
    assert sorted(path.name for path in root.iterdir()) == ["in", "out"]


def test_file_that_was_put_in_place_in_time_is_recognised_after_the_expiry(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker died between the rename and the end."""
    job_id = begun(core, root, "finish", after=False)
    placed = (root / "out").stat().st_ino
    forge(core.worker_context.store, job_id, lease_until="0")
    with later(monkeypatch, core.worker_context.store.accepted(job_id).run_by - time.time() + 70):
        run_job(job_id, core.worker_context, "w/2")

        assert (now(core, job_id).state, now(core, job_id).error) == ("succeeded", "")
    assert (root / "out").stat().st_ino == placed
    assert sorted(path.name for path in root.iterdir()) == ["in", "out"]


def test_worker_whose_clock_is_ahead_leaves_a_commit_to_others(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, clock = begun(core, root), time.time
    forge(core.worker_context.store, job_id, lease_until="0")
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: clock() + 2 * 86_400)
        run_job(job_id, core.worker_context, "w/2")

    found = record(core.worker_context.store, job_id)
    assert (found[b"state"], found[b"attempt"]) == (b"committing", b"1")
    assert (root / "out").read_bytes() == b"before"
    forge(core.worker_context.store, job_id, lease_until="0")
    run_job(job_id, core.worker_context, "w/3")
    assert now(core, job_id).state == "succeeded"


def test_real_worker_puts_no_file_of_an_expired_commit_in_place(tmp_path: Path, redis_url: str) -> None:
    with Service(tmp_path, redis=redis_url) as service:
        core = core_of(service)
        job_id = begun(core, service.files)
        store, commit = core.worker_context.store, record(core.worker_context.store, job_id)[b"commit"]
        spec = spec_digest(record(store, job_id)[b"sealed"])
        opened = store.record_key.verified(Commit, job_id, commit, spec)
        age(core, job_id, 70)
        spec = spec_digest(record(store, job_id)[b"sealed"])
        forge(store, job_id, commit=store.record_key.sign(job_id, opened, spec), lease_until="0")
        (service.files / "out").write_bytes(NEWER)
        store.redis.zadd("kms:leased", {job_id: 0})
        service.start("worker")
        until(lambda: now(core, job_id).ended, "the job has ended")

        assert (now(core, job_id).state, now(core, job_id).error) == ("failed", "expired")
        assert (service.files / "out").read_bytes() == NEWER
        assert sorted(path.name for path in service.files.iterdir()) == ["in", "out"]


def test_commit_of_an_earlier_life_of_the_id_is_refused(core: Core, root: Path) -> None:
    """Or a job whose work was never done would end as succeeded, by what stands at its target already."""
    job_id = overwrite(core, root)
    store, accepted = core.worker_context.store, core.worker_context.store.accepted(job_id)
    with pytest.raises(Killed):
        run_job(job_id, stumbling(core, "finish", after=False), "w/1")
    commit = record(store, job_id)[b"commit"]
    store.redis.delete(f"kms:job:{job_id}")
    store.submit(accepted)
    forge(store, job_id, state="committing", commit=commit, fence="1", attempt="1")
    run_job(job_id, core.worker_context, "w/2")

    assert (now(core, job_id).state, now(core, job_id).error) == ("failed", "record_refused")


def test_job_that_expires_while_it_runs_changes_nothing(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = overwrite(core, root)
    with ExitStack() as stack:

        def pass_by() -> None:
            stack.enter_context(later(monkeypatch, 2 * 86_400))

        run_job(job_id, interrupted(core, "committing", pass_by, after=False), "w/1")

    assert (now(core, job_id).state, now(core, job_id).error) == ("failed", "expired")
    assert (root / "out").read_bytes() == b"before"
    assert sorted(path.name for path in root.iterdir()) == ["in", "out"]


# -- jobs over many files ------------------------------------------------------------------------------


def many(core: Core, root: Path) -> str:
    (root / "in").mkdir()
    for name in ("a", "b"):
        (root / "in" / name).write_bytes(name.encode())
    body = wire.JobIn(kind="encrypt", source=f"file://{root}/in/*", target=f"file://{root}/out/")
    job_id = core.submitter.submit(SubmissionOptions(WHO, "encrypt", CONTEXT), body).job_id
    run_job(job_id, core.worker_context, "w/1")
    return job_id


def test_part_that_has_expired_writes_no_file(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = part_id(many(core, root), 0)
    with later(monkeypatch, 2 * 86_400):
        run_job(part, core.worker_context, "w/1")

    assert core.worker_context.store.part(part).job.error == "expired"
    assert not (root / "out").exists()


def test_commit_of_a_part_that_expires_before_it_is_finished_puts_nothing_in_place(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, found, stack = part_id(many(core, root), 0), core.worker_context.store, ExitStack()

    class Dying(JobStore):
        """Its worker dies once the commit of the first file is noted."""

        def step(self, claim: Attempt, log: Checkpoint, counts: Fields) -> None:
            super().step(claim, log, counts)
            raise Killed

    class Aging(JobStore):
        """Time passes once the part is claimed."""

        def claim(self, job_id: str, worker: str) -> Attempt | None:
            claim = super().claim(job_id, worker)
            stack.enter_context(later(monkeypatch, 2 * 86_400))
            return claim

    dying, aging = (
        replace(
            core.worker_context, store=made(found.redis, found.record_key, lambda *_: None, found.section)
        )
        for made in (Dying, Aging)
    )
    with pytest.raises(Killed):
        run_job(part, dying, "w/1")
    assert [path.suffix for path in (root / "out").iterdir()] == [".tmp"]
    forge(found, part, lease_until="0")
    with stack:
        run_job(part, aging, "w/2")

    assert found.part(part).job.error == "expired"
    assert not list((root / "out").iterdir())


def test_part_that_expires_while_it_runs_writes_no_further_file(
    core: Core, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = ExitStack()

    class Aging(JobStore):
        """Time passes once the commit of the first file is noted."""

        def step(self, claim: Attempt, log: Checkpoint, counts: Fields) -> None:
            super().step(claim, log, counts)
            stack.enter_context(later(monkeypatch, 2 * 86_400))

    job_id, found = many(core, root), core.worker_context.store
    store = Aging(found.redis, found.record_key, lambda *_: None, found.section)
    with stack:
        run_job(
            part_id(job_id, 0),
            WorkerContext(core.kms, store, core.worker_context.spool, core.worker_context.places),
            "w/1",
        )

    assert core.worker_context.store.part(part_id(job_id, 0)).job.error == "expired"
    assert [path.name for path in (root / "out").iterdir()] == ["a.age"]
