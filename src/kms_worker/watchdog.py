"""Notices a worker that lives and takes nothing: messages wait, and none of its processes claims or renews.

kombu and Celery have several ways to end up so after a broker restart, none of which raises. The cure is
to leave: the supervisor starts the worker anew, and its jobs are in their records.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog

from kms_core.jobs.model import QueuePriority
from kms_protocol.errors import JobsUnavailable
from kms_worker.refusals import LogBound

EXIT_DEAF: Final = 70  # EX_SOFTWARE
_LOOK_EVERY_S: Final = 5.0
_log = structlog.get_logger(__name__)


class Watchdog(threading.Thread):
    """Leaves with exit code 70 when messages have waited, and the worker been idle, for ``patience_s``."""

    def __init__(
        self,
        queues: Sequence[str],
        patience_s: float,
        waiting: Callable[[], Mapping[QueuePriority, int]],
        idle_s: Callable[[], float],
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._queues = queues
        self._patience_s = patience_s
        self._waiting = waiting
        self._idle_s = idle_s

    def run(self) -> None:
        since = time.monotonic()
        bound = LogBound()
        while True:
            time.sleep(min(_LOOK_EVERY_S, self._patience_s / 4))
            try:
                deaf = self._deaf()
            except Exception as exc:  # noqa: BLE001 -- a look may fail, the watchdog may not
                deaf = False
                if count := bound.passes():
                    _log.warning("watchdog.failed", error=type(exc).__name__, count=count)
            if not deaf:
                since = time.monotonic()
            elif time.monotonic() - since > self._patience_s:
                _log.error("worker.deaf", waited_s=round(time.monotonic() - since))
                os._exit(EXIT_DEAF)  # no shutdown: whatever hangs would hang it, and no job is in hand

    def _deaf(self) -> bool:
        """Messages wait and nothing was claimed for long. Without Redis there is nothing to be deaf to."""
        try:
            waiting = self._waiting()
            mine = any(count for (queue, _), count in waiting.items() if queue in self._queues)
            return mine and self._idle_s() > self._patience_s
        except JobsUnavailable:
            return False
