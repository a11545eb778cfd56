"""Objects read in order: by few requests, in little memory, by threads, and where answers break off."""

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from kms_core.s3.multipart import ObjectReader
from kms_core.s3.streams import BufferPool, ReadAhead
from kms_protocol.errors import InvalidRequest, Unavailable
from support import blob_stores, object_stores
from support.blob_stores import MIB
from support.object_stores import ObjectStore, TestBucket, Way

BLOCK = 128 * 1024
DATA = os.urandom(40 * MIB + 12_345)


@pytest.fixture(scope="module")
def server() -> ObjectStore:
    return object_stores.moto()


@pytest.fixture
def way(server: ObjectStore) -> Iterator[Way]:
    with Way(server) as way:
        yield way


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(64 * MIB)


@pytest.fixture(scope="module")
def bucket(server: ObjectStore) -> TestBucket:
    bucket = server.new()
    bucket.put("key", DATA)
    return bucket


@contextmanager
def opened(bucket: TestBucket, way: Way, pool: BufferPool) -> Iterator[ReadAhead]:
    at = blob_stores.spool_bucket(bucket, way.url).bucket
    found = at.head("key")
    assert found
    del way.seen[:]
    with (
        closing(at.line),
        closing(ReadAhead(ObjectReader(at, "key", found.etag, found.size), pool, lambda exc: exc)) as reader,
    ):
        yield reader


@pytest.fixture
def reader(bucket: TestBucket, way: Way, pool: BufferPool) -> Iterator[ReadAhead]:
    with opened(bucket, way, pool) as reader:
        yield reader
    assert pool.used == 0


def read(reader: ReadAhead, start: int, stop: int) -> bytes:
    """Read a range as blobs are read: whole blocks, several to a call."""
    data = bytearray(stop - start)
    views = [memoryview(data)[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    assert reader.read_into(views, start)
    return bytes(data)


def asked(way: Way) -> list[int]:
    """The sizes of the ranges."""
    spans = [seen.headers["range"].removeprefix("bytes=").split("-") for seen in way.seen]
    return [int(stop) - int(start) + 1 for start, stop in spans]


def test_object_is_read_by_ranges_that_grow(reader: ReadAhead, way: Way) -> None:
    found = b"".join(read(reader, at, min(at + MIB, len(DATA))) for at in range(0, len(DATA), MIB))

    assert found == DATA
    assert asked(way) == [256 * 1024, MIB, 4 * MIB, 16 * MIB, len(DATA) - 21 * MIB - 256 * 1024]


def test_last_blocks_are_looked_at_without_an_end_of_the_stream(reader: ReadAhead, way: Way) -> None:
    for start in range(0, 30 * MIB, MIB):
        assert read(reader, start, start + MIB) == DATA[start : start + MIB]
        assert reader.read_at(len(DATA) - 100, 16) == DATA[-100:-84]

    assert len(way.seen) == 6


@pytest.mark.parametrize("turn", [(1, 0), (3, 0, 1, 2), (2, 3, 1, 0)], ids=str)
def test_reads_of_threads_that_overtake_each_other_share_the_stream(
    reader: ReadAhead, way: Way, turn: tuple[int, ...]
) -> None:
    for base in range(0, 32, len(turn)):
        for start in ((base + number) * MIB for number in turn):
            assert read(reader, start, start + MIB) == DATA[start : start + MIB]

    assert len(way.seen) < 10


def test_late_thread_leaves_the_stream_to_the_others(reader: ReadAhead, way: Way) -> None:
    for number in (0, 3, 4, 6, 8, 10, 12, 13, 14):  # each that jumps ahead keeps what is between
        read(reader, number * MIB, (number + 1) * MIB)
    del way.seen[:]

    assert read(reader, 5 * MIB, 6 * MIB) == DATA[5 * MIB : 6 * MIB]
    assert read(reader, 15 * MIB, 16 * MIB) == DATA[15 * MIB : 16 * MIB]

    assert asked(way) == [MIB]


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


def test_small_read_asks_for_little(reader: ReadAhead, way: Way) -> None:
    assert reader.read_at(20 * MIB, 1000) == DATA[20 * MIB : 20 * MIB + 1000]

    assert asked(way) == [256 * 1024]


def test_answers_that_break_off_go_on_where_they_ended(reader: ReadAhead, way: Way) -> None:
    """The third and the fourth break off; what arrived before is not asked for again."""
    way.meddle = lambda _: -700_000 if len(way.seen) in {3, 4} else None

    found = b"".join(read(reader, at, at + MIB) for at in range(0, 30 * MIB, MIB))

    assert found == DATA[: 30 * MIB]
    starts = [int(seen.headers["range"].removeprefix("bytes=").split("-")[0]) for seen in way.seen]
    assert starts[2:5] == [5 * BLOCK * 2, 5 * BLOCK * 2 + 700_000, 5 * BLOCK * 2 + 1_400_000]


def test_answers_that_always_break_off_are_an_error(reader: ReadAhead, way: Way) -> None:
    read(reader, 0, MIB)
    way.meddle = lambda _: -1 if len(way.seen) < 9 else 503

    with pytest.raises(Unavailable):
        read(reader, 2 * MIB, 3 * MIB)
    way.meddle = lambda _: None

    assert read(reader, 2 * MIB, 3 * MIB) == DATA[2 * MIB : 3 * MIB]


def test_object_that_changes_is_refused_where_the_stream_goes_on(
    server: ObjectStore, way: Way, pool: BufferPool
) -> None:
    bucket = server.new()
    bucket.put("key", DATA[: 9 * MIB])
    with opened(bucket, way, pool) as reader:
        read(reader, 0, MIB)
        bucket.put("key", bytes(9 * MIB))

        with pytest.raises(InvalidRequest):
            read(reader, MIB, 9 * MIB)


def test_without_room_it_is_read_all_the_same(reader: ReadAhead, way: Way, pool: BufferPool) -> None:
    taken = pool.take(60 * MIB)

    found = b"".join(read(reader, at, at + MIB) for at in range(0, 30 * MIB, MIB))

    assert found == DATA[: 30 * MIB]
    assert len(way.seen) < 10
    assert pool.used == 60 * MIB
    pool.give(taken)


def test_reader_that_ends_early_leaves_no_connection_with_bytes_of_it(reader: ReadAhead, way: Way) -> None:
    """The next request would read the rest as its answer."""
    for start in range(0, 7 * MIB, MIB):
        read(reader, start, start + MIB)
    reader.close()

    assert read(reader, 0, 1000) == DATA[:1000]
    assert way.names == ["GetObject"] * len(way.seen)
