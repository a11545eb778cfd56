"""What happens beside a trail, in a thread: checkpoints in time, anchors, copies, removal of old files.

Nothing here holds up a record, and nothing here is needed for the chain to hold.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, Protocol

import structlog

from kms_core.audit import retention, segments
from kms_core.audit.log import AuditLog
from kms_core.audit.sinks import AuditSink
from kms_core.observability import metrics
from kms_protocol.errors import AuditUnavailable

EVERY_S: Final = 1.0
_STOP_S: Final = 2.0
_RETAIN_EVERY_S: Final = 3600.0
_PIECE_BYTES: Final = 1024 * 1024
_log = structlog.get_logger(__name__)


class AuditMaintenance(threading.Thread):
    """One round a second. ``start`` it in the process that appends, ``stop`` it for a closed chain."""

    def __init__(
        self,
        trail: AuditLog,
        anchors: Sequence[AuditSink] = (),
        copies: Sequence[AuditSink] = (),
        keep_days: int = 0,
    ) -> None:
        """``keep_days`` 0 removes nothing."""
        super().__init__(name="audit-keeper", daemon=True)
        self._trail = trail
        self._places = [
            *(_Telling(place, "anchors", _Newest(trail)) for place in anchors),
            *(_Telling(place, "lines", _Lines(trail)) for place in copies),
        ]
        self._keep_days = keep_days
        self._retained_at = -_RETAIN_EVERY_S
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(EVERY_S):
            self.round()
        self._tell()

    def stop(self) -> None:
        """Close the chain, and wait a little for its last lines to reach the second places."""
        self._trail.close()
        self._stop_asked.set()
        if self.is_alive():
            self.join(_STOP_S)

    def round(self) -> None:
        """Once; never raises."""
        try:
            self._trail.tend()
            self._tell()
            if self._keep_days and time.monotonic() - self._retained_at >= _RETAIN_EVERY_S:
                self._retained_at = time.monotonic()
                self._retain()
        except Exception as exc:  # noqa: BLE001 -- a round may fail, the keeper may not
            _log.warning("audit.round_failed", error=type(exc).__name__)

    def _tell(self) -> None:
        for each in self._places:
            each.tell()

    def _retain(self) -> None:
        """The record of the removal comes first: a file that is missing without one was taken."""
        gone, horizon = retention.due(self._trail.folder, self._keep_days, datetime.now(UTC))
        if not gone:
            return
        self._trail.retired(horizon, len(gone))
        for segment in gone:
            with suppress(FileNotFoundError):
                segment.path.unlink()
        _log.info("audit.retired", files=len(gone), before=horizon)


class _CopySource(Protocol):
    """What a second place is to be told."""

    def waiting(self) -> list[bytes]:
        """The next lines, each with its newline; the same ones until they are ``told``."""

    def told(self) -> None: ...


class _Telling:
    """A second place and its source; a place that is away is told again next time."""

    def __init__(self, place: AuditSink, what: str, source: _CopySource) -> None:
        self._place = place
        self._what = what
        self._source = source
        self._works = True

    def tell(self) -> None:
        """All that waits. Whether the place takes it is said once, when that changes."""
        works = True
        while works and (lines := self._source.waiting()):
            try:
                self._place.put(lines)
                self._source.told()
            except (OSError, AuditUnavailable):
                works = False
            result = "ok" if works else "failed"
            metrics.AUDIT_COPIES.labels(self._place.name, self._what, result).inc(len(lines))
        if works != self._works:
            self._works = works
            log, event = (_log.info, "audit.place_back") if works else (_log.warning, "audit.place_away")
            log(event, place=self._place.name, what=self._what)


class _Newest:
    """The newest signed line: it stands for all before it, so older ones need not be told any more."""

    def __init__(self, trail: AuditLog) -> None:
        self._trail = trail
        self._waiting = self._told = b""

    def waiting(self) -> list[bytes]:
        self._waiting = self._trail.signed
        return [self._waiting] if self._waiting != self._told else []

    def told(self) -> None:
        self._told = self._waiting


class _Lines:
    """Every line once, read back from the files: they are the buffer while a place is away."""

    def __init__(self, trail: AuditLog) -> None:
        self._trail = trail
        self._chain, self._number, self._offset, self._piece = "", 0, 0, 0

    def waiting(self) -> list[bytes]:
        name, newest = self._trail.place
        if newest and name != self._chain:
            self._chain, self._number, self._offset = name, 1, 0
        while self._number:
            piece = self._read()
            self._piece = len(piece)
            if piece:
                return [line + b"\n" for line in piece.split(b"\n")[:-1]]
            if self._number >= newest:
                break
            self._number, self._offset = self._number + 1, 0
        return []

    def told(self) -> None:
        self._offset += self._piece

    def _read(self) -> bytes:
        """Whole lines from where the last piece ended; empty at the end, or if the file is gone."""
        path = segments.path_of(self._trail.folder, self._chain, self._number)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            piece = os.pread(fd, _PIECE_BYTES, self._offset)
        finally:
            os.close(fd)
        return piece[: piece.rfind(b"\n") + 1]
