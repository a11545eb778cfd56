"""Jobs on objects by a real worker: killed in the middle, and what the disks hold meanwhile."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.object_stores import ObjectStore, S3Proxy, SeenRequest, TestBucket
from support.service import CANARY, CONTEXT, Service
from support.waiting import until

MiB = 1024 * 1024
DATA = CANARY.encode() * (28 * MiB // len(CANARY))


@pytest.fixture
def bucket(weed: ObjectStore) -> TestBucket:
    return weed.new()


@pytest.fixture
def running(tmp_path: Path, redis_url: str, bucket: TestBucket, s3_proxy: S3Proxy) -> Iterator[Service]:
    settings = "[kms.jobs]\nlease_s = 2\nconcurrency = 1\n" + bucket.settings(
        tmp_path / "secret", s3_proxy.url
    )
    with Service(tmp_path, settings, redis_url) as service:
        yield service.start()


class Gate:
    """Holds up the third part of an upload, and all after it, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self._parts = 0
        self._lock = threading.Lock()

    def __call__(self, seen: SeenRequest) -> None:
        with self._lock:
            self._parts += seen.operation == "UploadPart"
            held = self._parts > 2
        if held and not self.open.is_set():
            self.reached.set()
            self.open.wait(60)


def on_disk(folder: Path) -> list[str]:
    """The files below a folder that hold the plaintext."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [str(path) for path in found if CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize("kind", ["encrypt", "decrypt"])
def test_worker_killed_in_the_middle_of_an_upload(
    running: Service, bucket: TestBucket, s3_proxy: S3Proxy, tmp_path: Path, kind: str
) -> None:
    source = bucket.put("in", DATA)
    if kind == "decrypt":
        running.wait(running.submit(_job("encrypt", source, bucket.url("out/sealed"))), "succeeded")
        source = bucket.url("out/sealed")
    s3_proxy.intercept = gate = Gate()
    job_id = running.submit(_job(kind, source, bucket.url("out/target")))
    assert gate.reached.wait(60)
    meanwhile = on_disk(tmp_path)
    assert bucket.etag("out/target") is None
    running.kill("worker")
    gate.open.set()
    s3_proxy.intercept = lambda _: None
    until(bucket.uploads, "the upload that the killed worker left")
    running.start("worker")

    job = running.wait(job_id, "succeeded")

    assert job["attempt"] == 2
    assert bucket.uploads() == []
    assert meanwhile == on_disk(tmp_path) == []
    assert not list((running.spool / "multipart").iterdir())
    if kind == "decrypt":
        assert bucket.get("out/target") == DATA
    else:
        running.wait(running.submit(_job("decrypt", bucket.url("out/target"), bucket.url("out/back"))))
        assert bucket.get("out/back") == DATA


def _job(kind: str, source: str, target: str) -> dict[str, object]:
    return {"kind": kind, "source": source, "target": target, "context": CONTEXT}
