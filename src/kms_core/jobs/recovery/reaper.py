"""Looks after jobs while workers come and go: leases that ran out, lost messages, expired results.

Runs in the parent of each worker; a short lock in Redis lets one of them act at a time.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import structlog

from kms_core.jobs.model import QueuePriority
from kms_core.jobs.storage.spool import Spool
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics

EVERY_S: Final = 1.0
_LOCK_S: Final = 10.0
_LOOK_AGAIN_S: Final = 10.0
_SWEEP_EVERY: Final = 600
_TRIM_EVERY: Final = 10
_ORPHAN_AGE_S: Final = 3600.0
_WANT_A_MESSAGE: Final = frozenset({"requeued", "committing", "due", "lost", "parts_ended"})
_NOTHING: Final = nullcontext()
_log = structlog.get_logger(__name__)


class Reaper(threading.Thread):
    """One round a second. ``waiting`` asks the broker: queued jobs are nudged again if their lane is empty.

    Where the broker's lists are in the same Redis, also if their lane holds later messages alone.
    """

    def __init__(
        self,
        store: JobStore,
        spool: Spool,
        name: str,
        waiting: Callable[[], Mapping[QueuePriority, int]],
        *,
        working: AbstractContextManager[object] = _NOTHING,
    ) -> None:
        """``working`` is entered for each round: what must not happen meanwhile (a fork) waits for it."""
        super().__init__(name="caretaker", daemon=True)
        self._store = store
        self._spool = spool
        self._owner = name
        self._waiting = waiting
        self._working = working
        self._stop_asked = threading.Event()
        self._rounds = 0
        self._failing: set[str] = set()
        self._trimmed: dict[str, int] = {}

    def run(self) -> None:
        while not self._stop_asked.wait(EVERY_S):
            try:
                with self._working:
                    if self._store.lock("caretaker", self._owner, min(_LOCK_S, self._store.rules.lease_s)):
                        self.round()
            except Exception as exc:  # noqa: BLE001 -- a round may fail, the caretaker may not
                _log.warning("caretaker.round_failed", error=type(exc).__name__)

    def stop(self) -> None:
        self._stop_asked.set()

    def round(self) -> None:
        """Take up what is due, delete what has expired, and now and then trim lists and sweep orphans."""
        self._step(self._take_up_due)
        self._step(self._delete_expired)
        if self._rounds % _TRIM_EVERY == 0:
            self._step(self._trim)
        if self._rounds % _SWEEP_EVERY == 0:
            self._step(self._sweep)
        self._rounds += 1

    def _step(self, step: Callable[[], None]) -> None:
        """One step, which may fail without the others; the log has the first failure of a row."""
        try:
            step()
        except Exception as exc:  # noqa: BLE001 -- as above
            if step.__name__ not in self._failing:
                _log.warning("caretaker.step_failed", step=step.__name__.strip("_"), error=type(exc).__name__)
            self._failing.add(step.__name__)
        else:
            self._failing.discard(step.__name__)

    def _take_up_due(self) -> None:
        due = self._store.due()
        if due:
            waiting = self._waiting()
            reaped = self._store.reap_all(due, _LOOK_AGAIN_S, self._store.oldest())
            for job_id, (found, lane) in zip(due, reaped, strict=True):
                if found in _WANT_A_MESSAGE or (found == "queued" and not waiting.get(lane)):
                    self._take_up(job_id, found, lane)

    def _delete_expired(self) -> None:
        for job_id in self._store.expired():
            self._spool.delete(job_id)
            if self._store.purged(job_id):  # a worker tidies what they may have left beside the target
                self._store.nudge(job_id, self._store.lane_of(job_id))

    def _take_up(self, job_id: str, found: str, lane: QueuePriority) -> None:
        self._store.nudge(job_id, lane)
        metrics.JOB_RESUMES.labels(found).inc()
        _log.info("job.taken_up", job_id=job_id, reason=found)

    def _trim(self) -> None:
        """The next ids of each list of jobs: those whose record has expired go."""
        for key in self._store.lists():
            self._trimmed[key] = self._store.trim(key, self._trimmed.get(key, 0))

    def _sweep(self) -> None:
        """Folders that no record names: an upload broken off by a kill, a record that expired."""
        for job_id in self._spool.folders(_ORPHAN_AGE_S):
            if not self._store.exists(job_id) and self._spool.delete(job_id):
                _log.info("spool.swept", job_id=job_id)
