"""Counts of calls that are not in the metrics yet: moving a dozen metrics takes a tenth of a small call.

Calls add to buffers, and the buffers are settled (added to the metrics) before the metrics of this process
are exposed. Where processes are scraped together, another process may answer the scrape, and this one may be
killed: there a call settles the buffers itself, every 5 ms at most, and the rest is settled within seconds.
"""

import os
import threading
import time
from bisect import bisect_left
from typing import Final

from prometheus_client import Counter, Gauge, Histogram, values

SETTLE_EVERY_S: Final = 0.005
"""At this rate settling costs a busy process some per mille of its time."""

_lock: Final = threading.Lock()
_settled_at = 0.0
_buffers: Final[list["CallStats | BufferedGauge"]] = []


class CallStats:
    """Calls of one kind: their number, the duration of each in seconds, and sums of sizes."""

    __slots__ = ("_bounds", "_buckets", "_calls", "_count", "_duration", "_seconds", "_sizes", "_sums")

    def __init__(self, calls: Counter, duration: Histogram | None = None, *sizes: Counter) -> None:
        self._calls, self._duration, self._sizes = calls, duration, sizes
        self._bounds: list[float] = list(duration._upper_bounds) if duration else []  # noqa: SLF001 -- no other way
        self.clear()
        _buffers.append(self)

    def add(self, seconds: float = 0.0, *sizes: int) -> None:
        """Count one call; ``sizes`` in the order of their counters."""
        with _lock:
            self._count += 1
            if self._bounds:
                self._seconds += seconds
                self._buckets[bisect_left(self._bounds, seconds)] += 1
            for at, size in enumerate(sizes):
                self._sums[at] += size

    def add_now(self, seconds: float = 0.0, *sizes: int) -> None:
        """Count one call, and settle."""
        self.add(seconds, *sizes)
        with _lock:
            self.settle()

    def clear(self) -> None:
        """Drop the calls that are not settled. The caller holds the lock."""
        self._count, self._seconds = 0, 0.0
        self._buckets = [0] * len(self._bounds)
        self._sums = [0] * len(self._sizes)

    def settle(self) -> None:
        """Add the calls to the metrics. The caller holds the lock."""
        if not self._count:
            return
        self._calls.inc(self._count)
        for counter, size in zip(self._sizes, self._sums, strict=True):
            counter.inc(size)
        if self._duration:
            self._duration._sum.inc(self._seconds)  # noqa: SLF001 -- ``observe`` takes one at a time
            for bucket, count in zip(self._duration._buckets, self._buckets, strict=True):  # noqa: SLF001 -- as above
                if count:
                    bucket.inc(count)
        self.clear()


class BufferedGauge:
    """A gauge that rises and falls with calls. Only one thread, the event loop's, changes ``level``."""

    __slots__ = ("_gauge", "_settled", "level")

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self.level = self._settled = 0
        _buffers.append(self)

    def settle(self) -> None:
        """Set the gauge. The caller holds the lock."""
        level = self.level
        if level != self._settled:
            self._gauge.set(level)
            self._settled = level

    def clear(self) -> None:
        """Nothing: a level is no count, and holds in a forked process, too."""


def settle() -> None:
    """Add everything counted so far to the metrics."""
    with _lock:
        for buffer in _buffers:
            buffer.settle()


def settle_if_shared() -> None:
    """As ``settle``, where metrics are shared with other processes, and at most every 5 ms."""
    global _settled_at  # noqa: PLW0603 -- of the process, as metrics are
    now = time.monotonic()
    if values.ValueClass._multiprocess and now - _settled_at > SETTLE_EVERY_S:  # noqa: SLF001 -- no public name
        settle()
        _settled_at = now


def protect_forks() -> None:
    """Make forked processes begin with empty buffers, and forks wait until no thread holds the lock."""
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_clear)


def _clear() -> None:
    for buffer in _buffers:
        buffer.clear()
    _lock.release()
