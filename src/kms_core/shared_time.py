"""Times that processes share over a fork."""

import math
import mmap
import time


class SharedTime:
    """A time of ``time.monotonic`` in memory that a parent shares with the processes that it forks."""

    def __init__(self, at: float = -math.inf) -> None:
        self._memory = memoryview(mmap.mmap(-1, 8)).cast("d")
        self.set(at)

    def set(self, at: float) -> None:
        self._memory[0] = at

    def note(self) -> None:
        """Set it to now."""
        self.set(time.monotonic())

    @property
    def at(self) -> float:
        return self._memory[0]
