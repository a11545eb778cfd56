"""The times of lines."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

_SECOND_NS: Final = 1_000_000_000


class LineClock:
    """The time of a line, UTC to the microsecond. It never goes back; a clock that did is told beside it."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._last = 0
        self._second, self._text = -1, b""

    def __call__(self) -> tuple[bytes, bytes]:
        """The time, and a field with what the clock says if that is a second or more behind."""
        now = self._clock()
        at = self._last = max(now, self._last)
        second, rest = divmod(at, _SECOND_NS)
        if second != self._second:
            self._second, self._text = second, _text(second)
        clock = b'"clock":"%b.%06dZ",' % _parts(now) if at - now >= _SECOND_NS else b""
        return b"%b.%06dZ" % (self._text, rest // 1000), clock


def _parts(at_ns: int) -> tuple[bytes, int]:
    second, rest = divmod(at_ns, _SECOND_NS)
    return _text(second), rest // 1000


def _text(second: int) -> bytes:
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds").removesuffix("+00:00").encode()
