"""Payloads that pass by once, or by parts: the same bytes, from few chunks, and only genuine ones."""

import io
import os
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_core.age import stream
from kms_core.age.stream import CHUNK, SEALED_CHUNK
from kms_core.payload.files import FileRange, MemoryRange
from kms_core.payload.parallel import ParallelOptions
from kms_core.payload.streaming import RangeReader, SlabSealer, open_pipe, seal_pipe
from kms_protocol.errors import DecryptFailed, JobCancelled

KEY = bytes(range(32))
SIZES = [0, 1, CHUNK, CHUNK + 1, 2 * CHUNK, 4 * CHUNK, 4 * CHUNK + 1, 33 * CHUNK - 1]
TWO = ParallelOptions(slab_chunks=2)


class Trickle:
    """Gives and takes at most 1,000 bytes at a time, as sockets do."""

    def __init__(self, data: bytes = b"") -> None:
        self._whole = io.BytesIO(data)

    def readinto(self, buffer: memoryview) -> int:
        return self._whole.readinto(buffer[:1000])

    def write(self, data: memoryview) -> int:
        return self._whole.write(data[:1000])

    def getvalue(self) -> bytes:
        return self._whole.getvalue()


@pytest.mark.parametrize("options", [ParallelOptions(), TWO], ids=["usual", "two-chunks"])
@pytest.mark.parametrize("kind", [io.BytesIO, Trickle], ids=["whole", "trickle"])
@pytest.mark.parametrize("size", SIZES)
def test_pipes_carry_what_memory_would(
    size: int, kind: type[io.BytesIO | Trickle], options: ParallelOptions
) -> None:
    plaintext = os.urandom(size)
    sealed, opened = kind(), kind()

    assert seal_pipe(KEY, kind(plaintext), sealed, options) == size
    assert sealed.getvalue() == stream.seal(KEY, plaintext)
    assert open_pipe(KEY, kind(sealed.getvalue()), opened, options) == size
    assert opened.getvalue() == plaintext


@pytest.mark.parametrize("slab_chunks", [1, 2, 16])
@pytest.mark.parametrize(
    ("position", "released"),
    [(0, 0), (SEALED_CHUNK, 1), (4 * SEALED_CHUNK + 70, 4), (5 * SEALED_CHUNK + 1, 5)],
    ids=["first", "second", "fifth", "last"],
)
def test_chunks_before_a_forged_one_are_released(position: int, released: int, slab_chunks: int) -> None:
    plaintext = os.urandom(5 * CHUNK + 100)
    sealed = bytearray(stream.seal(KEY, plaintext))
    sealed[position] ^= 1
    target = io.BytesIO()

    with pytest.raises(DecryptFailed):
        open_pipe(KEY, io.BytesIO(sealed), target, ParallelOptions(slab_chunks=slab_chunks))
    assert target.getvalue() == plaintext[: released * CHUNK]


@pytest.mark.parametrize("slab_chunks", [1, 2, 16])
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(
    ("cut_to", "tail"),
    [(0, b""), (1, b""), (None, b"x"), (None, bytes(16)), (None, bytes(SEALED_CHUNK))],
    ids=["empty", "cut-at-border", "byte", "empty-chunk", "chunk"],
)
def test_a_whole_chunk_at_the_wrong_place_is_released_and_the_rest_refused(
    cut_to: int | None, tail: bytes, chunks: int, slab_chunks: int
) -> None:
    plaintext = os.urandom(chunks * CHUNK)
    kept = chunks if cut_to is None else cut_to
    sealed = stream.seal(KEY, plaintext)[: kept * SEALED_CHUNK] + tail
    target = io.BytesIO()

    with pytest.raises(DecryptFailed):
        open_pipe(KEY, io.BytesIO(sealed), target, ParallelOptions(slab_chunks=slab_chunks))
    assert target.getvalue() == plaintext[: kept * CHUNK]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5 * CHUNK), max_size=6), st.booleans())
def test_pieces_of_any_size_seal_to_the_same_bytes(sizes: list[int], told: bool) -> None:
    plaintext = os.urandom(sum(sizes))
    source, given_, sealed = io.BytesIO(plaintext), 0, b""
    sealer = SlabSealer(KEY, 2)
    for size in sizes:
        given_ += size
        for slab in sealer.feed(source.read(size), more=told and given_ < len(plaintext)):
            sealed += slab  # each is good until the next is asked for

    assert sealed + sealer.finish() == stream.seal(KEY, plaintext)
    assert sealer.size == len(plaintext)


def test_whole_slabs_that_others_follow_are_sealed_where_they_lie() -> None:
    plaintext = bytearray(os.urandom(4 * CHUNK))
    sealer = SlabSealer(KEY, 2)
    before = bytes(plaintext)

    sealed = b"".join(map(bytes, sealer.feed(plaintext, more=True)))
    assert len(sealed) == 4 * SEALED_CHUNK
    assert sealed + b"".join(sealer.feed(b"x")) + sealer.finish() == stream.seal(KEY, before + b"x")
    assert plaintext == before


def test_a_finished_payload_takes_nothing_more() -> None:
    sealer = SlabSealer(KEY)
    sealer.finish()

    with pytest.raises(ValueError, match="finished"):
        list(sealer.feed(b"more"))
    with pytest.raises(ValueError, match="finished"):
        sealer.finish()


