"""Objects written front to back in bounded memory; and read in order by few requests, also by threads."""

import mmap
import os
import random
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self, cast

import pytest

from kms_core.s3 import streams
from kms_core.s3.bucket import Bucket, Completion, If, ObjectReader, UploadedPart
from kms_core.s3.streams import BufferPool, ReadAhead, StreamedObject
from kms_protocol.errors import InvalidRequest, Unavailable
from support import blob_stores, object_stores
from support.object_stores import ObjectStore, S3Proxy, TestBucket
from support.waiting import until

KIB: Final = 1024
MIB: Final = 1024 * 1024
PART: Final = 64 * KIB
SIZE: Final = 10 * PART + 1000
UPLOADS: Final = 16
BLOCK: Final = 128 * KIB
DATA: Final = os.urandom(40 * MIB + 12_345)


@dataclass
class BlockingBucket:
    """A bucket in memory that answers no part before ``may_go``."""

    may_go: threading.Event = field(default_factory=threading.Event)
    sent: dict[str, dict[int, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def begin(self, key: str, mark: str) -> str:
        self.sent[key] = {}
        return mark

    def put_part(self, key: str, upload: str, number: int, body: memoryview) -> UploadedPart:
        del upload
        assert self.may_go.wait(60)
        self.sent[key][number] = bytes(body)
        return UploadedPart(number, "etag", len(body))

    def complete(self, key: str, upload: str, parts: Sequence[UploadedPart], condition: If) -> Completion:
        del upload, condition
        self.objects[key] = b"".join(self.sent[key][part.number] for part in parts)
        return Completion.DONE

    def put(self, key: str, body: memoryview, condition: If, mark: str) -> bool:
        del condition, mark
        self.objects[key] = bytes(body)
        return True

    def write(self, pool: BufferPool, key: str, data: bytes, declared_bytes: int = 0) -> StreamedObject:
        with closing(StreamedObject(cast("Bucket", self), key, key, pool, declared_bytes)) as out:
            for at in range(0, len(data), 5000):
                out.write(memoryview(data)[at : at + 5000])
            out.finish()
            return out

    @property
    def sizes(self) -> list[int]:
        (parts,) = self.sent.values()
        return [len(parts[number]) for number in sorted(parts)]


class Memory:
    """Counts the bytes of the mappings that there are, and the most."""

    def __init__(self) -> None:
        self.live = self.most = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.live += size
            self.most = max(self.most, self.live)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    counted = Memory()

    class Mapping(mmap.mmap):
        dropped: "weakref.finalize[Any, Any]"

        def __new__(cls, *args: Any) -> Self:  # noqa: ANN401 -- those of mmap
            made = super().__new__(cls, *args)
            counted.add(len(made))
            made.dropped = weakref.finalize(made, counted.add, -len(made))
            return made

        def close(self) -> None:
            super().close()
            self.dropped()

    monkeypatch.setattr(mmap, "mmap", Mapping)
    return counted


@pytest.mark.parametrize("parts", [UPLOADS, 3], ids=["one-each", "fewer-than-uploads"])
@pytest.mark.parametrize("declared", [0, SIZE], ids=["unknown", "declared"])
def test_uploads_at_once_stay_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, memory: Memory, parts: int, declared: int
) -> None:
    monkeypatch.setattr(streams, "PART_BYTES", PART)
    limit = parts * PART
    pool, bucket = BufferPool(limit, wait_s=60.0), BlockingBucket()
    data = {f"upload-{number}": os.urandom(SIZE) for number in range(UPLOADS)}

    with ThreadPoolExecutor(UPLOADS) as workers:
        writes = [workers.submit(bucket.write, pool, key, each, declared) for key, each in data.items()]
        until(lambda: memory.live == limit, "the pool is used up")
        bucket.may_go.set()
        for write in writes:
            write.result()

    assert memory.most == limit
    assert (memory.live, pool.used) == (0, 0)
    assert bucket.objects == data


def test_buffers_are_used_again(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> None:
    monkeypatch.setattr(streams, "PART_BYTES", PART)
    bucket = BlockingBucket()
    bucket.may_go.set()

    bucket.write(BufferPool(UPLOADS * PART), "one", os.urandom(100 * PART))

    assert memory.most <= 4 * PART
    assert memory.live == 0


def test_buffers_of_other_sizes_make_room(memory: Memory) -> None:
    pool = BufferPool(10 * KIB)
    first, *others = [pool.take(size * KIB) for size in (2, 4, 4)]
    for each in others:
        pool.give(each)
    assert memory.live == 10 * KIB

    second = pool.take(6 * KIB)

    assert memory.most == 10 * KIB
    pool.give(first)
    pool.give(second)
    assert memory.live == 0


@pytest.mark.parametrize(
    ("declared", "used", "limit", "part"),
    [
        (1024 * MIB, 0, 256 * MIB, 16 * MIB),
        (1024 * MIB, 64 * MIB, 256 * MIB, 16 * MIB),
        (1024 * MIB, 72 * MIB, 256 * MIB, 8 * MIB),
        (100 * 1024 * MIB, 0, 256 * MIB, 16 * MIB),
        (100 * 1024 * MIB, 0, 1024 * MIB, 64 * MIB),
        (1024 * MIB, 0, 128 * MIB, 8 * MIB),
        (100 * MIB, 0, 256 * MIB, 8 * MIB),
        (0, 0, 256 * MIB, 8 * MIB),
    ],
)
def test_parts_of_a_large_object_are_larger_while_there_is_room(
    declared: int, used: int, limit: int, part: int
) -> None:
    """A sixteenth of the bound at most, so that sixteen uploads at once have a buffer each."""
    pool, bucket = BufferPool(limit), BlockingBucket()
    bucket.may_go.set()
    taken = pool.take(used) if used else None
    with closing(StreamedObject(cast("Bucket", bucket), "key", "mark", pool, declared)) as out:
        out.write(memoryview(bytes(2 * part + 1)))
        out.finish()

    assert bucket.sizes == [part, part, 1]
    if taken:
        pool.give(taken)


def test_object_larger_than_was_said_is_whole(memory: Memory) -> None:
    bucket, data = BlockingBucket(), os.urandom(9 * MIB)
    bucket.may_go.set()

    bucket.write(BufferPool(16 * MIB), "key", data, declared_bytes=1000)

    assert bucket.objects == {"key": data}
    assert memory.live == 0


# -- reading -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> ObjectStore:
    return object_stores.moto()


@pytest.fixture
def s3_proxy(server: ObjectStore) -> Iterator[S3Proxy]:
    with S3Proxy(server) as s3_proxy:
        yield s3_proxy


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(64 * MIB)


@pytest.fixture(scope="module")
def bucket(server: ObjectStore) -> TestBucket:
    bucket = server.new()
    bucket.put("key", DATA)
    return bucket


@contextmanager
def opened(bucket: TestBucket, s3_proxy: S3Proxy, pool: BufferPool) -> Iterator[ReadAhead]:
    at = blob_stores.spool_bucket(bucket, s3_proxy.url).bucket
    found = at.head("key")
    assert found
    del s3_proxy.seen[:]
    with (
        closing(at.line),
        closing(ReadAhead(ObjectReader(at, "key", found.etag, found.size), pool, lambda exc: exc)) as reader,
    ):
        yield reader


@pytest.fixture
def reader(bucket: TestBucket, s3_proxy: S3Proxy, pool: BufferPool) -> Iterator[ReadAhead]:
    with opened(bucket, s3_proxy, pool) as reader:
        yield reader
    assert pool.used == 0


def read(reader: ReadAhead, start: int, stop: int) -> bytes:
    """Read a range as blobs are read: whole blocks, several to a call."""
    data = bytearray(stop - start)
    views = [memoryview(data)[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    assert reader.read_into(views, start)
    return bytes(data)


def asked(s3_proxy: S3Proxy) -> list[int]:
    """The sizes of the ranges."""
    spans = [seen.headers["range"].removeprefix("bytes=").split("-") for seen in s3_proxy.seen]
    return [int(stop) - int(start) + 1 for start, stop in spans]


def test_object_is_read_by_ranges_that_grow(reader: ReadAhead, s3_proxy: S3Proxy) -> None:
    found = b"".join(read(reader, at, min(at + MIB, len(DATA))) for at in range(0, len(DATA), MIB))

    assert found == DATA
    assert asked(s3_proxy) == [256 * 1024, MIB, 4 * MIB, 16 * MIB, len(DATA) - 21 * MIB - 256 * 1024]


def test_last_blocks_are_looked_at_without_an_end_of_the_stream(reader: ReadAhead, s3_proxy: S3Proxy) -> None:
    for start in range(0, 30 * MIB, MIB):
        assert read(reader, start, start + MIB) == DATA[start : start + MIB]
        assert reader.read_at(len(DATA) - 100, 16) == DATA[-100:-84]

    assert len(s3_proxy.seen) == 6


@pytest.mark.parametrize("turn", [(1, 0), (3, 0, 1, 2), (2, 3, 1, 0)], ids=str)
def test_reads_of_threads_that_overtake_each_other_share_the_stream(
    reader: ReadAhead, s3_proxy: S3Proxy, turn: tuple[int, ...]
) -> None:
    for base in range(0, 32, len(turn)):
        for start in ((base + number) * MIB for number in turn):
            assert read(reader, start, start + MIB) == DATA[start : start + MIB]

    assert len(s3_proxy.seen) < 10


def test_late_thread_leaves_the_stream_to_the_others(reader: ReadAhead, s3_proxy: S3Proxy) -> None:
    for number in (0, 3, 4, 6, 8, 10, 12, 13, 14):  # each that jumps ahead keeps what is between
        read(reader, number * MIB, (number + 1) * MIB)
    del s3_proxy.seen[:]

    assert read(reader, 5 * MIB, 6 * MIB) == DATA[5 * MIB : 6 * MIB]
    assert read(reader, 15 * MIB, 16 * MIB) == DATA[15 * MIB : 16 * MIB]

    assert asked(s3_proxy) == [MIB]


def test_threads_read_at_the_same_time(reader: ReadAhead) -> None:
    starts, lock = iter(range(0, 32 * MIB, MIB)), threading.Lock()

    def work() -> bool:
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return True
            assert read(reader, start, start + MIB) == DATA[start : start + MIB]

    with ThreadPoolExecutor(4) as workers:
        assert all(each.result() for each in [workers.submit(work) for _ in range(4)])


def test_any_order_of_reads_is_right(reader: ReadAhead, pool: BufferPool) -> None:
    chance = random.Random(7)  # noqa: S311 -- the same order each time
    for _ in range(30):
        start = chance.randrange(len(DATA))
        stop = min(len(DATA), start + chance.choice([1, 1000, BLOCK, MIB]))
        assert read(reader, start, stop) == DATA[start:stop]
        assert pool.used <= 12 * MIB


def test_small_read_asks_for_little(reader: ReadAhead, s3_proxy: S3Proxy) -> None:
    assert reader.read_at(20 * MIB, 1000) == DATA[20 * MIB : 20 * MIB + 1000]

    assert asked(s3_proxy) == [256 * 1024]


def test_answers_that_break_off_go_on_where_they_ended(reader: ReadAhead, s3_proxy: S3Proxy) -> None:
    """The third and the fourth break off; what arrived before is not asked for again."""
    s3_proxy.intercept = lambda _: -700_000 if len(s3_proxy.seen) in {3, 4} else None

    found = b"".join(read(reader, at, at + MIB) for at in range(0, 30 * MIB, MIB))

    assert found == DATA[: 30 * MIB]
    starts = [int(seen.headers["range"].removeprefix("bytes=").split("-")[0]) for seen in s3_proxy.seen]
    assert starts[2:5] == [5 * BLOCK * 2, 5 * BLOCK * 2 + 700_000, 5 * BLOCK * 2 + 1_400_000]


def test_answers_that_always_break_off_are_an_error(reader: ReadAhead, s3_proxy: S3Proxy) -> None:
    read(reader, 0, MIB)
    s3_proxy.intercept = lambda _: -1 if len(s3_proxy.seen) < 9 else 503

    with pytest.raises(Unavailable):
        read(reader, 2 * MIB, 3 * MIB)
    s3_proxy.intercept = lambda _: None

    assert read(reader, 2 * MIB, 3 * MIB) == DATA[2 * MIB : 3 * MIB]


def test_object_that_changes_is_refused_where_the_stream_goes_on(
    server: ObjectStore, s3_proxy: S3Proxy, pool: BufferPool
) -> None:
    bucket = server.new()
    bucket.put("key", DATA[: 9 * MIB])
    with opened(bucket, s3_proxy, pool) as reader:
        read(reader, 0, MIB)
        bucket.put("key", bytes(9 * MIB))

        with pytest.raises(InvalidRequest):
            read(reader, MIB, 9 * MIB)


def test_without_room_it_is_read_all_the_same(reader: ReadAhead, s3_proxy: S3Proxy, pool: BufferPool) -> None:
    taken = pool.take(60 * MIB)

    found = b"".join(read(reader, at, at + MIB) for at in range(0, 30 * MIB, MIB))

    assert found == DATA[: 30 * MIB]
    assert len(s3_proxy.seen) < 10
    assert pool.used == 60 * MIB
    pool.give(taken)


def test_reader_that_ends_early_leaves_no_connection_with_bytes_of_it(
    reader: ReadAhead, s3_proxy: S3Proxy
) -> None:
    """The next request would read the rest as its answer."""
    for start in range(0, 7 * MIB, MIB):
        read(reader, start, start + MIB)
    reader.close()

    assert read(reader, 0, 1000) == DATA[:1000]
    assert s3_proxy.operations == ["GetObject"] * len(s3_proxy.seen)
