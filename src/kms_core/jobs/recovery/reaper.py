"""The reaper, which takes up jobs that are due, and the lock that lets one process of all workers do so."""

from collections.abc import Callable, Sequence
from typing import Final, cast

import structlog

from kms_core.jobs.store import charts, gauges
from kms_core.jobs.store.errors import is_unreadable, redis_errors
from kms_core.jobs.store.keys import PREFIX, job_key
from kms_core.jobs.store.records import named
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread

EVERY_S: Final = 1.0
DUE: Final = ("leased", "delayed", "expiring")
"""Sets of open jobs by when to look at them: leases, delays, expiries."""
_LOCK_S: Final = 10.0
_AT_ONCE: Final = 200  # some milliseconds, in which Redis does nothing else
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
            (2, self._forget),
            (60, self._count_operations),
            (10, self._tell_of_newer),
            (10, self._store.condition),  # records how full Redis is, for workers
        )

    def _take_up_due(self) -> None:
        jobs = due(self._store)
        for job_id, found in zip(jobs, reap_all(self._store, jobs), strict=True):
            if found in _TAKEN_UP:
                metrics.JOB_RESUMES.labels(found).inc()
                _log.info("job.taken_up", job_id=job_id, reason=found)

    def _forget(self) -> None:
        forget(self._store)

    def _count_operations(self) -> None:
        charts.add_point(self._store)

    def _tell_of_newer(self) -> None:
        count = gauges.for_newer_workers(self._store)
        if count != self._newer:
            _log.warning("jobs.wait_for_newer_workers", count=count)
        self._newer = count


def due(store: JobStore, limit: int = 1000) -> list[str]:
    """Open jobs to look at: leases that ran out, delays that are over, queued jobs that expired.

    Raises JobsUnavailable, as all functions here.
    """
    return list(dict.fromkeys(job_id for key in DUE for job_id in past(store, key, limit)))


def past(store: JobStore, sorted_set: str, limit: int, ago_s: float = 0.0) -> list[str]:
    """Members of a sorted set (its key without the prefix) whose time came ``ago_s`` ago."""
    with redis_errors():
        ids = store.redis.zrangebyscore(f"{PREFIX}{sorted_set}", 0, store.now() - ago_s, start=0, num=limit)
    return [named(raw) for raw in cast("list[bytes]", ids)]


def reap_all(store: JobStore, job_ids: Sequence[str]) -> list[str]:
    """Look after open jobs (``reap.lua``). Returns what was done with each, or its state.

    A record that no script can read is ``unreadable``, and leaves the sets.
    """
    found: list[bytes] = []
    with redis_errors():
        for start in range(0, len(job_ids), _AT_ONCE):
            pipeline = store.redis.pipeline(transaction=False)
            some = job_ids[start : start + _AT_ONCE]
            for job_id in some:
                given = [job_id, store.large_job_bytes, store.rules.result_ttl_s]
                store.scripts["reap"]([job_key(job_id)], given, client=pipeline)
            answers = zip(some, pipeline.execute(raise_on_error=False), strict=True)
            found += [_reaped(store, job_id, answer) for job_id, answer in answers]
    return [word.decode(errors="replace") for word in found]


def _reaped(store: JobStore, job_id: str, answer: list[bytes] | Exception) -> bytes:
    if not isinstance(answer, Exception):
        return answer[0]
    if not is_unreadable(answer):
        raise answer
    for key in DUE:
        store.redis.zrem(f"{PREFIX}{key}", job_id)
    _log.warning("job.unreadable", job_id=job_id)
    return b"unreadable"


def forget(store: JobStore, limit: int = 2000) -> None:
    """Take the ids of expired records out of the lists of jobs, which never expire.

    In steps of some hundred: a job is in up to 20 lists, and Redis does nothing else in a step.
    """
    for _ in range(0, limit, _AT_ONCE):
        if not past(store, "records", 1):
            return
        store.call("forget", "", _AT_ONCE)
