"""The pace that the sender of an upload and the reader of a download must keep."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from kms_core.settings.model import ServerSection


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """``bytes_per_s`` on average once ``grace_s`` seconds are over, and a byte every ``stall_s`` seconds."""

    grace_s: float
    bytes_per_s: int
    stall_s: float

    @classmethod
    def of(cls, server: ServerSection) -> Self:
        """Those of the settings."""
        return cls(server.transfer_grace_s, server.transfer_bytes_per_s, server.transfer_stall_s)

    @property
    def look_s(self) -> float:
        """Seconds between two looks at a transfer, short enough for each of the limits."""
        return min(1.0, self.grace_s / 4, self.stall_s / 4)


class TransferRate:
    """One transfer, measured while the service waits for its peer; its own work costs the peer nothing."""

    __slots__ = ("_clock", "_limits", "_moved", "_quiet_s", "_waited_s", "_waiting_since")

    def __init__(self, limits: TransferLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._moved = 0
        self._quiet_s = self._waited_s = 0.0
        self._waiting_since = clock()

    def wait(self) -> None:
        """Begin to count time: from now on the peer is waited for."""
        self._waiting_since = self._clock()

    def left_s(self, moved: int) -> float:
        """Seconds until the peer is too slow if nothing moves; 0 or less once it is.

        ``moved`` is the number of bytes since the beginning. Time counts since ``wait``, or the last call.
        """
        limits, now = self._limits, self._clock()
        spent_s, self._waiting_since = now - self._waiting_since, now
        self._waited_s += spent_s
        self._quiet_s = 0.0 if moved > self._moved else self._quiet_s + spent_s
        self._moved = moved
        due_s = max(limits.grace_s, moved / limits.bytes_per_s)
        return min(limits.stall_s - self._quiet_s, due_s - self._waited_s)


class ReaderWatch:
    """Ends the connection of an answer whose reader is slower than ``limits`` allow, while it is entered.

    Only time in which bytes wait for the reader counts. ``too_slow`` is called before the connection ends.
    """

    def __init__(
        self, cycle: RequestResponseCycle, limits: TransferLimits, too_slow: Callable[[], None]
    ) -> None:
        self.written = 0
        """Bytes that were handed to the transport, which the writer counts, from those that wait."""
        self._transport = cycle.transport
        self._look_s = limits.look_s
        self._rate = TransferRate(limits)
        self._too_slow = too_slow
        self._next: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self.written = self._transport.get_write_buffer_size()
        self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        if self._next is not None:
            self._next.cancel()

    def _arm(self) -> None:
        self._next = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _look(self) -> None:
        waiting = self._transport.get_write_buffer_size()
        if not waiting:
            self._rate.wait()
        elif self._rate.left_s(self.written - waiting) <= 0:
            self._next = None
            self._too_slow()
            self._transport.abort()
            return
        self._arm()
