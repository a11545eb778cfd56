"""Objects of any size, written or read front to back, in memory that a pool bounds.

A write sends its first part only once it has more, so an object below one part is one request. Sizes are in
bytes. Raises what ``Bucket`` raises.
"""

import copy
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Final, cast

from kms_core.s3.bucket import ALWAYS, Bucket, Completion, If, ObjectReader, StoreRefused, UploadedPart
from kms_core.s3.connection import TRIES, S3Body, StoreAway
from kms_core.s3.multipart import PART_BYTES
from kms_protocol.errors import KmsError, Unavailable

GROW_EVERY: Final = 1000
"""Parts until they get twice as large: 8 GiB of 8 MiB each, 8 TiB in 10,000."""

_MARGIN_BYTES: Final = 1024 * 1024
_SENDERS: Final = 2  # parts of one object at once, besides the one that is filled
_USUAL_PARTS: Final = 64  # of an object whose size is known, while the pool has room for 16 such parts
_SHARES: Final = 16
_WAIT_S: Final = 30.0
_CLOCK_S: Final = 2.0  # times of a store are whole seconds
_CANNOT: Final = 501
_MIB: Final = 1024 * 1024
STREAM_BYTES: Final = 64 * 1024 * 1024
"""The most that one request reads in order."""


class BufferPool:
    """Bounds the bytes of the buffers in this process. Safe for threads and across forks.

    While some are in use it keeps those that were given back, within its bound: the first touch of a new page
    can cost more than the work on it.
    """

    def __init__(self, limit_bytes: int, wait_s: float = _WAIT_S) -> None:
        self.limit, self._wait_s = limit_bytes, wait_s
        self._begin()

    def _begin(self) -> None:
        self._pid, self._used, self._freed = os.getpid(), 0, threading.Condition()
        self._kept: list[mmap.mmap] = []

    def _own(self) -> threading.Condition:
        if self._pid != os.getpid():  # the buffers are the parent's, and so are the threads with the lock
            self._begin()
        return self._freed

    @property
    def used(self) -> int:
        return self._used if self._pid == os.getpid() else 0

    def take(self, size: int) -> memoryview:
        """Wait until there is room; one buffer has room in any case. Raises Unavailable after some time."""
        with self._own():
            if not self._freed.wait_for(lambda: self._has_room(size), self._wait_s):
                raise Unavailable("Other uploads and results use all of [kms.jobs.spool_bucket] buffer_bytes")
            return self._new(size)

    def take_now(self, size: int) -> memoryview | None:
        """Take room in the first half, without waiting: those who wait have the other."""
        with self._own():
            return self._new(size) if self._used + size <= self.limit // 2 else None

    def give(self, buffer: memoryview) -> None:
        """Give a buffer back, which is released. The caller has no other view of it."""
        with self._own():
            self._used = max(0, self._used - len(buffer))
            self._kept.append(cast("mmap.mmap", buffer.obj))
            buffer.release()
            self._bound()
            self._freed.notify_all()

    def _has_room(self, size: int) -> bool:
        return not self._used or self._used + size <= self.limit

    def _new(self, size: int) -> memoryview:
        self._used += size
        found = next((number for number, kept in enumerate(self._kept) if len(kept) == size), None)
        kept = None if found is None else self._kept.pop(found)
        self._bound()
        return memoryview(kept or mmap.mmap(-1, size, mmap.MAP_PRIVATE))

    def _bound(self) -> None:
        """Unmap buffers that were given back: those above the bound, and all once none is in use."""
        while self._kept and (not self._used or self._used + sum(map(len, self._kept)) > self.limit):
            with suppress(BufferError):  # after an error its traceback may have a view
                self._kept.pop(0).close()


