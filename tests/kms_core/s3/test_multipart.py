"""Objects put together from parts and read by ranges: any order of writes, memory that does not grow."""

import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest

from kms_core.age import stream
from kms_core.payload import parallel
from kms_core.payload.parallel import ParallelOptions
from kms_core.s3 import multipart
from kms_core.s3.bucket import MOST_PARTS, ObjectHead, ObjectReader, UploadedPart
from kms_core.s3.multipart import COPY_BYTES, PART_BYTES, Assembly, digest
from kms_protocol.errors import InvalidRequest, JobCancelled, PathRefused

MiB = 1024 * 1024
KEY = bytes(32)


@dataclass
class MemoryBucket:
    """A bucket in memory, with one object and one upload."""

    data: bytes = b""
    sent: dict[int, bytes] = field(default_factory=dict)
    copied: list[ObjectReader] = field(default_factory=list)
    copies: int = 1_000_000
    line: object = None
    name: str = "shelf"

    def begin(self, key: str, mark: str) -> str:
        del key, mark
        return "upload"

    def put_part(self, key: str, upload: str, number: int, body: memoryview) -> UploadedPart:
        del key, upload
        self.sent[number] = bytes(body)
        return UploadedPart(number, f"e{number}", len(body))

    def copy_part(self, key: str, upload: str, number: int, source: ObjectReader) -> UploadedPart | None:
        del key, upload
        if len(self.copied) == self.copies:
            return None
        self.copied.append(source)
        return UploadedPart(number, f"c{number}", source.size)

    def parts(self, key: str, upload: str) -> list[UploadedPart]:
        del key, upload
        sent = [UploadedPart(number, f"e{number}", len(data)) for number, data in self.sent.items()]
        copied = [UploadedPart(number, "c", each.size) for number, each in enumerate(self.copied, start=2)]
        return sent + copied

    def read_into(self, key: str, etag: str, start: int, views: Sequence[memoryview]) -> None:
        del key, etag
        for view in views:
            view[:] = self.data[start : start + len(view)]
            start += len(view)

    def head(self, key: str) -> ObjectHead | None:
        return ObjectHead(len(self.data), key, "")


def assembly(shelf: MemoryBucket, size: int) -> Assembly:
    made = Assembly(shelf, "key", "job", lambda: shelf.begin("key", "job"))  # type: ignore[arg-type]  # a double
    made.reserve(size)
    return made


def reader(shelf: MemoryBucket, size: int | None = None, etag: str = "key") -> ObjectReader:
    return ObjectReader(shelf, "key", etag, len(shelf.data) if size is None else size)  # type: ignore[arg-type]  # a double


@pytest.mark.parametrize("size", [PART_BYTES + 1, 3 * PART_BYTES, 2 * PART_BYTES + 12_345])
def test_parts_are_of_one_size_whatever_the_order(size: int) -> None:
    shelf, data = MemoryBucket(), os.urandom(size)
    made = assembly(shelf, size)
    starts = list(range(0, size, 700_001))
    random.shuffle(starts)
    for start in starts:
        made.write_at(memoryview(data)[start : start + 700_001], start)
    made.settle()

    assert b"".join(shelf.sent[number] for number in sorted(shelf.sent)) == data
    assert {len(part) for number, part in shelf.sent.items() if number < len(shelf.sent)} == {PART_BYTES}
    assert [part.number for part in made.parts] == list(range(1, len(shelf.sent) + 1))


@pytest.mark.parametrize("size", [0, 1, PART_BYTES])
def test_what_fits_one_part_is_not_sent(size: int) -> None:
    shelf, data = MemoryBucket(), os.urandom(size)
    made = assembly(shelf, size)
    made.write_at(memoryview(data), 0)
    made.settle()

    assert (made.upload, shelf.sent, bytes(made.whole)) == ("", {}, data)


@pytest.mark.parametrize("size", [10, 3 * PART_BYTES])
def test_what_is_not_whole_does_not_settle(size: int) -> None:
    made = assembly(MemoryBucket(), size)
    made.write_at(memoryview(bytes(size - 1)), 0)

    with pytest.raises(InvalidRequest):
        made.settle()


