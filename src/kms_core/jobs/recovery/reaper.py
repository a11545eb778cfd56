"""The reaper, which takes up jobs that are due, and the lock that lets one process of all workers do so."""

from collections.abc import Callable, Sequence
from typing import Final

import structlog

from kms_core.jobs.store import charts
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread

EVERY_S: Final = 1.0
_LOCK_S: Final = 10.0
_TAKEN_UP: Final = frozenset({"requeued", "committing", "due", "parts_ended"})
_log = structlog.get_logger(__name__)


class LockedSteps(PeriodicThread):
    """Steps at an interval, by one process of all workers at a time.

    ``lock`` is the name of their lock. A step may fail without the others; the log has the first failure of a
    row.
    """

    lock: str
    every_s: float

    def __init__(self, store: JobStore, owner: str, require: Callable[[], None] = lambda: None) -> None:
        """``require`` raises WrongInstall where spool and Redis do not belong together."""
        super().__init__(self.lock, self.every_s, failed="caretaker.round_failed")
        self._store, self._owner, self._require = store, owner, require
        self._rounds = 0
        self._failing: set[str] = set()

    @property
    def steps(self) -> Sequence[tuple[int, Callable[[], object]]]:
        """Each step, and in every how many rounds it is taken."""
        raise NotImplementedError

    def round(self) -> None:
        self._require()
        if self._store.lock(self.lock, self._owner, min(_LOCK_S, self._store.rules.lease_s)):
            self.step()

    def step(self) -> None:
        """Take the steps that are due in this round, without the lock."""
        for every, step in self.steps:
            if self._rounds % every == 0:
                self._try(step)
        self._rounds += 1

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as exc:  # noqa: BLE001 -- as above
            if step.__name__ not in self._failing:
                _log.warning("caretaker.step_failed", step=step.__name__.strip("_"), error=type(exc).__name__)
            self._failing.add(step.__name__)
        else:
            self._failing.discard(step.__name__)


class Reaper(LockedSteps):
    """Takes up jobs that are due, wakes processes, forgets expired records. Waits for Redis alone."""

    lock = "caretaker"
    every_s = EVERY_S
    _newer = 0

    @property
    def steps(self) -> Sequence[tuple[int, Callable[[], object]]]:
        return (
            (1, self._take_up_due),
            (1, self._store.wake),
            (2, self._store.forget),
            (60, self._count_operations),
            (10, self._tell_of_newer),
            (10, self._store.condition),  # notes how full Redis is, for workers
        )

    def _take_up_due(self) -> None:
        due = self._store.due()
        for job_id, found in zip(due, self._store.reap_all(due), strict=True):
            if found in _TAKEN_UP:
                metrics.JOB_RESUMES.labels(found).inc()
                _log.info("job.taken_up", job_id=job_id, reason=found)

    def _count_operations(self) -> None:
        charts.add_point(self._store)

    def _tell_of_newer(self) -> None:
        count = self._store.for_newer_workers()
        if count != self._newer:
            _log.warning("jobs.wait_for_newer_workers", count=count)
        self._newer = count
