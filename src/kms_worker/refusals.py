"""Refused broker messages: counted, logged within bounds, and set aside if they were submissions."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import redis
import structlog

from kms_core.jobs.store import set_aside
from kms_core.observability import metrics
from kms_protocol.errors import JobsUnavailable

LOG_WINDOW_S: Final = 60.0
LOG_LINES: Final = 3
"""Lines of a kind in a window; the next line after says how many were left out."""
_KEEP_AGAIN_S: Final = 10.0  # after Redis did not answer: refusing must stay fast without it
_log = structlog.get_logger(__name__)


class LogBound:
    """Lets few lines of a kind into the log, whatever the rate of events. One for each process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[tuple[str, ...], _Window] = {}

    def passes(self, *kind: str) -> int:
        """Count an event: the number of events that a line should tell of, 0 for no line."""
        return self._windows.setdefault(kind, _Window()).passes(self._clock())


class Refusals:
    """Those of one process."""

    def __init__(
        self,
        client: Callable[[], redis.Redis],
        clock: Callable[[], float] = time.monotonic,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """``client`` is asked for the Redis of jobs when a message is to be set aside.

        ``beat`` is called for each message: to refuse one is work.
        """
        self._client = client
        self._beat = beat
        self._clock = clock
        self._bound = LogBound(clock)
        self._keep_from = 0.0

    def refuse(
        self, queue: str, code: str, message: bytes | str, task_id: str = "", event: str = "message.refused"
    ) -> None:
        """Record that ``message`` is dropped for ``code``, a word of a bounded set. Raises nothing."""
        self._beat()
        metrics.MESSAGES_REFUSED.labels(queue, code).inc()
        if count := self._bound.passes(queue, code):
            _log.warning(event, queue=queue, code=code, count=count)
        if queue == set_aside.QUEUE and self._clock() >= self._keep_from:
            self._keep(set_aside.describe(time.time(), code, task_id, message))

    def _keep(self, entry: set_aside.SetAside) -> None:
        try:
            set_aside.add(self._client(), entry)
        except JobsUnavailable:
            self._keep_from = self._clock() + _KEEP_AGAIN_S


@dataclass(slots=True)
class _Window:
    """Counts of lines of one kind since ``begin``, and of events that got no line."""

    begin: float = -math.inf
    lines: int = 0
    unsaid: int = 0

    def passes(self, now: float) -> int:
        self.unsaid += 1
        if now - self.begin >= LOG_WINDOW_S:
            self.begin, self.lines = now, 0
        if self.lines >= LOG_LINES:
            return 0
        self.lines += 1
        told, self.unsaid = self.unsaid, 0
        return told
