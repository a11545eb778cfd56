"""A core and a bucket, for tests of jobs with objects: fixtures ``bench``, ``watched`` and ``either``."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import Job
from kms_core.jobs.submission.submitter import Reference, SubmissionOptions
from kms_protocol.context import Context
from kms_protocol.wire import JobKind
from support import object_stores
from support.job_stores import LONG, TENANT, lapse, store_of
from support.object_stores import ObjectStore, TestBucket, Way
from support.programs import program
from support.service import Service, core_of

WHO = Principal("local")
CONTEXT = Context.parse("env=test")
NEW = Context.parse("env=new")


@dataclass(frozen=True)
class Bench:
    """A core, a bucket that it may use, and the folder that ``file://`` names."""

    core: Core
    bucket: TestBucket
    files: Path
    state: Path

    def submit(
        self, kind: JobKind, source: str, target: str, *, overwrite: bool = False, context: Context = CONTEXT
    ) -> str:
        new = NEW if kind in {"rewrap", "reseal"} else None
        terms = SubmissionOptions(WHO, kind, context, new_context=new)
        return self.core.submitter.files(terms, Reference(source, target, overwrite=overwrite)).job_id

    def run(self, job_id: str) -> Job:
        run_job(job_id, self.core.worker_context, "w/1")
        return self.now(job_id)

    def done(
        self, kind: JobKind, source: str, target: str, *, overwrite: bool = False, context: Context = CONTEXT
    ) -> Job:
        return self.run(self.submit(kind, source, target, overwrite=overwrite, context=context))

    def ok(self, kind: JobKind, source: str, target: str, context: Context = CONTEXT) -> None:
        job = self.done(kind, source, target, context=context)
        assert (job.state, job.error) == ("succeeded", ""), (kind, source, target)

    def now(self, job_id: str) -> Job:
        return self.core.worker_context.store.get(job_id, TENANT)

    def taken_up(self, job_id: str, worker_context: WorkerContext | None = None) -> Job:
        """The job after its worker died, or deferred it, and another has had its turn."""
        worker_context = worker_context or replace(
            self.core.worker_context, store=store_of(self.core, LONG, [])
        )
        lapse(worker_context.store)
        worker_context.store.reap_all([job_id])
        run_job(job_id, worker_context, "w2")
        return self.now(job_id)

    def file(self, name: str, data: bytes | None = None) -> str:
        if data is not None:
            (self.files / name).write_bytes(data)
        return (self.files / name).as_uri()

    def nothing_left(self) -> bool:
        """No upload that nobody completed, no note of one, no temporary file, nothing in the spool."""
        files = [path for path in (self.state / "spool").rglob("*") if path.is_file()]
        rest = [path for path in files if path.parent.name != "hosts"]
        return not self.bucket.uploads() and not rest and not list(self.files.glob(".kms-*"))

    def by_age(self, sealed: bytes) -> bytes:
        """What stock age makes of it."""
        keys = self.state / "age" / "private_key.txt"
        return subprocess.run(
            [program("age"), "-d", "-i", str(keys)], input=sealed, capture_output=True, check=True
        ).stdout


Make = Callable[..., Bench]


@pytest.fixture
def make(tmp_path: Path, redis_url: str) -> Iterator[Make]:
    """``make(bucket, endpoint, access_key)``: a bench over this bucket."""
    made: list[Bench] = []

    def one(bucket: TestBucket, endpoint: str = "", access_key: str = object_stores.ACCESS_KEY) -> Bench:
        settings = "[kms.jobs]\nlease_s = 2\n" + bucket.settings(tmp_path / "secret", endpoint, access_key)
        service = Service(tmp_path, settings, redis_url)
        made.append(Bench(core_of(service), bucket, service.files, service.state))
        return made[-1]

    yield one
    for bench in made:
        bucket, _ = bench.core.worker_context.places.buckets.writing(bench.bucket.url("out/x"))
        bucket.line.close()


@pytest.fixture(scope="session")
def weed() -> ObjectStore:
    return object_stores.weed()


@pytest.fixture
def bench(make: Make, weed: ObjectStore) -> Bench:
    return make(weed.new())


@pytest.fixture
def way(weed: ObjectStore) -> Iterator[Way]:
    with Way(weed) as way:
        yield way


@pytest.fixture
def watched(make: Make, weed: ObjectStore, way: Way) -> Bench:
    """A bench whose requests pass by ``way``; whether the store honours conditions is known."""
    made = make(weed.new(), way.url)
    made.core.worker_context.places.buckets.require_conditions(made.bucket.url("out/x"))
    way.seen.clear()
    return made


@pytest.fixture(params=["weed", "moto"])
def either(request: pytest.FixtureRequest, make: Make) -> Bench:
    store = object_stores.weed() if request.param == "weed" else object_stores.moto()
    return make(store.new())
