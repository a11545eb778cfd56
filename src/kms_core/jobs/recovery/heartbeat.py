"""A worker on the list of those that live: there before its first job, away when it is told to stop."""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import structlog

from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import JobsUnavailable

EVERY_S: Final = 1.0
_NOTHING: Final = nullcontext()
_log = structlog.get_logger(__name__)


class Heartbeat(threading.Thread):
    """Says once a second that this worker lives; nothing else is done here, so nothing can hold it up.

    A worker that was killed is on the list for ``upkeep.WORKER_SEEN_S`` at most.
    """

    def __init__(
        self, store: JobStore, name: str, *, working: AbstractContextManager[object] = _NOTHING
    ) -> None:
        """``working`` is entered for each word: what must not happen meanwhile (a fork) waits for it."""
        super().__init__(name="presence", daemon=True)
        self._store = store
        self._owner = name
        self._working = working
        self._stop_asked = threading.Event()

    def start(self) -> None:
        """Say it now, in this thread, and go on in one's own. Without Redis it is said once that is back."""
        self._say()
        super().start()

    def stop(self) -> None:
        """Take the worker off the list, soon and for good. May be called by a handler of signals."""
        self._stop_asked.set()

    def run(self) -> None:
        while not self._stop_asked.wait(EVERY_S):
            self._say()
        try:
            with self._working:
                self._store.worker_left(self._owner)
        except JobsUnavailable:
            _log.warning("worker.left_unsaid")  # it leaves the list by itself

    def _say(self) -> None:
        try:
            with self._working:
                self._store.worker_seen(self._owner)
        except Exception as exc:  # noqa: BLE001 -- one word may fail, the next must be said all the same
            _log.warning("worker.unsaid", error=type(exc).__name__)
