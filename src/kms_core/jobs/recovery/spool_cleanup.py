"""The cleanup of the spool: inputs and results that nothing needs any more, and orphans."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import structlog

from kms_core.jobs.recovery.reaper import LockedSteps, past
from kms_core.jobs.storage.spool import Spool
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.keys import job_key
from kms_core.jobs.store.store import JobStore

_STEP_S: Final = 1.0
_MOST: Final = 2000
_ORPHAN_AGE_S: Final = 3600.0
_log = structlog.get_logger(__name__)


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
        found = past(self._store, "inputs", _MOST, self._store.rules.input_grace_s)
        self._store.call_each("input_removed", list(self._removed(found, self._spool.discard_input)))

    def _delete_expired(self) -> None:
        found = expired(self._store)
        in_redis = self._small(found)  # all that they have, which ``purged`` deletes

        def delete(job_id: str) -> bool:
            return job_id in in_redis or self._spool.delete(job_id, in_redis=False)

        self._store.purged(*self._removed(found, delete))

    def _small(self, job_ids: Sequence[str]) -> set[str]:
        """Return those of these jobs whose blobs are all in Redis."""
        with redis_errors():
            pipeline = self._store.redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hexists(job_key(job_id), "small")
            return {job_id for job_id, is_so in zip(job_ids, pipeline.execute(), strict=True) if is_so}

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


def expired(store: JobStore) -> list[str]:
    """Ended jobs whose results are to be deleted. Raises JobsUnavailable."""
    return past(store, "ended", _MOST)
