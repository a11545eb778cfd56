"""The heartbeat of a worker; the reaper, which takes up jobs that are due; the cleanup of the spool.

A lock of some seconds lets one process of all workers act at a time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import structlog

from kms_core.jobs.storage.spool import Spool
from kms_core.jobs.store import activity
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_protocol import __version__

HEARTBEAT_EVERY_S: Final = 1.0
_IN_FULL_EVERY: Final = 3
EVERY_S: Final = 1.0
_TAKEN_UP: Final = frozenset({"requeued", "committing", "due", "parts_ended"})
_log = structlog.get_logger(__name__)


class Heartbeat(PeriodicThread):
    """Records once a second that this worker lives, and how many processes serve which queues.

    It serves none before ``serve``: it counts as starting. In every third round workers that are gone are
    forgotten. It does no other work, so only Redis and a busy processor delay it. ``stop`` takes the worker
    off the list; a worker that was killed is on it for ``maintenance.WORKER_SEEN_S`` at most.
    """

    def __init__(self, store: JobStore, name: str) -> None:
        super().__init__("heartbeat", HEARTBEAT_EVERY_S, failed="worker.unsaid")
        self._store = store
        self._owner = name
        self._about = f"{__version__} {time.time():.0f}"
        self._serves = False
        self._rounds = 0

    def start(self) -> None:
        """Record it now, in this thread, and from then on in a thread of its own."""
        self.attempt(self.round)
        super().start()

    def serve(self) -> None:
        """Record that the worker takes messages from now on, and wake it for jobs that are ready."""
        self._serves = True
        self.attempt(self._begin)

    def serves(self) -> bool:
        """Return whether the worker takes messages: from ``serve`` until ``stop``."""
        return self._serves and not self.stopping

    def _begin(self) -> None:
        self._rounds = 0
        self.round()
        self._store.wake()

    def round(self) -> None:
        rules, in_full = self._store.rules, self._rounds % _IN_FULL_EVERY == 0
        served = rules.queues if self._serves else ()
        self._store.worker_seen(self._owner, rules.concurrency, served, self._about, in_full=in_full)
        self._rounds += 1

    def finish(self) -> None:
        self._store.worker_left(self._owner)  # one that cannot say so leaves the list by itself


_LOCK_S: Final = 10.0


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
        activity.add_point(self._store)

    def _tell_of_newer(self) -> None:
        count = self._store.for_newer_workers()
        if count != self._newer:
            _log.warning("jobs.wait_for_newer_workers", count=count)
        self._newer = count


_STEP_S: Final = 1.0
_MOST: Final = 2000
_ORPHAN_AGE_S: Final = 3600.0


class SpoolCleanup(LockedSteps):
    """Deletes inputs and results that nothing needs any more, and orphans. May wait for a disk or a bucket.

    A step that is not done after a second goes on in the next round, which is at once.
    """

    lock = "spool-cleanup"
    every_s = 4.0

    def __init__(
        self,
        store: JobStore,
        spool: Spool,
        owner: str,
        require: Callable[[], None] = lambda: None,
        may_sweep: Callable[[], bool] = lambda: True,
    ) -> None:
        """``may_sweep`` says whether files of jobs that Redis does not know are orphans."""
        super().__init__(store, owner, require)
        self._spool, self._may_sweep = spool, may_sweep

    @property
    def steps(self) -> Sequence[tuple[int, Callable[[], object]]]:
        return (1, self._delete_inputs), (1, self._delete_expired), (150, self._sweep)

    def _delete_inputs(self) -> None:
        found = self._store.with_input(_MOST)
        self._store.inputs_removed(list(self._removed(found, self._spool.discard_input)))

    def _delete_expired(self) -> None:
        found = self._store.expired(_MOST)
        in_redis = self._store.small(found)  # all that they have, which ``purged`` deletes

        def delete(job_id: str) -> bool:
            return job_id in in_redis or self._spool.delete(job_id, in_redis=False)

        self._store.purged(*self._removed(found, delete))

    def _removed(self, job_ids: Sequence[str], remove: Callable[[str], bool]) -> Iterator[str]:
        """Jobs whose files were removed, for a second, or until the bucket of the spool does not answer."""
        until = time.monotonic() + _STEP_S
        for job_id in job_ids:
            if time.monotonic() > until:
                break
            if not remove(job_id) and self._spool.store.is_away:
                return  # another host, or a later round, removes it
            yield job_id
        else:
            if len(job_ids) < _MOST:
                return
        self.wake()

    def _sweep(self) -> None:
        """Folders that no record names: an upload broken off by a kill, a record that expired."""
        for job_id in self._spool.folders(_ORPHAN_AGE_S) if self._may_sweep() else ():
            if not self._store.exists(job_id) and self._spool.delete(job_id):
                _log.info("spool.swept", job_id=job_id)
        self._spool.sweep()
