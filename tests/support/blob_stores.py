"""Places for the spool, for tests that hold for each: a directory, and buckets of real servers."""

import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kms_core.jobs.storage.blob_store import BlobStore
from kms_core.jobs.storage.spool import NO_ATTEMPT, UPLOAD, Label, Spool
from kms_core.jobs.storage.spool_bucket import SpoolBucket
from kms_core.jobs.storage.spool_folder import DiskSync, SpoolFolder
from kms_core.s3.bucket import Bucket
from kms_core.s3.connection import Credentials, S3Connection, S3Endpoint
from kms_core.s3.streams import BufferPool
from kms_core.shared_time import SharedTime
from support import object_stores
from support.object_stores import ACCESS_KEY, SECRET, TestBucket
from support.waiting import until

PREFIX: Final = "the/spool/"
JOB: Final = "11111111-1111-1111-1111-111111111111"
OTHER: Final = "22222222-2222-2222-2222-222222222222"
SECRET_TEXT: Final = b"Kanarienvogel-4711 " * 1000
MIB: Final = 1024 * 1024


def label(job_id: str = JOB, role: str = UPLOAD, tenant: str = "default", attempt: str = NO_ATTEMPT) -> Label:
    return Label(tenant, job_id, role, attempt)


def write(spool: Spool, at: Label, *pieces: bytes) -> Label:
    """Write a blob; the label that reads it."""
    with spool.writing(at) as out:
        for piece in pieces or (SECRET_TEXT,):
            out.write(piece)
    return replace(at, ref=out.ref)


def read(spool: Spool, at: Label) -> bytes:
    with spool.opened(at) as reader:
        return b"".join(reader.slabs())


@dataclass(frozen=True)
class BlobStoreCase:
    """A store of blobs, and the ways of others to it."""

    store: BlobStore
    files: Callable[[], dict[str, bytes]]
    """All that rests there, by folder and name."""
    change: Callable[[str, bytes], object]
    """Write content in place of that of a blob."""
    unfinished: Callable[[], list[str]]
    """What writers left that no name shows."""
    close: Callable[[], object] = lambda: None


def of_folder(path: Path) -> BlobStoreCase:
    store = SpoolFolder(path, DiskSync(path))

    def files() -> dict[str, bytes]:
        found = (each for each in path.rglob("*") if each.is_file())
        return {str(each.relative_to(path)): each.read_bytes() for each in found}

    def change(name: str, data: bytes) -> None:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)

    return BlobStoreCase(store, files, change, list)


def connection(url: str, access_key: str = ACCESS_KEY, timeout_s: float = 20.0) -> S3Connection:
    endpoint = S3Endpoint(url, "us-east-1", lambda: Credentials(access_key, SECRET), None, timeout_s)
    return S3Connection(endpoint, first_wait_s=0.01)


def spool_bucket(
    bucket: TestBucket, url: str = "", buffer_bytes: int = 64 * MIB, away: SharedTime | None = None
) -> SpoolBucket:
    """The spool in a bucket, behind another address if one is given."""
    line = connection(url or bucket.store.url)
    pool = BufferPool(buffer_bytes, wait_s=0.5)
    return SpoolBucket(Bucket(bucket.name, line, path_style=True), PREFIX, pool, away=away or SharedTime())


def close(store: SpoolBucket) -> None:
    """Close a store, after its threads: the one that counts, and the one that asks for an answer."""
    store.bucket.head = lambda _: None  # type: ignore[method-assign, assignment]
    names = {"spool-use", "spool-away"}
    until(lambda: not names & {each.name for each in threading.enumerate()}, "no thread uses it")
    store.bucket.line.close()


def of_bucket(bucket: TestBucket) -> BlobStoreCase:
    def files() -> dict[str, bytes]:
        return {key.removeprefix(PREFIX): bucket.get(key) for key in bucket.keys()}  # noqa: SIM118 -- no dict

    def change(name: str, data: bytes) -> None:
        bucket.put(PREFIX + name, data)

    store = spool_bucket(bucket)
    return BlobStoreCase(store, files, change, bucket.uploads, store.bucket.line.close)


def make(kind: str, folder: Path) -> BlobStoreCase:
    """A new place of a kind: ``folder``, ``moto``, ``weed`` or ``minio``."""
    if kind == "folder":
        path = folder / f"spool-{uuid.uuid4()}"
        path.mkdir(0o700)
        return of_folder(path)
    store = {"moto": object_stores.moto, "weed": object_stores.weed, "minio": object_stores.minio}[kind]()
    return of_bucket(store.new())


KINDS: Final = ("folder", "moto", "weed", *(["minio"] if shutil.which("minio") else []))
"""MinIO takes minutes to build: it takes part where it is on the PATH."""
