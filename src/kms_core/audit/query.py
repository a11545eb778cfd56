"""Pages of recorded operations, in the order of their times, by filter and cursor. Verifies no chain.

A process takes the time of a record and writes it in one step, so no record will appear before one that is
some seconds old. A cursor holds a time before which all records were read, and the last record of each chain
after it; both for each host, since records of a copy appear later.
"""

import base64
import heapq
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice, repeat, takewhile
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from kms_core.audit import AuditRecord, segments
from kms_core.audit.chain import text_of
from kms_core.audit.hosts import HostLog, complete_to
from kms_core.audit.segments import Segment
from kms_protocol.errors import InvalidRequest
from kms_protocol.wire import NOT_JSON

SETTLED_S: Final = 5.0
MOST_SCANNED: Final = 20_000
SEARCH_S: Final = 2.0
"""The longest search for the first event of a page, in seconds."""
_NOT_OK: Final = "failed"
_LONGEST_CURSOR: Final = 16 * 1024
_LATEST: Final = "9999"
_MOST_SEEN: Final = 100
"""Chains of copies in a cursor; of more, those with the oldest lines are taken as complete."""


class RecordedOperation(AuditRecord, kw_only=True):
    """The record of an operation, as read back. Other lines of a chain have a ``kind``.

    ``host`` is the host of its log, empty where only one log is read; records have no such field.
    """

    seq: int
    chain: str
    time: str
    kind: str = ""
    operation: str = ""
    principal: str = ""
    tenant: str = ""
    credential: str = ""
    host: str = ""

    @property
    def id(self) -> str:
        return f"{self.chain}:{self.seq}"

    @property
    def order(self) -> tuple[str, str, str, int]:
        return self.time, self.host, self.chain, self.seq


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Conditions that an event must meet. ``equal`` has fields and their values.

    ``result`` may be ``failed``, which is any but ``ok``. ``context`` has keyed hashes, ``since`` and
    ``until`` have times in the format of records.
    """

    equal: tuple[tuple[str, str], ...] = ()
    result: str = ""
    context: tuple[tuple[str, str], ...] = ()
    since: str = ""
    until: str = ""

    def matches(self, event: RecordedOperation) -> bool:
        for name, value in self.equal:
            if getattr(event, name) != value:
                return False
        if self.result not in {"", event.result} and (self.result != _NOT_OK or event.result in {"", "ok"}):
            return False
        for name, value in self.context:
            if event.context.get(name) != value:
                return False
        return not self.until or event.time < self.until


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events, oldest first; ``following`` is the cursor after them, ``more`` whether others exist already.

    ``unread`` has the reason for each host whose copy could not be read.
    """

    events: list[RecordedOperation]
    following: str
    more: bool
    unread: Mapping[str, str]


