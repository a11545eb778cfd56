"""A core and a bucket for tests of jobs with objects.

Fixtures: ``object_jobs``; ``proxied_object_jobs``, by way of ``s3_proxy``; ``object_jobs_of_each_store``.
"""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kms_core.container import Core
from kms_core.jobs.model import Job
from kms_protocol.context import Context
from kms_protocol.wire import JobKind
from support import core_jobs, failing_store, object_stores
from support.core_jobs import CONTEXT, NEW
from support.failing_store import Killed
from support.job_stores import LASTING_LEASES
from support.object_stores import ObjectStore, S3Proxy, TestBucket
from support.programs import program
from support.service import Service, core_of


@dataclass(frozen=True)
class ObjectJobs:
    """A core, a bucket that it may use, and the folder that ``file://`` names."""

    core: Core
    bucket: TestBucket
    files: Path
    state: Path

    def submit(
        self, kind: JobKind, source: str, target: str, *, overwrite: bool = False, context: Context = CONTEXT
    ) -> str:
        new = NEW if kind in {"rewrap", "reseal"} else None
        return core_jobs.submit(
            self.core, kind, source, target, context=context, new=new, overwrite=overwrite
        )

    def run(self, job_id: str) -> Job:
        return core_jobs.run(self.core, job_id)

    def done(
        self, kind: JobKind, source: str, target: str, *, overwrite: bool = False, context: Context = CONTEXT
    ) -> Job:
        return self.run(self.submit(kind, source, target, overwrite=overwrite, context=context))

    def ok(self, kind: JobKind, source: str, target: str, context: Context = CONTEXT) -> None:
        job = self.done(kind, source, target, context=context)
        assert (job.state, job.error) == ("succeeded", ""), (kind, source, target)

    def now(self, job_id: str) -> Job:
        return core_jobs.now(self.core, job_id)

    def run_until_killed(
        self, job_id: str, step: str, *, after: bool, error: type[BaseException] = Killed
    ) -> None:
        failing_store.run_until_killed(self.core, job_id, step, after=after, error=error)

    def run_after_lease_expiry(self, job_id: str) -> Job:
        """The job after its worker died, or deferred it, and another has had its turn."""
        core_jobs.run_after_lease_expiry(self.core, job_id)
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


Make = Callable[..., ObjectJobs]


@pytest.fixture
def make(tmp_path: Path, redis_url: str) -> Iterator[Make]:
    """``make(bucket, endpoint, access_key)``: jobs over this bucket."""
    made: list[ObjectJobs] = []

    def one(bucket: TestBucket, endpoint: str = "", access_key: str = object_stores.ACCESS_KEY) -> ObjectJobs:
        settings = bucket.settings(tmp_path / "secret", endpoint, access_key)
        service = Service(tmp_path, settings, redis_url)
        core = core_of(service)
        core.worker_context.store.rules = LASTING_LEASES.jobs
        made.append(ObjectJobs(core, bucket, service.files, service.state))
        return made[-1]

    yield one
    for object_jobs in made:
        bucket, _ = object_jobs.core.worker_context.places.buckets.writing(object_jobs.bucket.url("out/x"))
        bucket.line.close()


@pytest.fixture(scope="session")
def weed() -> ObjectStore:
    return object_stores.weed()


@pytest.fixture
def object_jobs(make: Make, weed: ObjectStore) -> ObjectJobs:
    return make(weed.new())


@pytest.fixture
def s3_proxy(weed: ObjectStore) -> Iterator[S3Proxy]:
    with S3Proxy(weed) as s3_proxy:
        yield s3_proxy


@pytest.fixture
def proxied_object_jobs(make: Make, weed: ObjectStore, s3_proxy: S3Proxy) -> ObjectJobs:
    """Jobs whose requests pass by ``s3_proxy``; whether the store honours conditions is known."""
    made = make(weed.new(), s3_proxy.url)
    made.core.worker_context.places.buckets.require_conditions(made.bucket.url("out/x"))
    s3_proxy.seen.clear()
    return made


@pytest.fixture(params=["weed", "moto"])
def object_jobs_of_each_store(request: pytest.FixtureRequest, make: Make) -> ObjectJobs:
    store = object_stores.weed() if request.param == "weed" else object_stores.moto()
    return make(store.new())
