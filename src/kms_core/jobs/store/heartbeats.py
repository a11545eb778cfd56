"""Heartbeats of workers, and what these report of their processes."""

import math
import time
from collections.abc import Sequence
from typing import Final, cast

from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.keys import PREFIX, busy_key
from kms_core.jobs.store.records import named
from kms_core.jobs.store.store import JobStore
from kms_core.periodic import PeriodicThread
from kms_protocol import __version__

WORKER_SEEN_S: Final = 5.0
"""A silent worker counts as alive for so many seconds: five heartbeats."""
HEARTBEAT_EVERY_S: Final = 1.0
_IN_FULL_EVERY: Final = 3
_ENDED_KEPT_S: Final = 600  # for how a process ended, after the end of its lease
_WORKERS: Final = f"{PREFIX}workers"


class Heartbeat(PeriodicThread):
    """Records once a second that this worker lives, and how many processes serve which queues.

    It serves none before ``serve``: it counts as starting. In every third round workers that are gone are
    forgotten. It does no other work, so only Redis and a busy processor delay it. ``stop`` takes the worker
    off the list; a worker that was killed is on it for ``WORKER_SEEN_S`` at most.
    """

    def __init__(self, store: JobStore, name: str) -> None:
        super().__init__("heartbeat", HEARTBEAT_EVERY_S, failed="worker.not_recorded")
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
        rules = self._store.rules
        if self._rounds % _IN_FULL_EVERY:
            worker_lives(self._store, self._owner, rules.concurrency)
        else:
            served = rules.queues if self._serves else ()
            worker_seen(self._store, self._owner, rules.concurrency, served, self._about)
        self._rounds += 1

    def finish(self) -> None:
        worker_left(self._store, self._owner)  # one that cannot say so leaves the list by itself


def worker_seen(store: JobStore, worker: str, processes: int, queues: Sequence[str], about: str = "") -> None:
    """Note a worker, its processes, their queues, and its version and when it started.

    Workers that are gone are forgotten. Raises JobsUnavailable, as all functions here.
    """
    with redis_errors():
        store.scripts["worker_seen"]([_WORKERS], [worker, processes, WORKER_SEEN_S, 1, about, *queues])


def worker_lives(store: JobStore, worker: str, processes: int) -> None:
    """Note only that a worker lives."""
    with redis_errors():
        store.scripts["worker_seen"]([_WORKERS], [worker, processes, WORKER_SEEN_S, 0, ""])


def worker_left(store: JobStore, worker: str) -> None:
    """Note that a worker takes no more jobs."""
    worker_seen(store, worker, 0, ())


def live_workers(store: JobStore) -> list[str]:
    """The names of live workers; a killed one counts as live for ``WORKER_SEEN_S``."""
    with redis_errors():
        found = store.redis.zrangebyscore(_WORKERS, store.now() - WORKER_SEEN_S, "+inf")
    return list(map(named, cast("list[bytes]", found)))


def idle_s(store: JobStore, worker: str) -> float:
    """Seconds since this worker claimed or renewed anything; infinite if it never did."""
    with redis_errors():
        at = cast("bytes | None", store.redis.get(busy_key(worker)))
    return store.now() - float(at) if at else math.inf


def processes_stuck(
    store: JobStore, worker: str, processes: int, seconds: float, resources: Sequence[str]
) -> None:
    """Note the processes of a worker that hang, and keep it off these resources for so many seconds."""
    store.call("stuck", "", worker, processes, seconds, *resources)


def process_ended(store: JobStore, process: str, exit_code: int) -> None:
    """Note how a process (``host:id/pid``) ended: its exit status, or minus the number of a signal.

    Its attempt ends so once its lease runs out.
    """
    cause = f"status_{exit_code}" if exit_code > 0 else f"signal_{-exit_code}"
    with redis_errors():
        store.redis.set(f"{PREFIX}died:{process}", cause, ex=math.ceil(store.rules.lease_s) + _ENDED_KEPT_S)
