"""Processes of the pool that hang are killed or replaced.

A process that waits for a disk in the kernel (state D) ends when the disk answers. Until then its worker
avoids the roots that it hangs on, another process takes its place, and status, metrics and log say so. The
same holds while no process of the pool makes progress, before any of them counts as hanging: jobs that need
no such root go on.
"""

import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import structlog
from celery.concurrency.prefork import TaskPool
from celery.worker.consumer import Consumer

from kms_core.jobs.execution.attendance import Attendance, Stall
from kms_core.jobs.store.heartbeats import process_ended, processes_stuck
from kms_core.jobs.store.store import JobStore
from kms_core.periodic import PeriodicThread
from kms_protocol.errors import JobsUnavailable

EVERY_S: Final = 1.0
_LAST_S: Final = 10.0  # after the time at which attempts are handed back
_HELD_S: Final = 15.0  # what hangs is left alone for so long after each round
_SLOW_HELD_S: Final = 3.0  # and what is slow
_SEEN_S: Final = 2.5  # a process that reports itself no more makes progress, or has ended
_REPORTED_S: Final = 7.0  # after the first report, one that is slow is reported
_log = structlog.get_logger(__name__)


@dataclass
class _Watched:
    """A process that makes no progress ``since`` a time, and reported so at ``seen``.

    One that was killed has a ``pidfd``; ``rounds`` counts since then.
    """

    stall: Stall
    since: float = 0.0
    seen: float = 0.0
    pidfd: int = -1
    rounds: int = 0
    replaced: bool = False
    is_reported: bool = False


class Slots(PeriodicThread):
    """Watches the processes of a worker that announced that they hang, or are slow.

    At most as many processes are replaced as the pool has at first.
    """

    def __init__(self, attendance: Attendance, store: JobStore, name: str, consumer: Consumer) -> None:
        """``consumer`` is that of the worker, with a pool."""
        super().__init__("slots", EVERY_S, failed="slots.round_failed")
        self._attendance, self._store, self._owner = attendance, store, name
        self._pool: TaskPool = consumer.pool
        self._in_loop: Callable[[Callable[[], None]], object] = consumer.hub.call_soon
        """Calls a function in the thread that owns the pool."""
        self._most = self._pool.num_processes
        self._stuck: list[_Watched] = []
        self._slow: dict[int, _Watched] = {}
        self._surplus = 0
        self._reported = 0
        self._processes: dict[int, Any] = {}
        self._note_ended()  # those that die before the first round are known, too

    def round(self) -> None:
        now = time.monotonic()
        for stall in self._attendance.stalls():
            if stall.is_slow:
                self._note_slow(stall, now)
            else:
                self._end(stall)
        self._note_ended()
        self._drop_ended()
        self._drop_fast(now)
        for one in self._stuck:
            one.rounds += 1
            if one.rounds > 1:  # it had time to end
                self._replace(one)
        is_blocked = self._is_blocked()
        if is_blocked and (slow := next((each for each in self._slow.values() if not each.replaced), None)):
            self._replace(slow)  # another process, since none makes progress
        if self._surplus:
            self._in_loop(self._shrink)
        reports_all = is_blocked or self._replaced
        self._report([one for one in self._slow.values() if reports_all or now - one.since > _REPORTED_S])
        if self._stuck and time.monotonic() > self._attendance.stops_at.at + _LAST_S:
            _log.warning("worker.left_stuck_processes", pids=[one.stall.pid for one in self._stuck])
            os._exit(os.EX_OK)  # the pool would wait for them

    def finish(self) -> None:
        """No process is left. One that could not be ended ended this thread, too: see ``round``."""
        if self._reported:
            processes_stuck(self._store, self._owner, 0, 0.0, [])

    def _note_ended(self) -> None:
        """Note how processes ended that are in the pool no more."""
        with suppress(AttributeError):  # as below
            found = {each.pid: each for each in self._pool._pool._pool}  # noqa: SLF001 -- Celery shows pids alone
            for pid in self._processes.keys() - found.keys():
                if code := self._processes[pid].exitcode:
                    process_ended(self._store, f"{self._owner}/{pid}", code)
            self._processes = found

    def _is_blocked(self) -> bool:
        """Return whether no process makes progress."""
        busy = len(self._slow) + len(self._stuck)
        with suppress(AttributeError):  # the pool has ended, with the worker
            return bool(self._slow) and busy >= self._pool.num_processes
        return False

    def _note_slow(self, stall: Stall, now: float) -> None:
        one = self._slow.get(stall.pid)
        if one is None or one.stall.job_id != stall.job_id:
            try:
                resources = self._store.resources(stall.job_id)
            except JobsUnavailable:  # it waits for Redis, as any other process would
                return
            stall = msgspec.structs.replace(stall, resources=resources)
            one = _Watched(stall, now, replaced=bool(one and one.replaced))
            self._slow[stall.pid] = one
        one.seen = now

    def _drop_fast(self, now: float) -> None:
        for pid, one in [(pid, one) for pid, one in self._slow.items() if now - one.seen > _SEEN_S]:
            del self._slow[pid]
            self._surplus += one.replaced

    @property
    def _replaced(self) -> int:
        return sum(each.replaced for each in (*self._stuck, *self._slow.values()))

    def _end(self, stall: Stall) -> None:
        slow = self._slow.pop(stall.pid, None)
        with suppress(ProcessLookupError):
            pidfd, replaced = os.pidfd_open(stall.pid), bool(slow and slow.replaced)
            self._stuck.append(_Watched(stall, pidfd=pidfd, replaced=replaced))
            os.kill(stall.pid, signal.SIGKILL)

    def _drop_ended(self) -> None:
        for one in [one for one in self._stuck if _has_ended(one.pidfd)]:
            self._stuck.remove(one)
            os.close(one.pidfd)
            if one.rounds > 1:
                _log.info("worker.process_ended", pid=one.stall.pid, job_id=one.stall.job_id)
            self._surplus += one.replaced

    def _replace(self, one: _Watched) -> None:
        """Start another process in its place, unless there is one, or there are enough of them."""
        if not one.replaced and self._replaced < self._most:
            one.replaced = True
            self._in_loop(lambda: self._pool.grow(1))

    def _shrink(self) -> None:
        """End an idle process, if one was started for another that has ended by now."""
        if not self._surplus or len(self._pool.info["processes"]) > self._pool.num_processes:
            return  # one is still ending, and would be chosen again
        with suppress(ValueError):  # all are busy: in the next round
            self._pool.shrink(1)
            self._surplus -= 1

    def _report(self, slow: Sequence[_Watched]) -> None:
        """Note the processes that hang, and those that are slow, and have none other touch their roots."""
        hanging = [one for one in self._stuck if one.rounds > 1]
        watched = [*hanging, *slow]
        for one in [one for one in watched if not one.is_reported]:
            one.is_reported = True
            log, event = _log.error, "worker.process_stuck"
            if one.stall.is_slow:
                log, event = _log.warning, "worker.process_slow"
            log(event, pid=one.stall.pid, job_id=one.stall.job_id, resources=one.stall.resources)
        if watched or self._reported:
            resources = {name for one in watched for name in one.stall.resources}
            held_s = _HELD_S if hanging else _SLOW_HELD_S
            self._reported = len(watched)
            processes_stuck(self._store, self._owner, self._reported, held_s, sorted(resources))


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