class _SeenLine(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    seq: int
    time: str


class _Position(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All records before ``time`` were read, and of later ones those of each chain up to ``seen``."""

    time: str = ""
    seen: dict[str, _SeenLine] = {}


_Cursor: TypeAlias = dict[str, _Position]
"""The positions in logs by host; that in this host's own log has an empty name."""
_event: Final = msgspec.json.Decoder(RecordedOperation).decode


def fields(event: RecordedOperation) -> dict[str, object]:
    """The fields of an event that are not empty, by name."""
    given = msgspec.structs.asdict(event)
    order = dict.fromkeys(("seq", "chain", "time", *given))
    found = {name: given[name] for name in order if given[name] not in ("", {})}
    if not event.count:
        del found["count"]
    return found


def page(logs: Sequence[HostLog], wanted: EventFilter, after: str | None, limit: int) -> EventPage:
    """The next events after a cursor. Raises InvalidRequest for a cursor that is not from a page.

    A page may hold fewer than ``limit`` events although others follow: a call reads a bounded number, or
    while it finds none for at most ``SEARCH_S``.
    """
    until = time.monotonic() + SEARCH_S
    cursor = _parsed(after) if after else {}
    positions = {each.host: cursor.get(_place(each)) or _Position(wanted.since) for each in logs}
    chains = [(each, files) for each in logs for files in segments.by_chain(each.folder).values()]
    final_before = {each.host: _final_before(each, chains) for each in logs}
    seen = {host: dict(position.seen) for host, position in positions.items()}
    unread: dict[str, str] = {}
    found: list[RecordedOperation] = []
    reached, more = _LATEST, False
    events = (_events(each, files, positions[each.host], unread) for each, files in chains)
    for scanned, event in enumerate(heapq.merge(*events, key=lambda each: each.order)):
        if wanted.until and event.time >= wanted.until:
            break
        is_enough = scanned >= MOST_SCANNED and (found or time.monotonic() > until)
        if len(found) == limit or is_enough:
            more = True
            break
        seen[event.host][event.chain] = _SeenLine(event.seq, event.time)
        reached = event.time
        if wanted.matches(event):
            found.append(event)
    for each in logs:
        host = each.host
        upto = max(positions[host].time, "" if host in unread else final_before[host])
        if more:
            upto = max(positions[host].time, min(reached, upto))
        position = _Position(upto, {name: last for name, last in seen[host].items() if last.time >= upto})
        cursor[_place(each)] = _bounded(position) if each.is_copy else position
    return EventPage(found, _text(cursor), more, unread)


def newest(
    logs: Sequence[HostLog],
    wanted: EventFilter,
    limit: int,
    most: int | None = None,
    unread: dict[str, str] | None = None,
) -> list[RecordedOperation]:
    """The last events, oldest first; of the last ``most`` records only, if that is given.

    Adds to ``unread`` the reason for each host whose copy could not be read.
    """
    unread = {} if unread is None else unread
    chains = [
        _backwards(each, files, unread) for each in logs for files in segments.by_chain(each.folder).values()
    ]
    events = heapq.merge(*chains, key=lambda each: each.order, reverse=True)
    fits = takewhile(lambda event: event.time >= wanted.since, islice(events, most))
    return list(islice(filter(wanted.matches, fits), limit))[::-1]


def _place(log: HostLog) -> str:
    """The name of a log in cursors: a host's own log keeps its place when copies are added."""
    return log.host if log.is_copy else ""


def _final_before(log: HostLog, chains: Sequence[tuple[HostLog, list[Segment]]]) -> str:
    """The time before which no record will appear any more."""
    if not log.is_copy:
        return text_of(datetime.now(UTC) - timedelta(seconds=SETTLED_S))
    return complete_to(_last_time(files[-1]) for each, files in chains if each is log)


def _bounded(position: _Position) -> _Position:
    last = sorted(position.seen.items(), key=lambda each: each[1].time)[-_MOST_SEEN:]
    if len(last) == len(position.seen):
        return position
    return _Position(max(position.time, last[0][1].time), dict(last))


def _events(
    log: HostLog, files: list[Segment], position: _Position, unread: dict[str, str]
) -> Iterator[RecordedOperation]:
    """The operations of a chain after a position."""
    if position.time and _last_time(files[-1]) < position.time:
        return
    last = position.seen.get(files[0].chain)
    try:
        for segment in _from(files, position.time):
            for line in _lines(segment.path, position.time):
                event = _read(line, log.host)
                if event is not None and (last is None or event.seq > last.seq):
                    yield event
    except OSError as exc:
        _note(log, exc, unread)


def _note(log: HostLog, exc: OSError, unread: dict[str, str]) -> None:
    """Note that a copy cannot be read; the logs of other hosts are read all the same. Raises ``exc`` else."""
    if not log.is_copy:
        raise exc
    unread[log.host] = f"a file of the copy cannot be read ({exc.strerror})"


def _from(files: list[Segment], time: str) -> list[Segment]:
    """The segments without those at the beginning that end before the time."""
    for first in range(len(files) - 1 if time else 0, 0, -1):
        opening = files[first].opening()
        if opening is not None and opening.time < time:
            return files[first:]
    return files


def _last_time(segment: Segment) -> str:
    """The time of the last line; later than any time if it is not known."""
    with suppress(OSError):
        found = segment.path.stat()
        return _last_time_of(segment, found.st_size, found.st_mtime_ns)
    return _LATEST


@lru_cache(maxsize=4096)
def _last_time_of(segment: Segment, _size: int, _mtime_ns: int) -> str:
    """Return ``_last_time``, cached for a segment until it changes; only segments of live processes do."""
    last = segment.last()
    return last.time if last else _LATEST


def _lines(path: Path, time: str) -> Iterator[bytes]:
    """The lines of a segment from a time on."""
    with suppress(FileNotFoundError):  # it was removed in between
        begin = segments.offset_of(path, lambda line: line.time >= time) if time else 0
        yield from segments.lines_of(path, begin)


def _backwards(log: HostLog, files: list[Segment], unread: dict[str, str]) -> Iterator[RecordedOperation]:
    try:
        for segment in reversed(files):
            yield from filter(None, map(_read, segments.backwards(segment.path), repeat(log.host)))
    except FileNotFoundError:
        return
    except OSError as exc:
        _note(log, exc, unread)


def _read(line: bytes, host: str) -> RecordedOperation | None:
    """The operation in a line; None for other lines."""
    try:
        event = _event(line)
    except NOT_JSON:
        return None
    event.host = host  # the line may name another
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
        raise InvalidRequest("`after` must be the `next` of the page before") from None
