"""Ends a worker that runs and takes nothing: messages wait, and none of its processes claims or renews.

kombu and Celery have several ways to end up so after a broker restart, none of which raises. The cure is
to leave: the supervisor starts the worker again, and its jobs are in their records.
"""

import os
import time
from collections.abc import Callable
from typing import Final

import structlog

from kms_core.periodic import PeriodicThread
from kms_protocol.errors import JobsUnavailable

EXIT_IDLE: Final = 70  # EX_SOFTWARE
_LOOK_EVERY_S: Final = 5.0
_log = structlog.get_logger(__name__)


class Watchdog(PeriodicThread):
    """Leaves with exit code 70 when messages have waited, and the worker been idle, for ``patience_s``."""

    def __init__(
        self,
        patience_s: float,
        can_take: Callable[[], bool],
        idle_s: Callable[[], float],
    ) -> None:
        super().__init__("watchdog", min(_LOOK_EVERY_S, patience_s / 4), failed="watchdog.failed")
        self._patience_s = patience_s
        self._can_take = can_take
        self._idle_s = idle_s
        self._served_at = time.monotonic()

    def round(self) -> None:
        before, self._served_at = self._served_at, time.monotonic()
        if self._takes_nothing():  # a look that fails counts as one at a worker that takes jobs
            self._served_at = before
        if time.monotonic() - self._served_at > self._patience_s:
            _log.error("worker.takes_nothing", waited_s=round(time.monotonic() - self._served_at))
            os._exit(EXIT_IDLE)  # no shutdown: whatever hangs would hang it, and no job is in hand

    def _takes_nothing(self) -> bool:
        """Return whether jobs or messages wait and nothing was claimed for long. False without Redis."""
        try:
            return self._can_take() and self._idle_s() > self._patience_s
        except JobsUnavailable:
            return False
