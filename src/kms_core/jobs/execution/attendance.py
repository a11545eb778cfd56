"""State that a process that runs jobs shares with its parent: when to stop, what waits, and that it hangs.

The parent makes both before it forks. Without them (in the API, in tests) nothing stops a process.
"""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import msgspec

from kms_core.shared_time import SharedTime

PATIENCE_S: Final = 120.0
"""Without a claim while messages wait, after which a worker is started again."""
SLOW_S: Final = 3.0
"""Without progress in a job, after which a process counts as slow: others may have to take its place."""
_MOST_BYTES: Final = 4096  # PIPE_BUF: so much is written to a pipe in one piece
_MOST_RESOURCES: Final = 8


class Stall(msgspec.Struct, frozen=True):
    """A process that hangs in a job, and the resources that the job uses; ``is_slow``: it may go on yet."""

    pid: int
    job_id: str
    resources: list[str]
    is_slow: bool = False


class Attendance:
    """Memory and a pipe that a parent shares with the processes that it forks.

    ``stops_at`` is when attempts that still run are handed back; infinite if it was not set. ``wanted_at`` is
    when the last message came that is no wake-up. ``misplaced_at`` is finite while the spool is that of
    another install, and until that was first looked at.
    """

    def __init__(self) -> None:
        self.stops_at, self.wanted_at, self.misplaced_at = SharedTime(math.inf), SharedTime(), SharedTime(0.0)
        self._reads, self._writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def announce(self, stall: Stall) -> None:
        """Report to the parent that this process hangs; the report is lost if its pipe is full."""
        short = msgspec.structs.replace(stall, resources=stall.resources[:_MOST_RESOURCES])
        line = msgspec.json.encode(short) + b"\n"
        with suppress(BlockingIOError):
            os.write(self._writes, line[-_MOST_BYTES:])

    def stalls(self) -> Iterator[Stall]:
        """Announcements since the last call."""
        try:
            lines = os.read(self._reads, 16 * _MOST_BYTES).splitlines()
        except BlockingIOError:
            return
        for line in lines:
            try:
                yield msgspec.json.decode(line, type=Stall)
            except msgspec.DecodeError:
                continue


_shared: list[Attendance] = []


def share(found: Attendance) -> None:
    """Use it in this process, and in those that it forks."""
    _shared[:] = [found]


def stops_at() -> float:
    """Return ``Attendance.stops_at``; infinite where nothing is shared."""
    return _shared[0].stops_at.at if _shared else math.inf


def is_wanted(since: float) -> bool:
    """True if a message other than a wake-up came after ``since``: it may wait for this process."""
    return bool(_shared) and _shared[0].wanted_at.at >= since


def want() -> None:
    """Record, in the parent, that a message other than a wake-up came."""
    if _shared:
        _shared[0].wanted_at.note()


def set_misplaced(is_so: bool) -> None:
    """Report to the other processes whether the spool is that of another install: none looks itself."""
    _shared[0].misplaced_at.set(0.0 if is_so else -math.inf)


def is_misplaced() -> bool:
    """Return whether it may be: then this process compares by itself before it takes jobs."""
    return not _shared or not math.isinf(_shared[0].misplaced_at.at)


def report_slow(job_id: str, idle_s: float) -> None:
    """Report to the parent that this process has made no progress for so long, if that is ``SLOW_S``."""
    if _shared and idle_s > SLOW_S:
        _shared[0].announce(Stall(os.getpid(), job_id, [], is_slow=True))


def is_stopping() -> bool:
    """Return whether the worker is to stop: no further job is begun."""
    return not math.isinf(stops_at())


def leave(stall: Stall | None) -> None:
    """End this process now, from any thread; a stall is reported to the parent first.

    A thread that waits for a disk in the kernel (state D) keeps the process until the disk answers.
    """
    if not _shared:
        return
    if stall is not None:
        _shared[0].announce(stall)
    os.kill(os.getpid(), signal.SIGKILL)
