"""Objects written front to back, of any size, in memory that a pool bounds.

A write sends its first part only once it has more, so an object below one part is one request. Sizes are in
bytes. Raises what ``Bucket`` raises.
"""

import mmap
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from time import monotonic
from typing import Final, cast

from kms_core.s3.bucket import ALWAYS, Bucket, Completion, If, StoreRefused, UploadedPart
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
