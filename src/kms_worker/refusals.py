"""Refused messages: counted, and logged within a bound."""

import math
import re
import time
from collections.abc import Callable
from typing import Final

import structlog

from kms_core.observability import metrics

TASK_ID: Final = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)
LOG_WINDOW_S: Final = 60.0
LOG_LINES: Final = 3
"""Lines of a kind in a window; the next line after says how many were left out."""
_log = structlog.get_logger(__name__)


class LogBound:
    """Lets few lines of a kind into the log, whatever the rate of events. One for each process."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, ...], tuple[float, int, int]] = {}
        """By kind: when its window began, the lines since then, the events that got no line."""

    def passes(self, *kind: str) -> int:
        """Count an event; returns the number of events for a log line, 0 for none."""
        now = time.monotonic()
        begin, lines, unlogged = self._windows.get(kind, (-math.inf, 0, 0))
        if now - begin >= LOG_WINDOW_S:
            begin, lines = now, 0
        logged = unlogged + 1 if lines < LOG_LINES else 0
        self._windows[kind] = (begin, lines + bool(logged), 0 if logged else unlogged + 1)
        return logged


class Refusals:
    """Refusals that one process has counted."""

    def __init__(self, beat: Callable[[], None] = lambda: None) -> None:
        """``beat`` is called for each message: to refuse one is work."""
        self._beat = beat
        self._bound = LogBound()

    def refuse(self, queue: str, code: str, task_id: object = "", event: str = "message.refused") -> None:
        """Record that a message was dropped for ``code``, a word of a bounded set.

        The sender chose ``task_id``: it is logged if it is a printable text without spaces.
        """
        self._beat()
        metrics.MESSAGES_REFUSED.labels(queue, code).inc()
        if count := self._bound.passes(queue, code):
            named = task_id if isinstance(task_id, str) and TASK_ID.fullmatch(task_id) else ""
            _log.warning(event, queue=queue, code=code, count=count, task_id=named)
