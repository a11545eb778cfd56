"""Periodic work of an audit log, in a thread: checkpoints, anchors, removal of old segments.

No record waits for this work, and the chain is sound without it. Segments are removed in the order in which
they were opened, so one time (the horizon) says which are gone, and the last record of a removal replaces all
earlier ones.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

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


EVERY_S: Final = 1.0
_STOP_S: Final = 2.0
_REMOVE_EVERY_S: Final = 3600.0
_log = structlog.get_logger(__name__)


class AuditMaintenance(PeriodicThread):
    """Maintains the log of this process every second. ``stop`` closes its chain."""

    def __init__(
        self,
        audit_log: AuditLog,
        anchors: Sequence[AuditSink] = (),
        keep_days: int = 0,
    ) -> None:
        """``keep_days`` 0 keeps all segments."""
        super().__init__("audit-maintenance", EVERY_S, failed="audit.round_failed")
        self._audit_log = audit_log
        self._feeds = [_AnchorFeed(sink, audit_log) for sink in anchors]
        self._keep_days = keep_days
        self._removed_at = -_REMOVE_EVERY_S

    def stop(self, wait_s: float = _STOP_S) -> None:
        """Close the chain, and wait at most ``wait_s`` seconds for its last anchor to reach the sinks."""
        self._audit_log.close()
        super().stop(wait_s)

    def round(self) -> None:
        self._audit_log.checkpoint_if_due()
        self.finish()
        if self._keep_days and time.monotonic() - self._removed_at >= _REMOVE_EVERY_S:
            self._removed_at = time.monotonic()
            self._remove_old()

    def finish(self) -> None:
        """Send the newest anchor to all sinks."""
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


class _AnchorFeed:
    """Sends the last signed line to a sink, again each time until the sink takes it.

    The last one vouches for all lines before it, so that older ones need not be sent.
    """

    def __init__(self, sink: AuditSink, audit_log: AuditLog) -> None:
        self._sink = sink
        self._audit_log = audit_log
        self._sent = b""
        self._works = True

    def send(self) -> None:
        """Send the line if it is new. Logs when the sink begins or ceases to fail."""
        line, works = self._audit_log.last_signed, True
        if line == self._sent:
            return
        try:
            self._sink.put(line)
            self._sent = line
        except (OSError, AuditUnavailable):
            works = False
        metrics.AUDIT_ANCHORS.labels(self._sink.name, "ok" if works else "failed").inc()
        if works != self._works:
            self._works = works
            log, event = (_log.info, "audit.place_back") if works else (_log.warning, "audit.place_away")
            log(event, place=self._sink.name)
