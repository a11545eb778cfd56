"""Verification of an audit log: order, gaps, edits, cut ends, missing segments, signatures, anchors.

It works offline and needs only the folder, the public keys and the anchors, if there are any. The service
does it now and then in a thread.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec
import structlog

from kms_core.audit import chain, removals, segments
from kms_core.audit.chain import text_of
from kms_core.audit.keys import KEY_BYTES, PublicKeys, public_path
from kms_core.audit.segments import Segment
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_core.audit.verification.anchors import ACKNOWLEDGED, AnchorReader
from kms_core.audit.verification.crosscheck import Anchors, Removals, crosscheck
from kms_core.audit.verification.scan import (
    MOST_PROBLEMS,
    ChainProblem,
    ScannedSpan,
    VerificationReport,
    head_before,
    scan,
)
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_core.reload import stamp_of_stat
from kms_protocol.errors import ConfigurationError

_UNFINISHED: Final = re.compile(rf"\.{segments.NAME.pattern}\.[A-Za-z0-9]{{6}}")
"""The name of a file that rsync receives."""
_LASTING: Final = frozenset({chain.OPEN, chain.RETIRED, *chain.ENDS})
"""Kinds of lines that count for as long as their segment exists."""
EVERY_S: Final = 30.0
_TAIL_BYTES: Final = segments.LONGEST_LINE_BYTES + 1  # has the end of any line; some 2,500 lines, in 15 ms
_MOST_LOGGED: Final = 20
_ANCHORED_WITHIN: Final = timedelta(minutes=1)
_NAN: Final = float("nan")
_log = structlog.get_logger(__name__)


def verify(
    folder: Path,
    keys: PublicKeys | None = None,
    anchors: Anchors = MappingProxyType({}),
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    max_late: timedelta | None = None,
) -> VerificationReport:
    """Check every line of a folder. Without ``keys`` those in the log are used, which prove less.

    A folder that does not exist is a log without chains, which anchors may contradict. ``anchors`` are signed
    lines by sink. ``progress`` is called with the bytes done and the bytes in all. ``max_late`` is given for
    a copy of a log that grows: lines that are missing at its end are then notes, not problems. If an anchor
    or another chain named the first of them more than ``max_late`` ago, the verdict is ``late``. Raises
    OSError.
    """
    started = time.perf_counter()
    sizes = {segment: segment.path.stat().st_size for segment in _identified(folder)}  # before any line
    report = VerificationReport(trusted=keys is not None, size_bytes=sum(sizes.values()))
    keys = keys or PublicKeys(_own_keys(sizes))
    found: dict[Segment, ScannedSpan] = {}
    done = 0
    progress(done, report.size_bytes)
    for segment, size in sizes.items():
        found[segment] = scan(segment, keys, size)
        done += size
        progress(done, report.size_bytes)
    crosscheck(report, found, anchors, keys, Removals(), is_copy=max_late is not None)
    if max_late is not None and report.late_since:
        report.is_late = report.late_since <= chain.text_of(datetime.now(UTC) - max_late)
    report.seconds = round(time.perf_counter() - started, 3)
    return report


def _identified(folder: Path) -> Iterator[Segment]:
    """The segments, by the chain and number in their first line: a renamed file is still found."""
    entries = os.scandir(folder) if folder.exists() else ()
    for path in sorted(folder / entry.name for entry in entries if segments.is_file(entry)):
        if ".jsonl" not in path.name or _UNFINISHED.fullmatch(path.name):
            continue
        named = segments.NAME.fullmatch(path.name)
        opening = Segment("", 0, path).opening()
        if opening is not None and opening.kind == chain.OPEN:
            yield Segment(opening.chain, opening.segment, path)
        elif named:
            yield Segment(named[1], int(named[2]), path)
        elif opening is not None and opening.head:
            yield Segment(opening.chain, 0, path)


def _own_keys(files: Iterable[Segment]) -> Iterator[bytes]:
    for segment in files:
        opening = segment.opening()
        key = chain.from_hex(opening.public_key) if opening is not None else None
        if key and len(key) == KEY_BYTES:
            yield key


# -- again and again ---------------------------------------------------------------------------------


class Verifier:
    """Verifies the log of a folder again and again while it is written. Keeps scans of unchanged segments.

    Of a segment that has changed, only the first line and the last MiB are scanned. The end that the
    verification before found must still be there. So even from a holder of the signing key, these are
    detected: a cut of lines that were found before, their replacement by others with new heads, and the
    removal of a segment. Left to ``verify``, which scans every line: changes before the last MiB that leave
    the later heads as they were, changes before the first verification, and changes of lines that no
    verification has found yet. ``unread`` is the reason why a segment could not be read; empty if all could.
    """

    def __init__(self, folder: Path) -> None:
        self.unread = ""
        self._folder = folder
        self._known: dict[Segment, tuple[tuple[int, ...], ScannedSpan]] = {}
        self._removals = Removals()

    def verify(self, keys: PublicKeys, anchors: Anchors) -> VerificationReport:
        """Verify the log as ``verify`` does, but for the heads in other chains. Raises OSError."""
        self.unread, report = "", VerificationReport(trusted=True)
        self._removals.search = partial(removals.removal_horizon, self._folder, keys)
        files = segments.listed(self._folder)
        found: dict[Segment, ScannedSpan] = {}
        unread: set[str] = set()
        for segment in files:
            try:
                report.problems += self._scan(segment, keys)
            except FileNotFoundError:
                continue  # removed since it was listed; the next verification checks that this was recorded
            except OSError as exc:  # other segments are verified all the same
                self.unread = self.unread or f"{segment.path} cannot be read ({exc.strerror})"
            if segment in self._known:
                found[segment] = self._known[segment][1]
            else:
                unread.add(segment.chain)
        crosscheck(report, found, anchors, keys, self._removals, unread=unread)
        report.problems += self._missing(files)
        return report

    def _scan(self, segment: Segment, keys: PublicKeys) -> Iterator[ChainProblem]:
        """Scan a segment that has changed; problems of the lines that were known before."""
        stat = segment.path.stat()
        stamp = stamp_of_stat(stat)
        before, known = self._known.get(segment, (None, None))
        if before == stamp:
            return
        if known and stat.st_size < known.end:
            yield _changed("cut", "the file was truncated or replaced", segment, known)
            known = None
        elif known and known.head and head_before(segment.path, known.end).hex() != known.head:
            yield _changed("rewritten", "its lines have changed", segment, known)
            known = None
        self._known[segment] = stamp, _condensed(self._scanned(segment, stat.st_size, keys, known))

    def _scanned(
        self, segment: Segment, size: int, keys: PublicKeys, known: ScannedSpan | None
    ) -> ScannedSpan:
        """Scan all of a short segment. Of a long one its end, behind what is known or its first line."""
        begin, first_end = 0, 0
        if size > _TAIL_BYTES:
            with segment.path.open("rb") as file:
                first_end = len(file.readline(_TAIL_BYTES))
                begin = max(first_end, size - _TAIL_BYTES)
                if begin > first_end:
                    file.seek(begin)
                    begin += len(line) if (line := file.readline(_TAIL_BYTES)).endswith(b"\n") else 0
        tail = scan(segment, keys, size, begin)
        return _with_tail(known or scan(segment, keys, first_end), tail) if begin else tail

    def _missing(self, files: Sequence[Segment]) -> Iterator[ChainProblem]:
        """Problems of segments at the end of a chain that are gone without a record of their removal."""
        last = {segment.chain: segment.number for segment in files}
        for segment in sorted(self._known.keys() - set(files)):
            _, known = self._known.pop(segment)
            opened = next((line.time for line in known.special if line.kind == chain.OPEN), "")
            if segment.number > last.get(segment.chain, -1) and not self._removals.cover(opened):
                yield _changed("missing_file", "the file was removed", segment, known)


def _changed(code: str, text: str, segment: Segment, known: ScannedSpan) -> ChainProblem:
    return ChainProblem(code, text, segment.chain, segment.path.name, known.last_seq)


def _with_tail(first: ScannedSpan, tail: ScannedSpan) -> ScannedSpan:
    """The end of a segment, behind lines of it that were scanned before, maybe with others between them."""
    problems = list(dict.fromkeys((*first.problems, *tail.problems)))[:MOST_PROBLEMS]
    if not tail.lines:
        return replace(first, problems=problems, torn_bytes=tail.torn_bytes)
    tail.problems = problems
    tail.special = [*(line for line in first.special if line.seq < tail.first_seq), *tail.special]
    tail.stages = [*(line for line in first.stages if line.seq < tail.first_seq), *tail.stages]
    tail.first_seq, tail.first_time, tail.before = first.first_seq, first.first_time, first.before
    tail.signed_seq = max(first.signed_seq, tail.signed_seq)
    return tail


def _condensed(found: ScannedSpan) -> ScannedSpan:
    """Drop what is not needed until the segment changes: a process keeps this of every segment."""
    special = [line for line in found.special[:-1] if line.kind in _LASTING] + found.special[-1:]
    found.special = [msgspec.structs.replace(line, heads={}) for line in special]
    found.stages = [line for line in found.stages if line.operation == ACKNOWLEDGED]
    found.heads = dict(sorted(found.heads.items())[-1:])
    return found


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
        self._verifier = Verifier(folder)
        self._anchors = [AnchorReader(sink) for sink in anchors]
        self.condition = Condition()
        for what in ("chain", *(each.name for each in self._anchors)):
            metrics.AUDIT_OK.labels(what).set(_NAN)
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
        kept = tuple(dict.fromkeys((*before.problems, *problems)))[:_MOST_LOGGED]
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
        metrics.AUDIT_OK.labels("chain").set(0 if kept else _NAN if unread else 1)
        for each in self._anchors:
            is_older = any(problem.anchor == each.text for problem in proven)
            value = 0 if is_older else _NAN if each.name in not_compared else 1
            metrics.AUDIT_OK.labels(each.name).set(value)
            _log_compared(each.name, before.not_compared.get(each.name, ""), not_compared.get(each.name, ""))
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
            yield from [*lost, *found][:_MOST_LOGGED]


def _why(anchors: AnchorReader, report: VerificationReport | None, unread: str) -> str:
    """The reason why the log is not compared with all anchors of a sink; empty if it is.

    A log without anchors is young for a minute after its first lines.
    """
    due = text_of(datetime.now(UTC) - _ANCHORED_WITHIN)
    if unread or report is None:
        return anchors.unread or unread
    is_signed = any(each.signed_seq >= 0 and each.first_time < due for each in report.chains)
    return anchors.unread or (report.not_compared.get(anchors.text, "") if is_signed else "")


def _log_compared(place: str, before: str, why: str) -> None:
    """Log that the log is no longer compared with the anchors of a sink, or is again."""
    if bool(why) != bool(before):
        log, event = (_log.warning, "audit.anchors_away") if why else (_log.info, "audit.anchors_back")
        log(event, place=place, reason=why)


def _log_older(problem: ChainProblem) -> None:
    _log.error(
        "audit.anchor_ahead",
        code=problem.code,
        place=problem.anchor,
        chain=problem.chain,
        seq=problem.seq,
        detail=problem.text,
    )
