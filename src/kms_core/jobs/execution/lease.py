"""The lease of one attempt: renewed while work goes on, it reports progress, notices loss and cancellation.

One thread renews all leases of a process: starting one for each would cost more than a small job does.
"""

import functools
import math
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

import msgspec
import structlog

from kms_core.jobs.execution import attendance
from kms_core.jobs.model import Attempt, LeaseLost
from kms_core.jobs.spec import FirstFailures, WorkResult
from kms_core.jobs.storage.locations import Locations
from kms_core.jobs.storage.spool import Spool
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_core.service import Kms
from kms_protocol.errors import JobsUnavailable, KmsError, Unavailable

_REPORT_EVERY_S: Final = 0.5
_HAND_BACK_AFTER_S: Final = 5.0  # from the time at which attempts are to stop until they are stopped
_log = structlog.get_logger(__name__)


class FoundLarge(Unavailable):
    """The sources have grown since the job was claimed as a small one: it is to be claimed as a large one."""

    code = "found_large"
    summary = "The source has grown since the job was accepted"

    def __init__(self, work_bytes: int) -> None:
        super().__init__()
        self.work_bytes = work_bytes


class HandedBack(Unavailable):
    """The worker stops: the attempt goes back to the queue as if it had not begun."""

    code = "handed_back"
    summary = "The worker stops, and hands the job back"


