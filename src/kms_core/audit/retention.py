"""Which files of a trail are old enough to go: the oldest ones, up to the first that is not.

Since files go in the order in which they were opened, one time says which are gone, and the last record of a
removal stands for all before it.
"""

import mmap
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.segments import Segment

_MARK: Final = b'"kind":"%b"' % chain.RETIRED.encode()  # in a string of a caller, quotes are escaped


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


def horizon(folder: Path, keys: PublicKeys) -> str:
    """The time up to which files may be gone by a removal on record; empty if none is.

    Reads the latest files first, and stops at those that are older than the newest record of a removal.
    A file that cannot be read has none. Raises OSError if the folder cannot.
    """
    newest: ChainLine | None = None
    for segment in sorted(segments.listed(folder), key=_last_time, reverse=True):
        if newest is not None and _last_time(segment) < newest.time:
            break
        for line in _removals(segment.path, keys):
            if newest is None or newest.before < line.before:
                newest = line
    return newest.before if newest else ""


def _last_time(segment: Segment) -> str:
    last = segment.last()
    return last.time if last else ""


def _removals(path: Path, keys: PublicKeys) -> Iterator[ChainLine]:
    """The signed records of removals in a file. A file that is gone, empty or unreadable has none."""
    with (
        suppress(OSError, ValueError),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole,
    ):
        at = whole.find(_MARK)
        while at >= 0:
            found = _signed_removal(whole, at, keys)
            if found is not None:
                yield found
            at = whole.find(_MARK, at + 1)


def _signed_removal(whole: mmap.mmap, at: int, keys: PublicKeys) -> ChainLine | None:
    """The line around ``at``, if the next one signs it: a removal is signed in the same step."""
    begin, end = whole.rfind(b"\n", 0, at) + 1, whole.find(b"\n", at)
    until = whole.find(b"\n", end + 1)
    if end < 0 or until < 0:
        return None
    line, signed = whole[begin:end], keys.signed(whole[end + 1 : until])
    head = chain.claimed_head(line)
    before = chain.claimed_head(whole[max(0, begin - chain.TAIL_BYTES - 1) : max(0, begin - 1)])
    if signed is None or head is None or before is None or not chain.is_sound(before, line):
        return None
    return chain.read(line) if chain.octets(signed.previous) == head else None


def text_of(at: datetime) -> str:
    """As lines write it."""
    return at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
