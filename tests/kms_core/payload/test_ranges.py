"""Parts of a payload: right, from few chunks, and never from a cut file."""

import os
import random
from collections.abc import Callable, Sequence

import pytest

from kms_core.age import stream
from kms_core.age.stream import CHUNK, SEALED_CHUNK
from kms_core.payload.streaming import RangeReader
from kms_protocol.errors import DecryptFailed

KEY = bytes(range(32))


class Store:
    """Sealed bytes that remember what was asked of them."""

    def __init__(self, sealed: bytes) -> None:
        self.sealed = sealed
        self.asked: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return len(self.sealed)

    def read_at(self, position: int, length: int) -> bytes:
        return self.sealed[position : position + length]

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        self.asked.append((position, sum(map(len, views))))
        for view in views:
            data = self.read_at(position, len(view))
            view[: len(data)] = data
            position += len(view)
        return position <= self.size

    def stamp(self) -> None:
        """Nothing: it does not change."""

    def tail(self, position: int) -> "Store":
        return Store(self.sealed[position:])

    def reader(self) -> RangeReader:
        return RangeReader(KEY, self)


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 40 * CHUNK + 17])
def test_any_range_is_that_of_the_plaintext(size: int) -> None:
    plaintext = os.urandom(size)
    sealed = stream.seal(KEY, plaintext)
    reader = Store(sealed).reader()
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
    whole = list(Store(sealed).reader().slabs())
    part = list(Store(sealed).reader().slabs(100, 39 * CHUNK))

    assert b"".join(whole) == plaintext
    assert b"".join(part) == plaintext[100 : 39 * CHUNK]
    assert max(map(len, whole + part)) <= 16 * CHUNK


def test_only_the_chunks_touched_are_read() -> None:
    store = Store(stream.seal(KEY, bytes(40 * CHUNK)))
    reader = store.reader()
    reader.read_at(5 * CHUNK - 10, 20)
    reader.read_at(7, 0)
    reader.read_at(40 * CHUNK, 10)

    assert store.asked == [(at * SEALED_CHUNK, SEALED_CHUNK) for at in (39, 4, 5)]


@pytest.mark.parametrize("size", [0, 10, SEALED_CHUNK, 2 * SEALED_CHUNK, 2 * SEALED_CHUNK + 50])
def test_cut_payload_is_refused_before_any_read(size: int) -> None:
    with pytest.raises(DecryptFailed):
        Store(stream.seal(KEY, bytes(3 * CHUNK))[:size]).reader()


def forged(chunk: int) -> Callable[[bytes], bytes]:
    at = chunk * SEALED_CHUNK
    return lambda sealed: sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]


def test_a_forged_chunk_spoils_the_ranges_that_touch_it() -> None:
    reader = Store(forged(2)(stream.seal(KEY, bytes(5 * CHUNK)))).reader()

    assert reader.read_at(0, 2 * CHUNK) == bytes(2 * CHUNK)
    assert len(b"".join(reader.sealed_slabs(0, 2 * SEALED_CHUNK))) == 2 * SEALED_CHUNK
    for read in (reader.slabs(0, 2 * CHUNK + 1), reader.sealed_slabs(0, 2 * SEALED_CHUNK + 1)):
        with pytest.raises(DecryptFailed):
            next(read)


@pytest.mark.parametrize("kept", [SEALED_CHUNK + 5, 2 * SEALED_CHUNK], ids=["a part", "whole chunks"])
def test_a_source_that_gives_less_is_refused(kept: int) -> None:
    store = Store(stream.seal(KEY, bytes(5 * CHUNK)))
    reader = store.reader()
    store.sealed = store.sealed[:kept]

    with pytest.raises(DecryptFailed):
        reader.read_at(0, 3 * CHUNK)


def test_no_range_starts_before_the_file() -> None:
    with pytest.raises(ValueError, match="starts at 0"):
        Store(stream.seal(KEY, b"abc")).reader().read_at(-1, 2)
