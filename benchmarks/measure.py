"""Runs contenders in turn on a machine that others use too, and keeps undisturbed runs; knows none of them.

A contender is a function that does its work once and returns what it measured. Before a run that writes
much the disk is left to finish what others gave it, and memory of the output's size is touched and given
back: on virtual machines that return free pages to their host, the first touch of a fresh page costs more
than the cipher, and would be charged to the first one that writes. A run counts if other programs used
little of the processors during it; others are dropped and repeated.
"""

import mmap
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final

Reading = Mapping[str, float]
"""What one run measured, by name: ``seconds``, ``cpu_s``, ``peak_bytes``, ``rate`` …"""

FAILURES: Final = (OSError, subprocess.SubprocessError, RuntimeError, ValueError)
FOREIGN: Final = 0.12
_LEAST_TOUCH: Final = 1024 * 1024
_TICKS_S: Final = 0.03  # /proc counts in ticks of 10 ms, on two processors and for each process
_PAUSE_S: Final = 0.4
_SETTLE_S: Final = 20.0
_SETTLED_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do the job. If it writes ``output_bytes``, disk and memory are made ready for each run.

    It takes part in so many ``rounds`` at most: what no goal asks for leaves its time to others.
    """

    name: str
    run: Callable[[], Reading]
    output_bytes: int = 0
    rounds: int = sys.maxsize


@dataclass(frozen=True, slots=True)
class Plan:
    """How many runs count, what foreign load (in processors) spoils one, and how often one is tried.

    ``warms``: whether a run that does not count goes before.
    """

    runs: int = 5
    foreign: float = FOREIGN
    tries: int = 4
    warms: bool = True


@dataclass(slots=True)
class Series:
    """The clean runs of one contender, how many others were dropped, and why it failed if it did."""

    name: str
    readings: list[Reading] = field(default_factory=list)
    dropped: int = 0
    failure: str = ""

    def values(self, key: str) -> list[float]:
        return [reading[key] for reading in self.readings if key in reading]

    def median(self, key: str) -> float | None:
        """None without a clean run."""
        values = self.values(key)
        return statistics.median(values) if values else None

    def medians(self) -> Reading:
        """Of everything that a clean run measured."""
        return {key: statistics.median(self.values(key)) for key in {*chain.from_iterable(self.readings)}}


class Budget:
    """Seconds for several groups of contenders; what one group leaves is shared by those after it."""

    def __init__(self, seconds: float, groups: int) -> None:
        self._ends = time.monotonic() + seconds
        self._groups = groups

    def share(self, groups: int = 1) -> float:
        """The seconds of the next group, or of several that are one."""
        share = groups * (self._ends - time.monotonic()) / max(groups, self._groups)
        self._groups -= groups
        return max(0.0, share)


class Load:
    """How many processors others have kept busy since this was made."""

    def __init__(self) -> None:
        self._at, self._busy, self._own = time.monotonic(), _busy_s(), _own_s()

    def foreign(self) -> float:
        wall = time.monotonic() - self._at
        foreign_s = (_busy_s() - self._busy) - (_own_s() - self._own)
        return max(0.0, foreign_s - _TICKS_S) / wall


def in_turn(contenders: Sequence[Contender], plan: Plan, seconds: float) -> list[Series]:
    """One uncounted run of each, then rounds in which each runs once, every round beginning with another.

    No round begins and no run is repeated after ``seconds``, but one round is always made. A contender that
    fails is left out, loudly.
    """
    ends = time.monotonic() + seconds
    pairs = [(contender, Series(contender.name)) for contender in contenders]
    for contender, series in pairs if plan.warms else ():
        _run(contender, series)
    for number in range(plan.runs):
        if number and time.monotonic() > ends:
            say(f"out of time after {number} of {plan.runs} rounds")
            break
        start = number % len(pairs) if pairs else 0
        for contender, series in pairs[start:] + pairs[:start]:
            if number < contender.rounds:
                _clean_run(contender, series, plan, ends)
    return [series for _, series in pairs]


def say(text: str) -> None:
    """Progress and warnings, to stderr."""
    sys.stderr.write(f"bench: {text}\n")


def _clean_run(contender: Contender, series: Series, plan: Plan, ends: float) -> None:
    for number in range(plan.tries):
        if series.failure or (number and time.monotonic() > ends):
            return
        if contender.output_bytes:
            settle()
        touch(contender.output_bytes)
        load = Load()
        reading = _run(contender, series)
        if reading is None:
            return
        if load.foreign() <= plan.foreign:
            series.readings.append(reading)
            return
        series.dropped += 1
        time.sleep(_PAUSE_S)


def _run(contender: Contender, series: Series) -> Reading | None:
    try:
        return contender.run()
    except FAILURES as exc:
        series.failure = f"{type(exc).__name__}: {exc}"
        say(f"{contender.name} FAILED and is left out: {series.failure}")
        return None


def settle() -> None:
    """Wait until nothing waits for the disk, deleted files included: the kernel would write in the run."""
    os.sync()
    ends = time.monotonic() + _SETTLE_S
    while (left := unwritten_bytes()) > _SETTLED_BYTES:
        if time.monotonic() > ends:
            say(f"{left // 1024**2} MiB still wait for the disk after {_SETTLE_S:g} s")
            return
        time.sleep(0.05)


def unwritten_bytes() -> int:
    """Of all files together: dirty, or on their way to a disk."""
    return memory("Dirty") + memory("Writeback")


def memory(name: str) -> int:
    """Bytes of a line of /proc/meminfo, such as ``MemAvailable`` (proc(5))."""
    with Path("/proc/meminfo").open() as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def touch(size: int) -> None:
    """Fault in ``size`` bytes and a tenth more, and give them back to the kernel."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, max(_LEAST_TOUCH, size * 11 // 10), flags=flags).close()


def _busy_s() -> float:
    """Processor seconds used by anybody since boot: all but idle and iowait (proc(5))."""
    with Path("/proc/stat").open("rb") as stat:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Processor seconds of this process and of everything it started, ended or not."""
    ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(usage.ru_utime + usage.ru_stime for usage in ended)
    return total + sum(map(used_s, descendants(os.getpid())))


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` and its children started and that still run."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def used_s(pid: int) -> float:
    """User and system time of a process and of those of its children that have ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0