class StreamedObject:
    """One object that is written front to back and appears whole.

    ``mark`` is of this write only: by it a write whose answer was lost is recognised. An object that another
    write of the same name left before is replaced; one that appears while this write lasts is not.
    """

    def __init__(
        self, bucket: Bucket, key: str, mark: str, pool: BufferPool, declared_bytes: int = 0
    ) -> None:
        self._bucket, self._key, self._mark, self._pool = bucket, key, mark, pool
        self._begun = monotonic()
        self._usual_bytes = self._usual(declared_bytes)
        self._least = min(self._usual_bytes, declared_bytes + _MARGIN_BYTES) if declared_bytes else PART_BYTES
        self._buffer = memoryview(b"")
        self._filled = 0
        self._upload = ""
        self._count = 0
        self._parts: list[UploadedPart] = []
        self._sending: deque[Future[UploadedPart]] = deque()
        self._senders: ThreadPoolExecutor | None = None
        self._is_tried = False

    def _usual(self, declared_bytes: int) -> int:
        """The size of parts: larger ones of a large object, while other objects leave most of the pool."""
        wanted = -(-declared_bytes // (_USUAL_PARTS * _MIB)) * _MIB
        share = self._pool.limit // _SHARES if self._pool.used <= self._pool.limit // 4 else 0
        return max(PART_BYTES, min(wanted, share))

    @property
    def _part_bytes(self) -> int:
        return self._usual_bytes << (self._count // GROW_EVERY)

    def write(self, data: memoryview) -> None:
        """Take what follows."""
        while data:
            if self._filled == self._part_bytes:
                self._send()
            run = data[: self._part_bytes - self._filled]
            self._reserve(self._filled + len(run))
            self._buffer[self._filled : self._filled + len(run)] = run
            self._filled += len(run)
            data = data[len(run) :]

    def _reserve(self, size: int) -> None:
        """Have room for a part of ``size`` bytes; no room is kept while this waits for more."""
        if size <= len(self._buffer):
            return
        held = bytes(self._buffer[: self._filled])
        self._give()
        self._buffer = self._pool.take(self._least if size <= self._least else self._part_bytes)
        self._buffer[: len(held)] = held

    def _give(self) -> None:
        buffer, self._buffer = self._buffer, memoryview(b"")
        if buffer:
            self._pool.give(buffer)

    def _send(self) -> None:
        """Send the part: aside, if the pool has room for the next one, or else now."""
        if not self._upload:
            self._upload = self._bucket.begin(self._key, self._mark)
        self._count += 1
        while len(self._sending) >= _SENDERS or (self._sending and self._sending[0].done()):
            self._parts.append(self._sending.popleft().result())
        size, self._filled = self._filled, 0
        following = self._pool.take_now(self._part_bytes)
        if following is None:
            self._parts.append(self._put_part(self._count, self._buffer[:size]))
            return
        part, self._buffer = self._buffer, following
        self._senders = self._senders or ThreadPoolExecutor(_SENDERS, thread_name_prefix="part")
        self._sending.append(self._senders.submit(self._put_aside, self._count, part, size))

    def _put_aside(self, number: int, part: memoryview, size: int) -> UploadedPart:
        try:
            return self._put_part(number, part[:size])
        finally:
            self._pool.give(part)

    def _put_part(self, number: int, body: memoryview) -> UploadedPart:
        return self._bucket.put_part(self._key, self._upload, number, body)

    def finish(self) -> None:
        """Put the object in place. Raises Unavailable if another write does so at the same time."""
        if self._upload:
            self._parts.append(self._put_part(self._count + 1, self._buffer[: self._filled]))
            self._parts += [sent.result() for sent in self._sending]
            self._parts.sort()
        self._is_tried = True
        if self._is_placed(If(absent=True)):
            return
        found = self._bucket.head(self._key)
        if found and found.mark == self._mark:
            return
        if (
            found
            and found.age_s > monotonic() - self._begun + _CLOCK_S
            and self._is_placed(If(etag=found.etag))
        ):
            return
        raise Unavailable("Another process writes the same object: try again later")

    def _is_placed(self, condition: If) -> bool:
        try:
            return self._place(condition)
        except StoreRefused as exc:
            if exc.status != _CANNOT or condition == ALWAYS:
                raise
            return self._place(ALWAYS)  # a store without conditions; names are written once

    def _place(self, condition: If) -> bool:
        if self._upload:
            done = self._bucket.complete(self._key, self._upload, self._parts, condition)
            return done is Completion.DONE
        return self._bucket.put(self._key, self._buffer[: self._filled], condition, self._mark)

    def discard(self) -> None:
        """Leave nothing of it behind. Parts that cannot be removed now are left to the sweep."""
        self._stop()
        with suppress(KmsError):
            if self._upload:
                self._bucket.abort(self._key, self._upload)
        with suppress(KmsError):
            if self._is_tried and (found := self._bucket.head(self._key)) and found.mark == self._mark:
                self._bucket.delete(self._key)

    def close(self) -> None:
        """Give its buffers back."""
        self._stop()
        self._give()

    def _stop(self) -> None:
        """Wait for the parts that are being sent: one that came after an abort would stay."""
        if self._senders:
            self._senders.shutdown()


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
