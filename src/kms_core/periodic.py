"""Threads that work at an interval."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import structlog

_LOG_AGAIN_S: Final = 60.0


class PeriodicThread(threading.Thread):
    """Calls ``round`` every ``interval_s`` seconds, 10 % more or less, until ``stop``.

    Subclasses define ``round``, and ``finish`` for work after the last round. An exception ends a round, not
    the thread: it is logged as the event ``failed``, once a minute while rounds go on failing.
    A process that forks sets ``fork_lock`` before the start. It is held during each round, so that a fork
    that waits for it copies no lock of a round.
    """

    fork_lock: AbstractContextManager[object] = nullcontext()

    def __init__(self, name: str, interval_s: float, *, failed: str) -> None:
        super().__init__(name=name, daemon=True)
        self.stopping = False
        self._interval_s, self._failed = interval_s, failed
        self._wake = threading.Event()
        self._log = structlog.get_logger(type(self).__module__)
        self._log_at = 0.0

    def round(self) -> None:
        """The repeated work. May raise."""
        raise NotImplementedError

    def finish(self) -> None:
        """The work after the last round. May raise."""

    def run(self) -> None:
        while not self.stopping:
            self._wake.wait(self._interval_s * random.uniform(0.9, 1.1))  # noqa: S311 -- jitter, no secret
            self._wake.clear()
            if not self.stopping:
                self.attempt(self.round)
        self.attempt(self.finish)

    def attempt(self, work: Callable[[], None]) -> None:
        """Call ``work`` under the fork lock; an exception is logged, not raised."""
        with self.fork_lock:
            try:
                work()
            except Exception as exc:  # noqa: BLE001 -- a round may fail, the thread may not
                if time.monotonic() >= self._log_at:
                    self._log_at = time.monotonic() + _LOG_AGAIN_S
                    self._log.warning(self._failed, error=type(exc).__name__)
            else:
                self._log_at = 0.0

    def wake(self) -> None:
        """Begin the next round now."""
        self._wake.set()

    def stop(self, wait_s: float = 0.0) -> None:
        """Start no further round, and wait at most ``wait_s`` seconds for the thread to end.

        With ``wait_s`` 0 a signal handler may call it.
        """
        self.stopping = True
        self._wake.set()
        if wait_s and self.is_alive():
            self.join(wait_s)
