"""Periodic work of an audit log, in a thread: checkpoints, anchors in their sinks, removal of old segments.

No record waits for this work, and the chain is sound without it.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

import redis
import structlog

from kms_core.audit.keys import Concealer, OpenSealed, Signer
from kms_core.audit.log import AuditLog
from kms_core.audit.removals import due_segments
from kms_core.audit.sinks import AuditSink, anchor_sinks
from kms_core.periodic import PeriodicThread
from kms_core.settings.model import Settings
from kms_protocol.errors import AuditUnavailable

EVERY_S: Final = 1.0
_STOP_S: Final = 2.0
_REMOVE_EVERY_S: Final = 3600.0
_log = structlog.get_logger(__name__)


class AuditMaintenance(PeriodicThread):
    """Maintains the log of this process every second. ``stop`` closes its chain."""

    begun: Callable[[], object] | None = None
    """If set, the first round begins the chain and calls this: then an install without calls has anchors."""

    def __init__(
        self,
        audit_log: AuditLog,
        anchors: Sequence[AuditSink] = (),
        keep_days: int = 0,
    ) -> None:
        """``keep_days`` 0 keeps all segments."""
        super().__init__("audit-maintenance", EVERY_S, failed="audit.round_failed")
        self._audit_log = audit_log
        self._sinks = anchors
        self._sent: dict[str, bytes] = {}
        self._away: set[str] = set()
        self._keep_days = keep_days
        self._removed_at = -_REMOVE_EVERY_S

    def stop(self, wait_s: float = _STOP_S) -> None:
        """Close the chain, and wait at most ``wait_s`` seconds for its last anchor to reach the sinks."""
        self._audit_log.close()
        super().stop(wait_s)

    def round(self) -> None:
        if self.begun:
            self._audit_log.begin()
            self.finish()
            self.begun()
            self.begun = None
        self._audit_log.checkpoint_if_due()
        self.finish()
        if self._keep_days and time.monotonic() - self._removed_at >= _REMOVE_EVERY_S:
            self._removed_at = time.monotonic()
            self._remove_old()

    def finish(self) -> None:
        """Send the newest anchor to all sinks."""
        for sink in self._sinks:
            self._send(sink)

    def _send(self, sink: AuditSink) -> None:
        """Send the last signed line to a sink, again each time until the sink takes it.

        It vouches for all lines before it, so that older ones need not be sent. Logs when the sink begins or
        ceases to fail.
        """
        line, works = self._audit_log.last_signed, True
        if line == self._sent.get(sink.name, b""):
            return
        try:
            sink.put(line)
            self._sent[sink.name] = line
        except (OSError, AuditUnavailable):
            works = False
        if works == (sink.name in self._away):
            self._away ^= {sink.name}
            log, event = (_log.info, "audit.place_back") if works else (_log.warning, "audit.place_away")
            log(event, place=sink.name)

    def _remove_old(self) -> None:
        """Remove old segments, and record that before: one that is missing without a record is a problem."""
        gone, horizon = due_segments(self._audit_log.folder, self._keep_days, datetime.now(UTC))
        if not gone:
            return
        self._audit_log.record_removal(horizon, len(gone))
        for segment in gone:
            with suppress(FileNotFoundError):
                segment.path.unlink()
        _log.info("audit.retired", files=len(gone), before=horizon)


def build_audit(
    settings: Settings, role: str, client: redis.Redis | None, open_sealed: OpenSealed
) -> tuple[AuditLog, AuditMaintenance]:
    """Create the keys and the directory of anchors if they do not exist. Raises ConfigurationError.

    ``client`` None: no sink in Redis. ``open_sealed`` opens sealed key files.
    """
    section, strict = settings.kms.audit, settings.is_prod
    concealer = Concealer.at(section.key_path, strict=strict, open_sealed=open_sealed)
    signer = Signer.at(section.signing_key_path, strict=strict, open_sealed=open_sealed)
    audit_log = AuditLog(section, role, concealer, signer)
    return audit_log, AuditMaintenance(audit_log, anchor_sinks(settings, client), section.keep_days)
