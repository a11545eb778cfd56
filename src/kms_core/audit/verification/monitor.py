"""Verifies the log while it is written: new lines must follow known ones, and no segment may disappear.

It verifies the last MiB of each segment each time that it changed, so a change of the log while the service
runs is detected within half a minute, even by a holder of the signing key. Earlier changes, those far from
the end of a segment, and those among thousands of lines in that time are left to ``kms audit verify``.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import structlog

from kms_core.audit import segments
from kms_core.audit.chain import text_of
from kms_core.audit.keys import PublicKeys, public_path
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_core.audit.verification.anchors import AnchorReader
from kms_core.audit.verification.scan import ChainProblem, VerificationReport
from kms_core.audit.verification.verify import Verifier
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_protocol.errors import ConfigurationError

EVERY_S: Final = 30.0
_TAIL_BYTES: Final = segments.LONGEST_LINE_BYTES + 1  # of each segment: some 2,500 lines, in 15 ms
_MOST_PROBLEMS: Final = 20
_ANCHORED_WITHIN: Final = timedelta(minutes=1)
_NAN: Final = float("nan")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Condition:
    """The result so far. Problems stay until the process ends: an operator has to look at them.

    ``anchors`` are the problems that anchors prove; they end when the log has the missing lines, or the loss
    is acknowledged. ``not_compared`` has the sinks whose anchors cannot be compared, with the reason.
    ``unread`` is the reason why the log or a segment could not be read in the last round; empty if it could.
    ``read_at`` is the time of the last complete round in seconds since the epoch, 0 before the first;
    ``newest`` the time of the newest line read (RFC 3339), ``lines`` the number of lines that were verified.
    """

    problems: tuple[ChainProblem, ...] = ()
    read_at: float = 0.0
    newest: str = ""
    lines: int = 0
    anchors: tuple[ChainProblem, ...] = ()
    not_compared: Mapping[str, str] = field(default_factory=dict)
    unread: str = ""


class AuditMonitor(PeriodicThread):
    """Verifies the folder at once and then every 30 seconds, and sets metrics."""

    def __init__(
        self, folder: Path, signing_key: Path, anchors: Iterable[RedisSink | FolderSink] = ()
    ) -> None:
        """``anchors`` are the sinks whose anchors the log is compared with."""
        super().__init__("audit-monitor", EVERY_S, failed="audit.round_failed")
        self._folder = folder
        self._keys = public_path(signing_key)
        self._verifier = Verifier(folder, _TAIL_BYTES)
        self._anchors = [AnchorReader(sink) for sink in anchors]
        self.condition = Condition()
        metrics.AUDIT_CHAIN_OK.set(_NAN)
        for each in self._anchors:
            metrics.AUDIT_ANCHORS_OK.labels(each.name).set(_NAN)
        self.wake()  # the first round is at once

    def round(self) -> None:
        """Verify what is new. A failed read is repeated in the next round; ``read_at`` stays until then."""
        try:
            keys = PublicKeys.read(self._keys)
            for each in self._anchors:
                each.read(keys)  # first: the log has their lines by now
            anchors = {each.text: [*each.newest.values()] for each in self._anchors}
            report = self._verifier.verify(keys, anchors)
        except ConfigurationError as exc:
            self._publish(None, exc.detail)
        except OSError as exc:
            self._publish(None, f"{self._folder} cannot be read ({exc.strerror})")
        except Exception as exc:
            self._publish(None, f"{self._folder} cannot be read ({type(exc).__name__})")
            raise
        else:
            self._publish(report, self._verifier.unread)

    def _publish(self, report: VerificationReport | None, unread: str) -> None:
        """Set condition and metrics. Without a report, earlier problems stay and nothing else is known."""
        before, now = self.condition, time.time()
        problems = [problem for problem in report.problems if not problem.anchor] if report else []
        kept = tuple(dict.fromkeys((*before.problems, *problems)))[:_MOST_PROBLEMS]
        proven = tuple(self._proven(report)) if report else before.anchors
        not_compared = {each.name: why for each in self._anchors if (why := _why(each, report, unread))}
        self.condition = Condition(
            kept,
            before.read_at if unread else now,
            max([before.newest, *(each.last_time for each in report.chains)]) if report else before.newest,
            report.lines if report else 0,
            proven,
            not_compared,
            unread,
        )
        metrics.AUDIT_CHAIN_OK.set(0 if kept else _NAN if unread else 1)
        for each in self._anchors:
            is_older = any(problem.anchor == each.text for problem in proven)
            value = 0 if is_older else _NAN if each.name in not_compared else 1
            metrics.AUDIT_ANCHORS_OK.labels(each.name).set(value)
        if unread:
            _log.warning("audit.not_read_back", reason=unread)
        else:
            metrics.AUDIT_READ_AT.set(now)
        for problem in kept[len(before.problems) :]:
            _log.error("audit.broken", code=problem.code, chain=problem.chain, seq=problem.seq)
        for problem in proven:
            if problem not in before.anchors:
                _log_older(problem)

    def _proven(self, report: VerificationReport) -> Iterator[ChainProblem]:
        """The problems that anchors prove, at most 20 of each sink."""
        for each in self._anchors:
            gone = f"anchors in {each.text} are gone or older than before: they were removed or restored"
            lost = [ChainProblem("anchors_lost", gone, anchor=each.text)] if each.lost else []
            found = [problem for problem in report.problems if problem.anchor == each.text]
            yield from [*lost, *found][:_MOST_PROBLEMS]


def _why(anchors: AnchorReader, report: VerificationReport | None, unread: str) -> str:
    """The reason why the log is not compared with all anchors of a sink; empty if it is.

    A log without anchors is young for a minute after its first lines.
    """
    due = text_of(datetime.now(UTC) - _ANCHORED_WITHIN)
    if unread or report is None:
        return anchors.unread or unread
    is_signed = any(each.signed_seq >= 0 and each.first_time < due for each in report.chains)
    return anchors.unread or (report.not_compared.get(anchors.text, "") if is_signed else "")


def _log_older(problem: ChainProblem) -> None:
    _log.error(
        "audit.anchor_ahead",
        code=problem.code,
        place=problem.anchor,
        chain=problem.chain,
        seq=problem.seq,
        detail=problem.text,
    )
