"""What calls have counted and the metrics do not show yet: moving a dozen metrics is a tenth of a small call.

A call adds to piles, and whoever collects the metrics of this process finds the piles put onto them. Where
several processes are scraped together another one may be asked, and this one may be killed: there a call
settles by itself, unless one did a moment ago, and what is left then is settled within seconds.
"""

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Metric
from prometheus_client.registry import Collector

MOMENT_S: Final = 0.005
"""How often calls settle at most: a busy process is some per mille slower by it."""

_lock: Final = threading.Lock()
_settled_at = 0.0
_piles: Final[list["CallStats | BufferedMetrics"]] = []


class CallStats:
    """Calls of one kind: how many, how long each took in seconds, and sums of something else besides."""

    __slots__ = ("_bounds", "_buckets", "_count", "_counted", "_duration", "_seconds", "_sizes", "_sums")

    def __init__(self, counted: Counter, duration: Histogram | None = None, *sizes: Counter) -> None:
        self._counted, self._duration, self._sizes = counted, duration, sizes
        self._bounds: list[float] = list(duration._upper_bounds) if duration else []  # noqa: SLF001 -- no other way
        self._clear()
        _piles.append(self)

    def add(self, seconds: float = 0.0, *sizes: int) -> None:
        """One call; ``sizes`` in the order of their counters."""
        with _lock:
            self._count += 1
            if self._bounds:
                self._seconds += seconds
                self._buckets[bisect_left(self._bounds, seconds)] += 1
            for at, size in enumerate(sizes):
                self._sums[at] += size

    def add_now(self, seconds: float = 0.0, *sizes: int) -> None:
        """The same, and onto the metrics."""
        self.add(seconds, *sizes)
        with _lock:
            self.settle()

    def _clear(self) -> None:
        self._count, self._seconds = 0, 0.0
        self._buckets = [0] * len(self._bounds)
        self._sums = [0] * len(self._sizes)

    def settle(self) -> None:
        """Under the lock."""
        if not self._count:
            return
        self._counted.inc(self._count)
        for counter, size in zip(self._sizes, self._sums, strict=True):
            counter.inc(size)
        if self._duration:
            self._duration._sum.inc(self._seconds)  # noqa: SLF001 -- ``observe`` takes one at a time
            for bucket, count in zip(self._duration._buckets, self._buckets, strict=True):  # noqa: SLF001 -- as above
                if count:
                    bucket.inc(count)
        self._clear()


class BufferedMetrics:
    """Something that rises and falls with calls, of one event loop: no two threads move it."""

    __slots__ = ("_gauge", "_shown", "level")

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self.level = self._shown = 0
        _piles.append(self)

    def settle(self) -> None:
        """Under the lock."""
        level = self.level
        if level != self._shown:
            self._gauge.set(level)
            self._shown = level


def settle() -> None:
    """Put everything counted so far onto the metrics."""
    with _lock:
        for pile in _piles:
            pile.settle()


def settle_now_and_then() -> None:
    """The same, if that was not done within ``MOMENT_S``."""
    global _settled_at  # noqa: PLW0603 -- of the process, as metrics are
    now = time.monotonic()
    if now - _settled_at > MOMENT_S:
        settle()
        _settled_at = now


class _First(Collector):
    """Has no metrics of its own: it is asked before those that have."""

    def collect(self) -> Iterable[Metric]:
        settle()
        return ()


def _forget() -> None:
    """A forked child has counted nothing yet."""
    for pile in _piles:
        if isinstance(pile, CallStats):
            pile._clear()  # noqa: SLF001 -- of this module
    _lock.release()


REGISTRY.register(_First())
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget)
