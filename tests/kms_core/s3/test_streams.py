"""Objects written front to back: what writers at once have in memory, counted where it is made."""

import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, Self, cast

import pytest

from kms_core.s3 import streams
from kms_core.s3.bucket import Bucket, Completion, If, UploadedPart
from kms_core.s3.streams import BufferPool, StreamedObject
from support.waiting import until

KIB: Final = 1024
MIB: Final = 1024 * 1024
PART: Final = 64 * KIB
SIZE: Final = 10 * PART + 1000
UPLOADS: Final = 16


@dataclass
class Held:
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
    pool, bucket = BufferPool(limit, wait_s=60.0), Held()
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
    bucket = Held()
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
    pool, bucket = BufferPool(limit), Held()
    bucket.may_go.set()
    taken = pool.take(used) if used else None
    with closing(StreamedObject(cast("Bucket", bucket), "key", "mark", pool, declared)) as out:
        out.write(memoryview(bytes(2 * part + 1)))
        out.finish()

    assert bucket.sizes == [part, part, 1]
    if taken:
        pool.give(taken)


def test_object_larger_than_was_said_is_whole(memory: Memory) -> None:
    bucket, data = Held(), os.urandom(9 * MIB)
    bucket.may_go.set()

    bucket.write(BufferPool(16 * MIB), "key", data, declared_bytes=1000)

    assert bucket.objects == {"key": data}
    assert memory.live == 0
