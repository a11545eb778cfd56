"""Objects read in order, by few requests and some threads, in memory that a pool bounds; sizes in bytes."""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kms_core.s3.connection import TRIES, S3Body, StoreAway
from kms_core.s3.multipart import ObjectReader
from kms_core.s3.streams import BufferPool
from kms_protocol.errors import KmsError

STREAM_BYTES: Final = 64 * 1024 * 1024
"""The most that one request reads in order."""

_GROWTH: Final = 4
_FIRST_SPAN_BYTES: Final = 256 * 1024
_GAP_BYTES: Final = 4 * 1024 * 1024  # kept for threads that are behind others
_LATE_BYTES: Final = 16 * 1024 * 1024  # such threads read by themselves
_SPANS: Final = 3
_ENDS: Final = 8


class ObjectStream:
    """An object that is read front to back from some position on.

    A request asks for four times as much as the one before, 64 MiB at most. One whose answer breaks off is
    followed by another. ``position`` is that of the next byte.
    """

    def __init__(self, source: ObjectReader, position: int, asked: int) -> None:
        """``asked`` is the size of the range that was read before."""
        self.position = position
        self._source, self._asked = source, asked
        self._body: S3Body | None = None
        self._left = 0

    def read_into(self, view: memoryview) -> None:
        """Fill a view, of which the object has all bytes. Raises as ``ObjectReader``."""
        tries = TRIES
        while view:
            if self._body is None:
                self._begin()
            wanted = min(len(view), self._left)
            got = self._body.fill(view[:wanted]) if self._body else 0
            view, self.position, self._left = view[got:], self.position + got, self._left - got
            tries = TRIES if got else tries - 1
            if got < wanted or not self._left:
                self.close()
            if not tries:
                raise StoreAway("The object store breaks off its answers", 0)

    def _begin(self) -> None:
        self._asked = min(_GROWTH * self._asked, STREAM_BYTES)
        self._left = min(self._asked, self._source.size - self.position)
        self._body = self._source.stream(self.position, self._left)

    def close(self) -> None:
        """End the request that is under way."""
        if self._body:
            self._body.close()
            self._body = None


@dataclass(slots=True)
class _Ahead:
    """The ranges of an object that were read last, those that are kept, and the stream that goes on."""

    sizes: dict[int, int] = field(default_factory=dict)
    """Of the last ranges, by their ends."""
    spans: list[tuple[int, memoryview]] = field(default_factory=list)
    """Kept ranges; the one that was used last is the last."""
    stream: ObjectStream | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class ReadAhead:
    """An object that is read in ranges, larger ones the longer it is read in order. Safe for threads.

    Small ranges are kept, three of 4 MiB at most, if the pool has room; large ones are streamed.
    ``refuse`` turns errors of the store into those of the caller.
    """

    def __init__(
        self, source: ObjectReader, pool: BufferPool, refuse: Callable[[KmsError], KmsError]
    ) -> None:
        self.size, self.offset = source.size, 0
        self._source, self._pool, self._refuse = source, pool, refuse
        self._ahead = _Ahead()

    def read_at(self, position: int, length: int) -> bytes:
        data = bytearray(max(0, min(length, self.size - position)))
        self.read_into([memoryview(data)], position)
        return bytes(data)

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        if position + sum(map(len, views)) > self.size:
            return False
        position += self.offset
        with self._ahead.lock:
            try:
                self._fill(views, position)
            except KmsError as exc:
                raise self._refuse(exc) from exc
        return True

    def stamp(self) -> str:
        return self._source.etag

    def tail(self, position: int) -> "ReadAhead":
        found = copy.copy(self)
        found.size, found.offset = self.size - position, self.offset + position
        return found

    def close(self) -> None:
        """Give its buffers back, and end what is being read."""
        with self._ahead.lock:
            while self._ahead.spans:
                self._pool.give(self._ahead.spans.pop()[1])
            self._end_stream()

    def _end_stream(self) -> None:
        if self._ahead.stream:
            self._ahead.stream.close()
            self._ahead.stream = None

    def _fill(self, views: Sequence[memoryview], position: int) -> None:
        for number, view in enumerate(views):
            rest = view
            while rest:
                got = self._copied(rest, position) or self._streamed(rest, position)
                if not got:
                    views = [rest, *views[number + 1 :]]
                    self._source.read_into(views, position)
                    self._note(position, sum(map(len, views)))
                    return
                rest, position = rest[got:], position + got

    def _copied(self, view: memoryview, position: int) -> int:
        """Copy bytes that are kept; their number."""
        spans = self._ahead.spans
        for number, (start, data) in enumerate(spans):
            if start <= position < start + len(data):
                run = data[position - start :][: len(view)]
                view[: len(run)] = run
                spans.append(spans.pop(number))
                return len(run)
        return 0

    def _streamed(self, view: memoryview, position: int) -> int:
        """Read bytes that follow others; their number, 0 if the rest is to be read by itself.

        That is so if there is no room to keep it, and for a thread so late that others have replaced the kept
        bytes.
        """
        stream = self._ahead.stream
        if stream and 0 < stream.position - position < _LATE_BYTES:
            return 0
        if stream is None or not 0 <= position - stream.position < _GAP_BYTES:
            if not (before := self._ahead.sizes.pop(position, 0)):
                return self._single(view, position)
            self._end_stream()
            self._ahead.stream = stream = ObjectStream(self._source, position, before)
        gap = position - stream.position
        if gap and not self._keep(stream.position, gap, stream.read_into):
            return 0
        stream.read_into(view)
        return len(view)

    def _single(self, view: memoryview, position: int) -> int:
        """Read a range that follows no other."""
        size = min(max(_FIRST_SPAN_BYTES, len(view)), self._source.size - position)
        is_kept = self._keep(position, size, lambda buffer: self._source.read_into([buffer], position))
        if is_kept:
            self._note(position, size)
        return self._copied(view, position)

    def _note(self, position: int, size: int) -> None:
        """Remember a range: what follows it is streamed."""
        self._ahead.sizes[position + size] = size
        if len(self._ahead.sizes) > _ENDS:
            del self._ahead.sizes[next(iter(self._ahead.sizes))]

    def _keep(self, start: int, size: int, read: Callable[[memoryview], object]) -> bool:
        """Read a range to be kept; False without room for it."""
        buffer = self._pool.take_now(size)
        if buffer is None:
            return False
        try:
            read(buffer)
        except BaseException:
            self._pool.give(buffer)
            raise
        self._ahead.spans.append((start, buffer))
        if len(self._ahead.spans) > _SPANS:
            self._pool.give(self._ahead.spans.pop(0)[1])
        return True
