"""Heartbeats of workers, by which others know that they live and what they serve."""

import time
from typing import Final

from kms_core.jobs.store.store import JobStore
from kms_core.periodic import PeriodicThread
from kms_protocol import __version__

HEARTBEAT_EVERY_S: Final = 1.0
_IN_FULL_EVERY: Final = 3


class Heartbeat(PeriodicThread):
    """Records once a second that this worker lives, and how many processes serve which queues.

    It serves none before ``serve``: it counts as starting. In every third round workers that are gone are
    forgotten. Nothing else is done here, so nothing can delay it; ``stop`` takes the worker off the list. A
    worker that was killed is on the list for ``maintenance.WORKER_SEEN_S`` at most.
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
