"""One run over an object, as a program: sealed, opened, moved to another key by us, or copied by obstore.

``drive_s3 OPERATION IDENTITY ENDPOINT SOURCE TARGET``; both are keys of the bucket ``bench``.
"""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import obstore
from benchmarks import drive_kms
from benchmarks.drive_kms import CONTEXT, KEY, Local
from obstore.store import S3Store

from kms_core.age import header, stream
from kms_core.age.header import FILE_LIMITS
from kms_core.envelope import sealing
from kms_core.jobs.execution.one_file import REMOTE_SLAB_CHUNKS, REMOTE_THREADS
from kms_core.payload import parallel
from kms_core.payload.parallel import ParallelOptions
from kms_core.s3.bucket import ALWAYS, Bucket, ObjectReader
from kms_core.s3.connection import Credentials, S3Connection, S3Endpoint
from kms_core.s3.multipart import PART_BYTES, Assembly

BUCKET: Final = "bench"
ACCESS_KEY: Final = "AKIDBENCH"
SECRET: Final = "no-secret"  # noqa: S105 -- of a server on loopback, for the time of a benchmark
OPTIONS: Final = ParallelOptions(REMOTE_THREADS, REMOTE_SLAB_CHUNKS)


def bucket(endpoint: str) -> Bucket:
    place = S3Endpoint(endpoint, "us-east-1", lambda: Credentials(ACCESS_KEY, SECRET), None, 60.0)
    return Bucket(BUCKET, S3Connection(place), path_style=True)


def reader(at: Bucket, key: str) -> ObjectReader:
    found = at.head(key)
    if found is None:
        raise RuntimeError(f"there is no {key}")
    return ObjectReader(at, key, found.etag, found.size)


def seal(by: Local, source: ObjectReader, target: Assembly) -> None:
    begun = sealing.begin([(by, KEY)], CONTEXT, padded=True)
    parallel.seal_file(begun.payload_key, source, target, begun.head, OPTIONS)


def open_(by: Local, source: ObjectReader, target: Assembly) -> None:
    head = header.read_by(source.read_at, FILE_LIMITS)
    key = stream.payload_key(drive_kms.file_key_of(head, by), head.nonce)
    parallel.open_file(key, source.tail(head.payload_offset), target, OPTIONS)


def reseal(by: Local, source: ObjectReader, target: Assembly) -> None:
    head = header.read_by(source.read_at, FILE_LIMITS)
    old = stream.payload_key(drive_kms.file_key_of(head, by), head.nonce)
    begun = sealing.begin([(by, KEY)], CONTEXT, padded=True)
    payload = source.tail(head.payload_offset)
    parallel.reseal_file((old, begun.payload_key), payload, target, begun.head, OPTIONS)


def rewrap(by: Local, source: ObjectReader, target: Assembly) -> None:
    head = header.read_by(source.read_at, FILE_LIMITS)
    file_key = drive_kms.file_key_of(head, by)
    new = sealing.begin([(by, KEY)], CONTEXT, padded=True, payload=(file_key, head.nonce)).header
    payload = source.tail(head.size)
    target.reserve(len(new) + payload.size)
    target.write_at(memoryview(new), 0)
    lead = target.part_bytes - len(new)
    parallel.copy_run(payload.head(lead), target, len(new), OPTIONS)
    if not target.copy(payload.tail(lead), OPTIONS.check, OPTIONS.progress):
        raise RuntimeError("the store cannot copy parts")


async def copy(endpoint: str, source: str, target: str) -> None:
    """By obstore alone, streamed through this process: what a client of the store can do."""
    store = plain_store(endpoint)
    pieces = (await obstore.get_async(store, source)).stream(PART_BYTES)
    await obstore.put_async(store, target, pieces, chunk_size=PART_BYTES, max_concurrency=REMOTE_THREADS)


def plain_store(endpoint: str) -> S3Store:
    """The bucket as obstore has it."""
    return S3Store(
        BUCKET,
        endpoint=endpoint,
        region="us-east-1",
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET,
        client_options={"allow_http": True, "timeout": "300s"},
    )


OURS: Final[dict[str, Callable[[Local, ObjectReader, Assembly], None]]] = {
    "seal": seal,
    "open": open_,
    "reseal": reseal,
    "rewrap": rewrap,
}


def main(operation: str, identity: str, endpoint: str, source: str, target: str) -> None:
    if operation == "copy":
        asyncio.run(copy(endpoint, source, target))
        os._exit(0)  # at the usual end of Python obstore 0.12 aborts every other time
    at = bucket(endpoint)
    writer = Assembly(at, target, "bench", lambda: at.begin(target, "bench"))
    OURS[operation](drive_kms.wrapper(Path(identity)), reader(at, source), writer)
    writer.settle()
    if writer.upload:
        at.complete(target, writer.upload, writer.parts, ALWAYS)
    else:
        at.put(target, writer.whole, ALWAYS, "bench")


if __name__ == "__main__":
    main(*sys.argv[1:])
