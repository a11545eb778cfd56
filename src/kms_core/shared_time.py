"""Times that processes share over a fork."""

import math
import mmap
import struct
import time
from typing import Final

_CLOCK: Final = struct.Struct("d")


class SharedTime:
    """A time of ``time.monotonic`` in memory that a parent shares with the processes that it forks."""

    def __init__(self, at: float = -math.inf) -> None:
        self._memory = mmap.mmap(-1, _CLOCK.size)
        self.set(at)

    def set(self, at: float) -> None:
        _CLOCK.pack_into(self._memory, 0, at)

    def note(self) -> None:
        """Set it to now."""
        self.set(time.monotonic())

    @property
    def at(self) -> float:
        (at,) = _CLOCK.unpack_from(self._memory)
        return float(at)
