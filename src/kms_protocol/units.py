"""Times, sizes and durations as text: what the API, files and commands write and accept.

A time is RFC 3339 with an offset, and in UTC with a final Z when it is written. A size is in bytes, and is
written with binary units. A duration that is read is a number and s, m, h or d.
"""

import re
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB
_EXAMPLE: Final = "as 2027-01-31T12:00:00Z"
_DURATION: Final = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_NAMES: Final = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_LENGTHS_S: Final = {"days": 86_400, "hours": 3600, "minutes": 60}


def time_text(at: datetime | float, precision: str = "seconds") -> str:
    """Write a time: a datetime with an offset, or epoch seconds. ``precision`` is isoformat's ``timespec``.

    Raises ValueError, OverflowError or OSError for seconds that no datetime can hold.
    """
    moment = at.astimezone(UTC) if isinstance(at, datetime) else datetime.fromtimestamp(at, UTC)
    return moment.isoformat(timespec=precision).removesuffix("+00:00") + "Z"


def parse_time(text: str) -> datetime:
    """Read a time. Raises ValueError, whose text continues a sentence that begins with a name."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"must be an RFC 3339 time, {_EXAMPLE}") from None
    if moment.tzinfo is None:
        raise ValueError(f"needs an offset, {_EXAMPLE}")
    return moment


def time_or_none(text: str) -> datetime | None:
    """Read a time, or return None for any other text."""
    try:
        return parse_time(text)
    except ValueError:
        return None


def age_s(text: str) -> float:
    """Return the seconds since a time, negative before it. Raises ValueError."""
    return (datetime.now(UTC) - parse_time(text)).total_seconds()


def retry_after_s(text: str) -> float | None:
    """Read the seconds of a Retry-After header (RFC 9110 §10.2.3: a number or a date); None if unusable."""
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def size_text(size_bytes: float) -> str:
    """Write a size with one decimal in its largest binary unit: ``512 B``, ``1.5 MiB``."""
    if size_bytes < KiB:
        return f"{size_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size_bytes /= KiB
        if size_bytes < KiB:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / KiB:.1f} TiB"


def duration_text(seconds: float) -> str:
    """Write a duration in the largest unit of which it has at least two: ``36 hours``, ``0 seconds``."""
    for name, length_s in _LENGTHS_S.items():
        if seconds >= 2 * length_s:
            return f"{seconds // length_s:.0f} {name}"
    return "1 second" if 1 <= seconds < 2 else f"{seconds:.0f} seconds"  # noqa: PLR2004 -- the singular


def parse_duration(text: str) -> timedelta:
    """Read a duration, as 90s, 30m, 12h or 30d. Raises ValueError for anything else."""
    found = _DURATION.fullmatch(text)
    if not found:
        raise ValueError("takes a number and s, m, h or d, as 12h or 30d")
    return timedelta(**{_NAMES[found[2]]: int(found[1])})
