"""Periodic work of an audit log, in a thread: checkpoints, anchors, copies, removal of old segments.

No record waits for this work, and the chain is sound without it. Segments are removed in the order in which
they were opened, so one time (the horizon) says which are gone, and the last record of a removal replaces all
earlier ones.
"""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

import structlog

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.log import AuditLog
from kms_core.audit.segments import Segment
from kms_core.audit.sinks import AuditSink
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_protocol.errors import AuditUnavailable

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
    """The signed records of removals in a segment; none if it is gone, empty or unreadable.

    Reads line by line: others may write lines of any length, and cut the file while it is read.
    """
    before = line = b""
    with suppress(OSError), segments.opened(path) as file:
        for following in segments.lines_of(file):
            if _MARK in line and (found := _signed_removal(before, line, following, keys)):
                yield found
            before, line = line, following


def _signed_removal(before: bytes, line: bytes, following: bytes, keys: PublicKeys) -> ChainLine | None:
    """A line, if the next line signs it: a removal is signed in the same step."""
    signed, head, head_before = keys.signed(following), chain.claimed_head(line), chain.claimed_head(before)
    if signed is None or head is None or head_before is None or not chain.is_sound(head_before, line):
        return None
    return chain.read(line) if chain.from_hex(signed.previous) == head else None


EVERY_S: Final = 1.0
_STOP_S: Final = 2.0
_REMOVE_EVERY_S: Final = 3600.0
_READ_BYTES: Final = 1024 * 1024
_GONE: Final = frozenset({errno.ENOENT, errno.EINVAL})  # the latter for what is no file any more
_log = structlog.get_logger(__name__)


class AuditMaintenance(PeriodicThread):
    """Maintains the log of this process every second. ``stop`` closes its chain."""

    def __init__(
        self,
        audit_log: AuditLog,
        anchors: Sequence[AuditSink] = (),
        copies: Sequence[AuditSink] = (),
        keep_days: int = 0,
    ) -> None:
        """``keep_days`` 0 keeps all segments."""
        super().__init__("audit-maintenance", EVERY_S, failed="audit.round_failed")
        self._audit_log = audit_log
        self._feeds = [
            *(_Feed(sink, "anchors", _LastSigned(audit_log)) for sink in anchors),
            *(_Feed(sink, "lines", _AllLines(audit_log)) for sink in copies),
        ]
        self._keep_days = keep_days
        self._removed_at = -_REMOVE_EVERY_S

    def stop(self, wait_s: float = _STOP_S) -> None:
        """Close the chain, and wait at most ``wait_s`` seconds for its last lines to reach the sinks."""
        self._audit_log.close()
        super().stop(wait_s)

    def round(self) -> None:
        self._audit_log.checkpoint_if_due()
        self.finish()
        if self._keep_days and time.monotonic() - self._removed_at >= _REMOVE_EVERY_S:
            self._removed_at = time.monotonic()
            self._remove_old()

    def finish(self) -> None:
        """Send waiting lines to all sinks."""
        for feed in self._feeds:
            feed.send()

    def _remove_old(self) -> None:
        """Remove old segments, after the record of the removal: a missing segment without one was stolen."""
        gone, horizon = due_segments(self._audit_log.folder, self._keep_days, datetime.now(UTC))
        if not gone:
            return
        self._audit_log.record_removal(horizon, len(gone))
        for segment in gone:
            with suppress(FileNotFoundError):
                segment.path.unlink()
        _log.info("audit.retired", files=len(gone), before=horizon)


class _LineSource(Protocol):
    """Lines for a sink."""

    def waiting(self) -> list[bytes]:
        """The next lines, each with its newline; the same lines until ``sent``."""

    def sent(self) -> None:
        """Mark the lines that ``waiting`` returned last as stored."""


class _Feed:
    """Sends the lines of a source to a sink; lines that a sink does not take are sent again next time."""

    def __init__(self, sink: AuditSink, what: str, source: _LineSource) -> None:
        self._sink = sink
        self._what = what
        self._source = source
        self._works = True

    def send(self) -> None:
        """Send all waiting lines. Logs when the sink begins or ceases to fail."""
        works = True
        while works and (lines := self._source.waiting()):
            try:
                self._sink.put(lines)
                self._source.sent()
            except (OSError, AuditUnavailable):
                works = False
            result = "ok" if works else "failed"
            metrics.AUDIT_COPIES.labels(self._sink.name, self._what, result).inc(len(lines))
        if works != self._works:
            self._works = works
            log, event = (_log.info, "audit.place_back") if works else (_log.warning, "audit.place_away")
            log(event, place=self._sink.name, what=self._what)


class _LastSigned:
    """The last signed line: it vouches for all lines before it, so that older ones need not be sent."""

    def __init__(self, audit_log: AuditLog) -> None:
        self._audit_log = audit_log
        self._waiting = self._sent = b""

    def waiting(self) -> list[bytes]:
        self._waiting = self._audit_log.last_signed
        return [self._waiting] if self._waiting != self._sent else []

    def sent(self) -> None:
        self._sent = self._waiting


class _AllLines:
    """Every line once, read back from the segments, which buffer the lines while a sink fails."""

    def __init__(self, audit_log: AuditLog) -> None:
        self._audit_log = audit_log
        self._chain, self._number, self._offset, self._read_bytes = "", 0, 0, 0

    def waiting(self) -> list[bytes]:
        name, newest = self._audit_log.position
        if newest and name != self._chain:
            self._chain, self._number, self._offset = name, 1, 0
        while self._number:
            lines = self._read()
            self._read_bytes = len(lines)
            if lines:
                return [line + b"\n" for line in lines.split(b"\n")[:-1]]
            if self._number >= newest:
                break
            self._number, self._offset = self._number + 1, 0
        return []

    def sent(self) -> None:
        self._offset += self._read_bytes

    def _read(self) -> bytes:
        """Whole lines from the offset on; empty at the end, or if the segment is gone."""
        path = segments.path_of(self._audit_log.folder, self._chain, self._number)
        try:
            with segments.opened(path) as file:
                data = os.pread(file.fileno(), _READ_BYTES, self._offset)
        except OSError as exc:
            if exc.errno in _GONE:
                return b""
            raise
        return data[: data.rfind(b"\n") + 1]
