"""The reaper, which takes up jobs that are due and deletes expired results, and the heartbeat of a worker.

Both run in the parent of each worker; a lock of some seconds lets one reaper act at a time.
"""

import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Final

import structlog

from kms_core.jobs.storage.spool import Spool
from kms_core.jobs.store import activity
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_protocol import __version__

HEARTBEAT_EVERY_S: Final = 1.0
_COUNT_EVERY: Final = 3
_log = structlog.get_logger(__name__)


class Heartbeat(PeriodicThread):
    """Records once a second that this worker lives, and how many processes serve which queues.

    It serves none before ``serve``: another worker would get the wake-ups that are sent for its processes.
    The processes of all workers are counted in every third round: others may have been killed.
    Nothing else is done here, so nothing can delay it; ``stop`` takes the worker off the list. A worker that
    was killed is on the list for ``maintenance.WORKER_SEEN_S`` at most.
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
        rules, counts = self._store.rules, self._rounds % _COUNT_EVERY == 0
        served = rules.queues if self._serves else ()
        self._store.worker_seen(self._owner, rules.concurrency, served, self._about, counts=counts)
        self._rounds += 1

    def finish(self) -> None:
        self._store.worker_left(self._owner)  # one that cannot say so leaves the list by itself


EVERY_S: Final = 1.0
_LOCK_S: Final = 10.0
_ORPHAN_AGE_S: Final = 3600.0
_TAKEN_UP: Final = frozenset({"requeued", "committing", "due", "parts_ended"})


class Reaper(PeriodicThread):
    """One round a second: takes up jobs that are due, wakes idle processes, deletes expired results."""

    def __init__(
        self,
        store: JobStore,
        spool: Spool,
        name: str,
        *,
        require_install: Callable[[], None] = lambda: None,
        may_sweep: Callable[[], bool] = lambda: True,
    ) -> None:
        """``require_install`` raises WrongInstall where spool and Redis do not belong together.

        ``may_sweep`` says whether files of jobs that Redis does not know are orphans.
        """
        self._may_sweep = may_sweep
        super().__init__("reaper", EVERY_S, failed="caretaker.round_failed")
        self._require_install = require_install
        self._store = store
        self._spool = spool
        self._owner = name
        self._rounds = 0
        self._failing: set[str] = set()
        self._newer = 0

    def round(self) -> None:
        self._require_install()
        if self._store.lock("caretaker", self._owner, min(_LOCK_S, self._store.rules.lease_s)):
            self.reap()

    def reap(self) -> None:
        """Take up due jobs, wake workers, delete inputs and results, forget expired jobs, sweep orphans.

        Once a minute, add a point to the sums of operations.
        """
        steps: Sequence[tuple[int, Callable[[], object]]] = (
            (1, self._take_up_due),
            (1, self._store.wake),
            (5, self._delete_inputs),
            (2, self._delete_expired),
            (2, self._store.forget),
            (60, self._count_operations),
            (10, self._tell_of_newer),
            (10, self._store.condition),  # notes how full Redis is, for workers
            (600, self._sweep),
        )
        for every, step in steps:
            if self._rounds % every == 0:
                self._step(step)
        self._rounds += 1

    def _step(self, step: Callable[[], object]) -> None:
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
        for job_id, found in zip(due, self._store.reap_all(due), strict=True):
            if found in _TAKEN_UP:
                metrics.JOB_RESUMES.labels(found).inc()
                _log.info("job.taken_up", job_id=job_id, reason=found)

    def _delete_inputs(self) -> None:
        found = self._store.with_input()
        self._store.inputs_removed(list(takewhile(self._is_removed(self._spool.discard_input), found)))

    def _delete_expired(self) -> None:
        for job_id in takewhile(self._is_removed(self._spool.delete), self._store.expired()):
            self._store.purged(job_id)

    def _is_removed(self, remove: Callable[[str], bool]) -> Callable[[str], bool]:
        """False while the bucket of the spool does not answer: another host, or a later round, removes it."""
        return lambda job_id: remove(job_id) or not self._spool.store.is_away

    def _count_operations(self) -> None:
        activity.add_point(self._store)

    def _tell_of_newer(self) -> None:
        count = self._store.for_newer_workers()
        if count != self._newer:
            _log.warning("jobs.wait_for_newer_workers", count=count)
        self._newer = count

    def _sweep(self) -> None:
        """Folders that no record names: an upload broken off by a kill, a record that expired."""
        for job_id in self._spool.folders(_ORPHAN_AGE_S) if self._may_sweep() else ():
            if not self._store.exists(job_id) and self._spool.delete(job_id):
                _log.info("spool.swept", job_id=job_id)
        self._spool.sweep()