def test_the_size_is_told_once() -> None:
    made = assembly(MemoryBucket(), 10)
    made.reserve(10)

    with pytest.raises(ValueError, match="another size before"):
        made.reserve(11)


@pytest.mark.parametrize("size", [PART_BYTES * MOST_PARTS, PART_BYTES * MOST_PARTS + 1, 5 * 1024**4])
def test_the_largest_object_has_no_more_parts_than_s3_knows(size: int) -> None:
    made = assembly(MemoryBucket(), size)

    assert -(-size // made.part_bytes) <= MOST_PARTS
    assert made.part_bytes - size / MOST_PARTS < PART_BYTES


def test_memory_holds_two_parts_a_thread_at_most() -> None:
    shelf = MemoryBucket(bytes(48 * MiB))
    made = assembly(shelf, stream.sealed_size(48 * MiB))
    seen: list[int] = []
    options = ParallelOptions(4, 7, progress=lambda _: seen.append(len(made._filling)))  # noqa: SLF001 -- the very question
    parallel.seal_file(KEY, reader(shelf), made, options=options)

    assert 0 < max(seen) <= 2 * 4
    assert stream.open_(KEY, b"".join(shelf.sent[number] for number in sorted(shelf.sent))) == shelf.data


def test_the_store_copies_behind_the_first_part() -> None:
    shelf = MemoryBucket()
    size = PART_BYTES + 2 * COPY_BYTES + 5
    made = assembly(shelf, size)
    made.write_at(memoryview(bytes(PART_BYTES)), 0)
    told: list[int] = []
    assert made.copy(reader(shelf, size - PART_BYTES), lambda: None, told.append)
    made.settle()

    assert sorted(source.offset for source in shelf.copied) == [0, COPY_BYTES, 2 * COPY_BYTES]
    assert sorted(told) == [5, COPY_BYTES, COPY_BYTES]


@pytest.mark.parametrize(("copies", "outcome"), [(0, None), (1, PathRefused)], ids=["none", "one"])
def test_a_store_that_cannot_copy_is_told_from_one_that_stops(
    copies: int, outcome: type[Exception] | None
) -> None:
    shelf = MemoryBucket(copies=copies)
    made = assembly(shelf, PART_BYTES + 3 * COPY_BYTES)

    with nullcontext() if outcome is None else pytest.raises(outcome):
        assert not made.copy(reader(shelf, 3 * COPY_BYTES), lambda: None, lambda _: None)


def test_a_copy_stops_when_it_is_told_to() -> None:
    shelf = MemoryBucket()
    made = assembly(shelf, PART_BYTES + 30 * COPY_BYTES)
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        made.copy(reader(shelf, 30 * COPY_BYTES), check, lambda _: None)
    assert len(shelf.copied) <= 3 + multipart._COPIES  # noqa: SLF001 -- those under way


def test_only_an_object_on_the_same_line_is_copied_by_the_store() -> None:
    line = object()
    here, there = MemoryBucket(line=line), MemoryBucket(line=object())

    assert assembly(here, 2 * PART_BYTES).can_copy(reader(MemoryBucket(line=line)))
    assert not assembly(here, 2 * PART_BYTES).can_copy(reader(there))
    assert not assembly(here, PART_BYTES).can_copy(reader(here))


def test_a_reader_stays_within_its_run() -> None:
    run = reader(MemoryBucket(bytes(range(100)))).tail(10).head(20)
    view = memoryview(bytearray(5))

    assert run.read_at(15, 100) == bytes(range(25, 30))
    assert run.read_into([view], 15)
    assert not run.read_into([view], 16)
    assert bytes(view) == bytes(range(25, 30))


def test_an_object_that_is_another_is_noticed() -> None:
    reader(MemoryBucket(b"x")).check()

    with pytest.raises(InvalidRequest):
        reader(MemoryBucket(b"x"), etag="another").check()


def test_a_digest_is_of_numbers_sizes_and_tags() -> None:
    part = UploadedPart(1, "a", 5)
    others = (UploadedPart(2, "a", 5), UploadedPart(1, "b", 5), UploadedPart(1, "a", 6))

    assert digest([part]) == digest([part])
    assert len({digest([each]) for each in (part, *others)}) == 4
