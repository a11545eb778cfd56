"""Which files of a trail are old enough to go: the oldest ones, up to the first that is not.

Since files go in the order in which they were opened, one time says which are gone, and the last record of a
removal stands for all before it.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from kms_core.audit import segments
from kms_core.audit.segments import Segment


def due(folder: Path, keep_days: int, now: datetime) -> tuple[list[Segment], str]:
    """The segments to remove, and the time up to which files were opened that are gone then."""
    cutoff = text_of(now - timedelta(days=keep_days))
    opened = []
    for segment in segments.listed(folder):
        opening = segment.opening()
        if opening is not None:
            opened.append((opening.time, segment))
    gone: list[Segment] = []
    horizon = ""
    for time, segment in sorted(opened):
        last = segment.last()
        if last is None or last.time >= cutoff or time >= cutoff or segments.is_live(segment.path):
            break
        gone.append(segment)
        horizon = time
    return gone, horizon


def text_of(at: datetime) -> str:
    """As lines write it."""
    return at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
