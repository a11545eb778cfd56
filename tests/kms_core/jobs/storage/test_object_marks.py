"""Objects that a job has put in place, after Redis has gone back in time; uploads that no note names."""

from collections.abc import Iterator

import pytest

from kms_core.jobs.storage.s3 import MultipartJournal
from kms_core.jobs.storage.spool_folder import DiskSync, SpoolFolder
from support.core_jobs import run_job
from support.embedded_valkey import unrestricted
from support.job_stores import connect
from support.object_jobs import ObjectJobs
from support.redis_regress import Snapshot

SIZES = {"small": 1024, "large": 9 * 1024 * 1024}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with unrestricted(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def redis_url(server: str) -> str:
    """That of ``core``."""
    connect(server).flushall()
    return server


@pytest.mark.parametrize("overwrite", [False, True], ids=["create", "overwrite"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_object_that_is_in_place_is_recognised_without_its_source(
    object_jobs: ObjectJobs, size: int, *, overwrite: bool
) -> None:
    bucket = object_jobs.bucket
    job_id = object_jobs.submit(
        "encrypt", bucket.put("in", bytes(size)), bucket.url("out/x"), overwrite=overwrite
    )
    before = Snapshot.of(object_jobs.core.worker_context.store.redis)
    assert object_jobs.run(job_id).state == "succeeded"
    placed = bucket.etag("out/x")
    before.restore()
    bucket.store.admin.delete_object(Bucket=bucket.name, Key="in")

    assert object_jobs.run(job_id).state == "succeeded"
    assert bucket.etag("out/x") == placed
    assert not bucket.uploads()


def test_upload_that_was_begun_before_its_note_had_its_id_is_aborted(object_jobs: ObjectJobs) -> None:
    """Its worker was killed between two requests. One that another program has parts of stays."""
    bucket, spool = object_jobs.bucket, object_jobs.state / "spool"
    target = bucket.url("out/x")
    job_id = object_jobs.submit("encrypt", bucket.put("in", bytes(SIZES["small"])), target)
    admin = bucket.store.admin
    foreign = admin.create_multipart_upload(Bucket=bucket.name, Key="out/x")["UploadId"]
    admin.upload_part(Bucket=bucket.name, Key="out/x", UploadId=foreign, PartNumber=1, Body=b"theirs")
    MultipartJournal(SpoolFolder(spool, DiskSync(spool))).add(job_id, "z" * 26, target)
    admin.create_multipart_upload(Bucket=bucket.name, Key="out/x")

    run_job(job_id, object_jobs.core.worker_context, "w/1")

    left = admin.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
    assert [each["UploadId"] for each in left] == [foreign]
    assert not list((spool / "multipart").iterdir())
