"""A line of progress on stderr, for people: nothing is shown unless stderr is a terminal."""

import sys
import time
from types import TracebackType
from typing import Final, Self

from kms_cli import terminal

BAR: Final = 24
EVERY_S: Final = 0.1


class Meter:
    """One line that is drawn over itself, and gone at the end."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._drawn_at = 0.0
        self._label = ""
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def show(self, label: str, done: int, total: int | None) -> None:
        """Draw, at most ten times a second. ``done`` and ``total`` are bytes."""
        now = time.monotonic()
        if label != self._label:
            self._label, self._began, self._drawn_at = label, now, 0.0
        if not self._shown or now - self._drawn_at < EVERY_S:
            return
        self._drawn_at = now
        rate = done / (now - self._began) if now > self._began else 0.0
        sys.stderr.write(f"\r\x1b[K{label} {_bar(done, total)} {terminal.size(rate)}/s")
        sys.stderr.flush()


def _bar(done: int, total: int | None) -> str:
    if not total:
        return terminal.size(done)
    part = min(1.0, done / total)
    filled = round(part * BAR)
    return f"[{'#' * filled}{'.' * (BAR - filled)}] {part:4.0%} of {terminal.size(total)}"
