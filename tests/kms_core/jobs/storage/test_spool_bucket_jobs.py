"""Jobs whose spool is a bucket that fails: each submission is answered by a code, no job is lost."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kms_core.container import Core
from kms_core.jobs.model import Job
from kms_core.jobs.recovery import spool_cleanup
from kms_core.jobs.recovery.reaper import reap_all
from kms_core.jobs.storage.spool_bucket import SpoolBucket
from support import object_stores
from support.blob_stores import PREFIX
from support.core_jobs import run_job
from support.embedded_valkey import EmbeddedValkey
from support.job_stores import TENANT, reap, remove_inputs
from support.object_stores import Intercept, S3Proxy, TestBucket
from support.service import CONTEXT, Service, b64, check_problem, core_of
from support.waiting import RealTime, until

MIB = 1024 * 1024
ITEM = {"kind": "encrypt", "items": [{"plaintext": b64(b"x" * 1000)}], "context": CONTEXT}
ORPHAN = f"{PREFIX}99999999-9999-4999-9999-999999999999/upload"


@dataclass(frozen=True)
class Install:
    """An API process, and a core that works when a test says so; both reach their bucket by ``s3_proxy``."""

    service: Service
    core: Core
    bucket: TestBucket
    s3_proxy: S3Proxy

    def run(self, job_id: str) -> Job:
        run_job(job_id, self.core.worker_context, "w")
        return self.core.worker_context.store.get(job_id, TENANT)

    @property
    def spool(self) -> str:
        return str(self.service.http.get("/readyz").json()["spool"])

    def kept(self, *job_ids: str) -> set[str]:
        """The objects of these jobs."""
        return {key for key in self.bucket.keys() for each in job_ids if each in key}  # noqa: SIM118 -- no dict

    def back(self) -> None:
        """The bucket answers again, and calls are made again."""
        self.s3_proxy.intercept = lambda _: None
        until(lambda: self.service.post("/jobs", ITEM).status_code == 202, "a job is accepted again")
        until(lambda: self.spool == "available", "the bucket is back")
        store = self.core.worker_context.spool.store
        assert isinstance(store, SpoolBucket)
        until(lambda: not store.is_away, "the worker asks again")


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Install]:
    folder, url = tmp_path_factory.mktemp("install"), valkey.files.url_of(next(database_numbers))
    bucket = object_stores.moto().new()
    secret = folder / "secret"
    secret.write_text(object_stores.SECRET)
    secret.chmod(0o600)
    with S3Proxy(bucket.store) as s3_proxy:
        settings = (
            "[kms.jobs]\ninline_bytes = 0\n"
            f'[kms.jobs.spool_bucket]\nurl = "s3://{bucket.name}/{PREFIX}"\nendpoint = "{s3_proxy.url}"\n'
            f'allow_http = true\naccess_key_id = "{object_stores.ACCESS_KEY}"\nsecret_key_file = "{secret}"\n'
        )
        with Service(folder, settings, url) as service:
            service.start("api")
            core = core_of(service)
            yield Install(service, core, bucket, s3_proxy)
            store = core.worker_context.spool.store
            assert isinstance(store, SpoolBucket)
            store.bucket.line.close()


@pytest.fixture
def install(shared: Install) -> Iterator[Install]:
    yield shared
    shared.back()


def on(status: int, *names: str) -> Intercept:
    """Answer requests of these names, or all."""
    return lambda seen: status if not names or seen.operation in names else None


def submitted(install: Install, size: int = 300_000) -> tuple[str, bytes]:
    data = os.urandom(size)
    return install.service.upload("encrypt", data, CONTEXT), data


@pytest.mark.parametrize(
    ("status", "answer", "code"),
    [
        (503, 503, "spool_unavailable"),
        (507, 507, "spool_full"),
        (403, 503, "spool_unavailable"),
        (301, 503, "spool_unavailable"),
    ],
    ids=["away", "full", "read-only", "elsewhere"],
)
def test_submission_is_refused_with_a_code_and_leaves_no_job(
    install: Install, status: int, answer: int, code: str
) -> None:
    before = install.service.get("/jobs").json()["jobs"]
    install.s3_proxy.intercept = on(status, "PutObject", "CreateMultipartUpload")

    headers = {"X-KMS-Context": CONTEXT}
    for size in (1000, 9 * MIB):
        body = install.service.post("/files/encrypt", content=bytes(size), headers=headers)
        check_problem(body, answer, code)
    check_problem(install.service.post("/jobs", ITEM), answer, code)

    assert install.service.get("/jobs").json()["jobs"] == before
    if status in {403, 301}:
        assert install.spool == "unavailable"
        assert "spool" in install.service.get("/status").json()["degraded"]


def test_bucket_that_is_away_is_told_and_defers_jobs_without_an_attempt(install: Install) -> None:
    job_id, data = submitted(install)
    install.s3_proxy.intercept = on(503)
    job = install.run(job_id)

    assert (job.state, job.attempt) == ("queued", 0)
    check_problem(install.service.post("/jobs", ITEM), 503, "spool_unavailable")
    assert install.service.http.get("/readyz").status_code == 200
    assert install.spool == "unavailable"
    assert "spool" in install.service.get("/status").json()["degraded"]
    install.back()
    until(lambda: reap_all(install.core.worker_context.store, [job_id])[0] != "deferred", "it is due")
    until(lambda: install.run(job_id).state == "succeeded", "the job ends")

    sealed = install.service.result(job_id)
    again = install.service.upload("decrypt", sealed, CONTEXT)
    assert install.run(again).state == "succeeded"
    assert install.service.result(again) == data


def test_result_waits_for_the_bucket_and_is_expired_only_without_its_objects(install: Install) -> None:
    job_id, _ = submitted(install)
    assert install.run(job_id).state == "succeeded"
    install.s3_proxy.intercept = on(503)
    check_problem(install.service.get(f"/jobs/{job_id}/result"), 503, "spool_unavailable")
    install.back()
    assert install.service.result(job_id)
    store = install.core.worker_context.spool.store

    store.remove_folder(job_id)

    check_problem(install.service.get(f"/jobs/{job_id}/result"), 410, "result_expired")


def test_worker_that_cannot_write_its_result_defers_the_job(install: Install) -> None:
    job_id, _ = submitted(install)
    install.s3_proxy.intercept = on(403, "PutObject")

    job = install.run(job_id)

    assert (job.state, job.attempt) == ("queued", 0)


def test_input_stays_until_the_bucket_takes_its_deletion(install: Install) -> None:
    job_id = install.service.submit(ITEM)
    assert install.run(job_id).state == "succeeded"
    install.s3_proxy.intercept = on(503)
    remove_inputs(install.core)
    before = install.kept(job_id)
    install.back()

    remove_inputs(install.core)

    assert install.kept(job_id) == before - {f"{PREFIX}{job_id}/items"} != before
    assert len(before) == 2


def test_what_an_ended_job_left_stays_listed_until_the_bucket_takes_its_deletion(install: Install) -> None:
    done, cancelled = install.service.submit(ITEM), install.service.submit(ITEM)
    assert install.run(done).state == "succeeded"
    install.core.worker_context.store.redis.zadd("kms:ended", {done: 1})
    before = install.kept(done, cancelled)
    install.s3_proxy.intercept = on(503, "DELETE")
    install.service.post(f"/jobs/{cancelled}/cancel")
    remove_inputs(install.core)
    assert install.kept(done, cancelled) >= before
    install.back()

    def is_removed() -> bool:
        remove_inputs(install.core)
        return not install.kept(done, cancelled)

    until(is_removed, "a later round removes both")


def test_orphans_are_swept_and_objects_of_jobs_stay(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, _ = submitted(install)
    install.bucket.put(ORPHAN, b"left by a kill")
    install.bucket.put("elsewhere/99999999-9999-4999-9999-999999999999/upload", b"not ours")
    RealTime.sleep(2.1)
    context = install.core.worker_context

    reap(context.store, context.spool)
    assert ORPHAN in install.bucket.keys()  # noqa: SIM118 -- no dict
    monkeypatch.setattr(spool_cleanup, "_ORPHAN_AGE_S", 1.0)
    reap(context.store, context.spool)

    keys = install.bucket.keys()
    assert ORPHAN not in keys
    assert {f"{PREFIX}{job_id}/upload", "elsewhere/99999999-9999-4999-9999-999999999999/upload"} <= keys


def test_small_job_takes_few_requests(install: Install) -> None:
    install.run(install.service.submit(ITEM))  # the first write of a process counts what is there
    del install.s3_proxy.seen[:]

    job_id = install.service.submit(ITEM)
    assert install.run(job_id).state == "succeeded"
    assert install.service.result(job_id)

    names = [
        seen.operation for seen in install.s3_proxy.seen if job_id in seen.path
    ]  # not those for marks of hosts
    read = ["HeadObject", "GetObject"]
    assert names == ["PutObject", *read, "PutObject", *read]
