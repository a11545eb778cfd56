"""Pages of operations out of a trail, in the order of their times, by filter and cursor. Checks no chain.

A process stamps and writes a record in one go, so a record older than some seconds has none before it that
is still to come. A cursor says up to when everything has been seen, and of later records how far each chain.
"""

import base64
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice, takewhile
from pathlib import Path
from typing import Final

import msgspec

from kms_core.audit import segments
from kms_core.audit.retention import text_of
from kms_core.audit.segments import Segment
from kms_protocol.errors import InvalidRequest
from kms_protocol.wire import NOT_JSON

SETTLED_S: Final = 5.0
MOST_SCANNED: Final = 20_000
_NOT_OK: Final = "failed"
_LONGEST_CURSOR: Final = 16 * 1024
_LATEST: Final = "9999"


class RecordedOperation(msgspec.Struct, frozen=True, kw_only=True):
    """An operation as it was recorded. Other lines of a chain have none."""

    seq: int
    chain: str
    time: str
    kind: str = ""
    operation: str = ""
    stage: str = ""
    effect: str = ""
    route: str = ""
    filter: str = ""
    source: str = ""
    principal: str = ""
    tenant: str = ""
    credential: str = ""
    request_id: str = ""
    job_id: str = ""
    key_id: str = ""
    key_version: str = ""
    backend: str = ""
    origin: str = ""
    context: dict[str, str] = {}
    new_context: dict[str, str] = {}
    bytes_in: int = 0
    bytes_out: int = 0
    result: str = ""
    duration_us: int = 0
    count: int = 0

    @property
    def id(self) -> str:
        return f"{self.chain}:{self.seq}"

    @property
    def order(self) -> tuple[str, str, int]:
        return self.time, self.chain, self.seq


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """What an event must be. ``equal`` are fields and their values; ``result`` may be ``failed``: any but ok.

    ``context`` are keyed hashes as records hold them; ``since`` and ``until`` are times as records hold them.
    """

    equal: tuple[tuple[str, str], ...] = ()
    result: str = ""
    context: tuple[tuple[str, str], ...] = ()
    since: str = ""
    until: str = ""

    def takes(self, event: RecordedOperation) -> bool:
        if any(getattr(event, name) != value for name, value in self.equal):
            return False
        if (
            self.result
            and event.result != self.result
            and not (self.result == _NOT_OK and event.result not in {"", "ok"})
        ):
            return False
        if any(event.context.get(name) != value for name, value in self.context):
            return False
        return not self.until or event.time < self.until


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events, oldest first; ``following`` is the cursor behind them, ``more`` whether it leads on at once."""

    events: list[RecordedOperation]
    following: str
    more: bool


class _SeenLine(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    seq: int
    time: str


class _Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All before ``time`` has been seen; of what is not older, each chain up to its number."""

    time: str = ""
    seen: dict[str, _SeenLine] = {}


_event: Final = msgspec.json.Decoder(RecordedOperation).decode


def now() -> str:
    """The time as records hold it."""
    return text_of(datetime.now(UTC))


def fields(event: RecordedOperation) -> dict[str, object]:
    """What is known of an event, by name."""
    found = {name: value for name, value in msgspec.structs.asdict(event).items() if value not in ("", {})}
    if not event.count:
        del found["count"]
    return found


def page(folder: Path, wanted: EventFilter, after: str | None, limit: int) -> EventPage:
    """The next events behind a cursor. Raises InvalidRequest for a cursor that no page gave.

    A page may hold fewer than ``limit`` events, or none, and lead on: one call reads a bounded part.
    """
    cursor = _parsed(after) if after else _Cursor(wanted.since)
    settled = text_of(datetime.now(UTC) - timedelta(seconds=SETTLED_S))
    found: list[RecordedOperation] = []
    seen, reached, more = dict(cursor.seen), settled, False
    for scanned, event in enumerate(_merged(folder, cursor)):
        if wanted.until and event.time >= wanted.until:
            break
        if len(found) == limit or scanned == MOST_SCANNED:
            more = True
            break
        seen[event.chain] = _SeenLine(event.seq, event.time)
        reached = event.time
        if wanted.takes(event):
            found.append(event)
    upto = max(cursor.time, min(reached, settled) if more else settled)
    following = _Cursor(upto, {name: last for name, last in seen.items() if last.time >= upto})
    return EventPage(found, _text(following), more)


def newest(folder: Path, wanted: EventFilter, limit: int, most: int | None = None) -> list[RecordedOperation]:
    """The last events, oldest first; of the last ``most`` records, if that is given."""
    chains = [_backwards(files) for files in segments.by_chain(folder).values()]
    events = heapq.merge(*chains, key=lambda each: each.order, reverse=True)
    fits = takewhile(lambda event: event.time >= wanted.since, islice(events, most))
    return list(islice(filter(wanted.takes, fits), limit))[::-1]


def _merged(folder: Path, cursor: _Cursor) -> Iterator[RecordedOperation]:
    chains = (_events(files, cursor) for files in segments.by_chain(folder).values())
    return heapq.merge(*chains, key=lambda each: each.order)


def _events(files: list[Segment], cursor: _Cursor) -> Iterator[RecordedOperation]:
    """What a chain holds behind the cursor."""
    if cursor.time and _last_time(files[-1]) < cursor.time:
        return
    last = cursor.seen.get(files[0].chain)
    for segment in _from(files, cursor.time):
        for line in _lines(segment.path, cursor.time):
            event = _read(line)
            if event is not None and (last is None or event.seq > last.seq):
                yield event


def _from(files: list[Segment], time: str) -> list[Segment]:
    """The files but those that another one follows whose lines are not after the time either."""
    first = len(files) - 1
    while first and time:
        opening = files[first].opening()
        if opening is not None and opening.time < time:
            break
        first -= 1
    return files[first if time else 0 :]


def _last_time(segment: Segment) -> str:
    """The time of its last line; later than any if that is not known."""
    try:
        found = segment.path.stat()
    except OSError:
        return _LATEST
    return _last_time_of(segment, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _last_time_of(segment: Segment, size: int, mtime_ns: int) -> str:
    """Asked anew only for files that have changed: those of live processes."""
    del size, mtime_ns
    last = segment.last()
    return last.time if last else _LATEST


def _lines(path: Path, time: str) -> Iterator[bytes]:
    """The whole lines from a time on."""
    try:
        with path.open("rb") as file:
            file.seek(segments.offset_of(file, lambda line: line.time >= time) if time else 0)
            while (line := file.readline(segments.LONGEST_LINE_BYTES)).endswith(b"\n"):
                yield line
    except FileNotFoundError:  # retired meanwhile
        return


def _backwards(files: list[Segment]) -> Iterator[RecordedOperation]:
    for segment in reversed(files):
        try:
            yield from filter(None, map(_read, segments.backwards(segment.path)))
        except FileNotFoundError:
            return


def _read(line: bytes) -> RecordedOperation | None:
    """None for a line that is none, and for those that are no operations."""
    try:
        event = _event(line)
    except NOT_JSON:
        return None
    return None if event.kind else event


def _text(cursor: _Cursor) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(cursor)).decode().rstrip("=")


def _parsed(text: str) -> _Cursor:
    try:
        return msgspec.json.decode(
            base64.b64decode(text[:_LONGEST_CURSOR] + "=" * (-len(text) % 4), b"-_", validate=True),
            type=_Cursor,
        )
    except (ValueError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("after is what the page before gave as next") from None