class Renewed:
    """Something that is renewed every ``every_s`` seconds while its block runs."""

    every_s = 1.0

    def renew(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        _pacemaker(os.getpid()).add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pacemaker(os.getpid()).remove(self)


class Lease(Renewed):
    """Held while a job runs. ``check`` raises LeaseLost or JobCancelled, from whichever thread asks.

    The work sets ``made``, its result, whose counts are those reported to the lease.
    """

    def __init__(self, store: JobStore, claim: Attempt) -> None:
        self.claim = claim
        self._store = store
        self._lock = threading.Lock()
        self._bytes = self._items = self._failed = 0
        self._before = (0, 0, 0)
        self.made = WorkResult()
        self.failures = FirstFailures()
        self._trouble: KmsError | None = None
        self._moved_at = time.monotonic()
        self._held_until = self._moved_at + store.rules.lease_s
        self.every_s = min(_REPORT_EVERY_S, store.rules.lease_s / 3)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        done = self.claim.accepted.kind
        if self._items:
            metrics.JOB_ITEMS.labels(done, "ok").inc(self._items - self._failed)
            metrics.JOB_ITEMS.labels(done, "failed").inc(self._failed)

    def check(self) -> None:
        """Raise if this attempt must stop: another worker took over, the owner cancelled, time is over."""
        self._moved_at = time.monotonic()
        if self._trouble is not None:
            raise self._trouble
        if self._moved_at > self._held_until:
            raise LeaseLost

    def admit(self, size_bytes: int) -> None:
        """Raise FoundLarge if a job that was claimed as a small one would read as much as a large one."""
        claim, work_bytes = self.claim, self._bytes + size_bytes
        if not claim.is_large and not claim.commit and work_bytes >= self._store.large_job_bytes:
            raise FoundLarge(work_bytes)

    def advance(self, size_bytes: int) -> None:
        """Report bytes done."""
        with self._lock:
            self._bytes += size_bytes
            self._moved_at = time.monotonic()

    def item(self, size_bytes: int = 0, *, failed: bool) -> None:
        """Report an item done, and its bytes."""
        with self._lock:
            self._bytes += size_bytes
            self._items += 1
            self._failed += failed
            self._moved_at = time.monotonic()

    def resume(self, *, items: int, failed: int, size_bytes: int) -> None:
        """Count what earlier attempts did for good."""
        self._before = (items, failed, size_bytes)

    @property
    def result(self) -> WorkResult:
        """The work done so far."""
        items, failed, size_bytes = self._before
        return msgspec.structs.replace(
            self.made,
            items_done=items + self._items,
            items_failed=failed + self._failed,
            bytes_done=size_bytes + self._bytes,
            failures=tuple(self.failures),
        )

    def renew(self) -> None:
        """Extend the lease. A lost one is reported by ``check``, or when the work is done.

        An attempt that advances nothing for ``stall_s`` loses it, and its process ends. Once the worker must
        stop, ``check`` raises; an attempt that does not call it is handed back, and its process ends.
        """
        asked = time.monotonic()
        attendance.report_slow(self.claim.accepted.job_id, asked - self._moved_at)
        if asked - self._moved_at > self._store.rules.stall_s:
            self._stall(asked - self._moved_at)
        elif attendance.stops_at() <= asked and self._trouble is None:
            self._trouble = HandedBack()
        elif attendance.stops_at() + _HAND_BACK_AFTER_S <= asked:
            self._hand_back()
        try:
            self._store.renew(self.claim, self.result.progress)
            self._held_until = asked + self._store.rules.lease_s
        except JobsUnavailable:  # Redis may come back before the lease is over
            return
        except KmsError as exc:
            self._trouble = exc

    def _stall(self, idle_s: float) -> None:
        job_id = self.claim.accepted.job_id
        self._trouble = LeaseLost()
        resources: list[str] = []
        with suppress(JobsUnavailable):  # then the lease runs out
            resources = self._store.stalled(self.claim)
        metrics.JOB_RESUMES.labels("stalled").inc()
        _log.error("job.stalled", job_id=job_id, idle_s=round(idle_s), resources=resources)
        attendance.leave(attendance.Stall(os.getpid(), job_id, resources))

    def _hand_back(self) -> None:
        """The work does not look at ``check``. A commit that has begun is finished by any worker."""
        _log.warning("job.handed_back", job_id=self.claim.accepted.job_id, by="watch")
        with suppress(LeaseLost, JobsUnavailable):
            self._store.defer(self.claim, 0, HandedBack.code, away=False)
        attendance.leave(None)


class Chore(Renewed):
    """Work on files without a lease, such as tidying: a process in which it hangs ends as well."""

    def __init__(self, store: JobStore, job_id: str) -> None:
        self._job_id, self._stall_s, self._since = job_id, store.rules.stall_s, time.monotonic()

    def renew(self) -> None:
        """End the process if the work has not ended after ``stall_s``."""
        idle_s = time.monotonic() - self._since
        attendance.report_slow(self._job_id, idle_s)
        if idle_s > self._stall_s:
            _log.error("job.stalled", job_id=self._job_id, idle_s=round(self._stall_s), resources=[])
            attendance.leave(attendance.Stall(os.getpid(), self._job_id, []))


class _Pacemaker:
    """Renews leases when they are due, in a thread that sleeps in between. One for each process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[Renewed, float] = {}
        self._wakes_at = -math.inf
        threading.Thread(target=self._run, name="leases", daemon=True).start()

    def add(self, lease: Renewed) -> None:
        with self._changed:
            self._due[lease] = due = time.monotonic() + lease.every_s
            if due < self._wakes_at:
                self._changed.notify()

    def remove(self, lease: Renewed) -> None:
        with self._changed:
            self._due.pop(lease, None)

    def _run(self) -> None:
        while True:
            for lease in self._await_due():
                try:
                    lease.renew()
                except Exception as exc:  # noqa: BLE001 -- a lease may run out, the thread may not end
                    _log.exception("lease.renewal_failed", error=type(exc).__name__)

    def _await_due(self) -> list[Renewed]:
        with self._changed:
            while True:
                now = time.monotonic()
                due = [lease for lease, at in self._due.items() if at <= now]
                if due:
                    self._due |= {lease: now + lease.every_s for lease in due}
                    self._wakes_at = -math.inf  # an addition from now on is seen before the next sleep
                    return due
                self._wakes_at = min(self._due.values(), default=math.inf)
                self._changed.wait(None if math.isinf(self._wakes_at) else self._wakes_at - now)


@functools.cache
def _pacemaker(_process: int) -> _Pacemaker:
    """The thread of this process: threads do not survive a fork."""
    return _Pacemaker()


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The services that a worker uses."""

    kms: Kms
    store: JobStore
    spool: Spool
    places: Locations
