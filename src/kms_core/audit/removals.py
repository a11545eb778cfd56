"""Removal of old segments: which are due, and which are gone by the signed records of the log.

Segments are removed in the order in which they were opened, so one time (the horizon) says which are gone,
and the last record of a removal replaces all earlier ones.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.segments import Segment

_MARK: Final = b'"kind":"%b"' % chain.RETIRED.encode()  # in a string of a caller, quotes are escaped


def due_segments(folder: Path, keep_days: int, now: datetime) -> tuple[list[Segment], str]:
    """The segments to remove, and the horizon: the time at which the last of them was opened."""
    cutoff = chain.text_of(now - timedelta(days=keep_days))
    opened = [(line.time, segment) for segment in segments.listed(folder) if (line := segment.opening())]
    gone: list[Segment] = []
    horizon = ""
    for opened_at, segment in sorted(opened):
        last = segment.last()
        if last is None or last.time >= cutoff or opened_at >= cutoff or segments.is_live(segment.path):
            break
        gone.append(segment)
        horizon = opened_at
    return gone, horizon


def removal_horizon(folder: Path, keys: PublicKeys) -> str:
    """The horizon of the recorded removals: segments opened up to it may be gone. Empty without a removal.

    Reads the latest segments first, and stops at those older than the newest record of a removal. Unreadable
    segments are left out. Raises OSError if the folder cannot be read.
    """
    newest: ChainLine | None = None
    for segment in sorted(segments.listed(folder), key=_last_time, reverse=True):
        if newest is not None and _last_time(segment) < newest.time:
            break
        found = filter(None, (newest, *_removals(segment.path, keys)))
        newest = max(found, key=lambda line: line.before, default=None)
    return newest.before if newest else ""


def _last_time(segment: Segment) -> str:
    return last.time if (last := segment.last()) else ""


def _removals(path: Path, keys: PublicKeys) -> Iterator[ChainLine]:
    """The signed records of removals in a segment; none if it is gone, empty or unreadable."""
    before = line = b""
    with suppress(OSError):
        for following in segments.lines_of(path):
            if _MARK in line and (found := _signed_removal(before, line, following, keys)):
                yield found
            before, line = line, following


def _signed_removal(before: bytes, line: bytes, following: bytes, keys: PublicKeys) -> ChainLine | None:
    """A line, if the next line signs it: a removal is signed in the same step."""
    signed, head, head_before = keys.signed(following), chain.claimed_head(line), chain.claimed_head(before)
    if signed is None or head is None or head_before is None or not chain.is_sound(head_before, line):
        return None
    return chain.read(line) if chain.from_hex(signed.previous) == head else None