def test_progress_and_check_see_every_slab() -> None:
    done: list[int] = []
    checks: list[None] = []
    options = ParallelOptions(slab_chunks=2, progress=done.append, check=lambda: checks.append(None))
    sealed = io.BytesIO()
    seal_pipe(KEY, io.BytesIO(bytes(3 * CHUNK)), sealed, options)
    open_pipe(KEY, io.BytesIO(sealed.getvalue()), io.BytesIO(), options)

    assert done == [2 * CHUNK, CHUNK] * 2
    assert len(checks) == 4


def test_a_raised_check_ends_a_pipe() -> None:
    def cancelled() -> None:
        raise JobCancelled

    with pytest.raises(JobCancelled):
        seal_pipe(KEY, io.BytesIO(b"x"), io.BytesIO(), ParallelOptions(check=cancelled))


def test_real_pipes_carry_it_too() -> None:
    plaintext = os.urandom(40 * CHUNK)
    reading, writing = os.pipe()
    opened = io.BytesIO()

    def send() -> int:
        with os.fdopen(writing, "wb", buffering=0) as target:
            return seal_pipe(KEY, io.BytesIO(plaintext), target)

    with os.fdopen(reading, "rb", buffering=0) as source, ThreadPoolExecutor(1) as other:
        sent = other.submit(send)
        received = open_pipe(KEY, source, opened)

    assert sent.result() == received == len(plaintext)
    assert opened.getvalue() == plaintext


def test_a_stream_without_data_yet_does_not_pass_for_an_ended_one() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with (
        os.fdopen(reading, "rb", buffering=0) as source,
        os.fdopen(writing, "wb"),
        pytest.raises(BlockingIOError),
    ):
        seal_pipe(KEY, source, io.BytesIO())


# -- parts -----------------------------------------------------------------------------------------------


def reader_of(sealed: bytes) -> RangeReader:
    return RangeReader(KEY, MemoryRange(memoryview(sealed)))


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 40 * CHUNK + 17])
def test_any_range_is_that_of_the_plaintext(size: int) -> None:
    plaintext = os.urandom(size)
    sealed = stream.seal(KEY, plaintext)
    reader = reader_of(sealed)
    chance = random.Random(size)  # noqa: S311 -- a repeatable choice of ranges

    assert reader.size == size
    for _ in range(50):
        start, length = chance.randrange(size + 2), chance.randrange(3 * CHUNK)
        assert reader.read_at(start, length) == plaintext[start : start + length]
        assert b"".join(reader.sealed_slabs(start, start + length)) == sealed[start : start + length]
        tail = reader.tail(min(start, size))
        assert (tail.size, tail.read_at(3, length)) == (
            max(0, size - start),
            plaintext[start:][3 : 3 + length],
        )


def test_slabs_come_in_order_and_small() -> None:
    plaintext = os.urandom(40 * CHUNK + 17)
    sealed = stream.seal(KEY, plaintext)
    whole = list(reader_of(sealed).slabs())
    part = list(reader_of(sealed).slabs(100, 39 * CHUNK))

    assert b"".join(whole) == plaintext
    assert b"".join(part) == plaintext[100 : 39 * CHUNK]
    assert max(map(len, whole + part)) <= 16 * CHUNK


def test_only_the_chunks_touched_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    read_into = MemoryRange.read_into

    def noted(source: MemoryRange, views: Sequence[memoryview], position: int) -> bool:
        asked.append((position, sum(map(len, views))))
        return read_into(source, views, position)

    monkeypatch.setattr(MemoryRange, "read_into", noted)
    reader = reader_of(stream.seal(KEY, bytes(40 * CHUNK)))
    reader.read_at(5 * CHUNK - 10, 20)
    reader.read_at(7, 0)
    reader.read_at(40 * CHUNK, 10)

    assert asked == [(at * SEALED_CHUNK, SEALED_CHUNK) for at in (39, 4, 5)]


@pytest.mark.parametrize("size", [0, 10, SEALED_CHUNK, 2 * SEALED_CHUNK, 2 * SEALED_CHUNK + 50])
def test_cut_payload_is_refused_before_any_read(size: int) -> None:
    with pytest.raises(DecryptFailed):
        reader_of(stream.seal(KEY, bytes(3 * CHUNK))[:size])


def test_a_forged_chunk_spoils_the_ranges_that_touch_it() -> None:
    sealed = bytearray(stream.seal(KEY, bytes(5 * CHUNK)))
    sealed[2 * SEALED_CHUNK] ^= 1
    reader = reader_of(bytes(sealed))

    assert reader.read_at(0, 2 * CHUNK) == bytes(2 * CHUNK)
    assert len(b"".join(reader.sealed_slabs(0, 2 * SEALED_CHUNK))) == 2 * SEALED_CHUNK
    for read in (reader.slabs(0, 2 * CHUNK + 1), reader.sealed_slabs(0, 2 * SEALED_CHUNK + 1)):
        with pytest.raises(DecryptFailed):
            next(read)


@pytest.mark.parametrize("kept", [SEALED_CHUNK + 5, 2 * SEALED_CHUNK], ids=["a part", "whole chunks"])
def test_a_source_that_gives_less_is_refused(kept: int) -> None:
    sealed = stream.seal(KEY, bytes(5 * CHUNK))
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(sealed)
        reader = RangeReader(KEY, FileRange(file.fileno(), len(sealed)))
        file.truncate(kept)

        with pytest.raises(DecryptFailed):
            reader.read_at(0, 3 * CHUNK)


def test_no_range_starts_before_the_file() -> None:
    with pytest.raises(ValueError, match="starts at 0"):
        reader_of(stream.seal(KEY, b"abc")).read_at(-1, 2)
