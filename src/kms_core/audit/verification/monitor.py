"""Reads the log back while it is written: new lines must follow known ones, and no segment may disappear.

It complements ``verify``. It begins near the end of each segment and remembers how each ended, so a change of
the log while the service runs is detected within seconds, even by a holder of the signing key. It reads the
last MiB of a segment each time that it changed: earlier changes, those far from the end of a segment, and
those among thousands of lines a second are left to ``kms audit verify``.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import structlog

from kms_core.audit import chain, maintenance, segments
from kms_core.audit.chain import ChainLine, text_of
from kms_core.audit.keys import PublicKeys, public_path
from kms_core.audit.segments import Segment
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_core.audit.verification.anchors import AnchorMonitor, Losses, acknowledged
from kms_core.audit.verification.scan import ChainProblem, ScannedSpan, Span, head_before, scan
from kms_core.observability import metrics
from kms_core.periodic import NO_LOCK, PeriodicThread
from kms_protocol.errors import ConfigurationError

EVERY_S: Final = 5.0
_MOST_BYTES: Final = 1024 * 1024  # of each segment and round: some 2,500 lines, in 15 ms
_MOST_PROBLEMS: Final = 20
_ANCHORED_WITHIN: Final = timedelta(minutes=1)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Condition:
    """The result so far. Problems stay until the process ends: an operator has to look at them.

    ``anchors`` are the problems that anchors prove; they end when the log has the missing lines, or the loss
    is acknowledged. ``not_compared`` has the sinks whose anchors cannot be compared, with the reason.
    ``unread`` is the reason why the log or a segment could not be read in the last round; empty if it could.
    ``read_at`` is the time of the last complete round in seconds since the epoch, 0 before the first;
    ``newest`` the time of the newest line read (RFC 3339), ``lines`` the number of lines it read.
    """

    problems: tuple[ChainProblem, ...] = ()
    read_at: float = 0.0
    newest: str = ""
    lines: int = 0
    anchors: tuple[ChainProblem, ...] = ()
    not_compared: Mapping[str, str] = field(default_factory=dict)
    unread: str = ""


@dataclass(frozen=True, slots=True)
class _Known:
    """A segment as it was last read: bytes ``begin`` to ``end``, and the last line there.

    ``changed_ns`` is the time of its last inode change, which no program can set, unlike that of the write.
    """

    inode: int
    size: int
    changed_ns: int
    begin: int
    end: int
    seq: int
    head: str
    opened: str
    ended_at: int


class AuditMonitor(PeriodicThread):
    """Reads the folder at once and then every 5 seconds, and sets metrics."""

    def __init__(
        self,
        folder: Path,
        signing_key: Path,
        anchors: Iterable[RedisSink | FolderSink] = (),
        *,
        fork_lock: AbstractContextManager[object] = NO_LOCK,
    ) -> None:
        """``anchors`` are the sinks whose anchors the log is compared with."""
        super().__init__("audit-monitor", EVERY_S, failed="audit.round_failed", fork_lock=fork_lock)
        self.folder = folder
        self._keys = public_path(signing_key)
        self._anchors = AnchorMonitor(anchors)
        self._losses: dict[str, list[ChainLine]] = {}
        self._lost: dict[str, tuple[int, int]] = {}
        self._searched = ""
        self._signed = False
        self._known: dict[tuple[str, int], _Known] = {}
        self._horizon = ""
        self.condition = Condition()
        metrics.AUDIT_CHAIN_OK.set(float("nan"))
        self.wake()  # the first round is at once

    def round(self) -> None:
        """Read what is new. What cannot be read now is read the next time; ``read_at`` stays until then."""
        try:
            self._read_log()
        except (OSError, ConfigurationError) as exc:
            self._publish_failure(
                exc.detail if isinstance(exc, ConfigurationError) else _reason(self.folder, exc)
            )
        except Exception as exc:
            self._publish_failure(f"{self.folder} cannot be read ({type(exc).__name__})")
            raise

    def _publish_failure(self, why: str) -> None:
        self._anchors.not_compared(why)
        self._publish([], [], why)

    def _read_log(self) -> None:
        keys = PublicKeys.read(self._keys)
        self._anchors.read(keys)  # first: the log has their lines by now
        there = segments.listed(self.folder)
        parts: list[ScannedSpan] = []
        problems: list[ChainProblem] = []
        unread = ""
        for segment in there:
            try:
                problems += self._read(segment, keys.keys, parts)
            except FileNotFoundError:
                continue  # removed since it was listed; the next round checks that this was recorded
            except OSError as exc:  # other segments are compared all the same
                unread = unread or _reason(segment.path, exc)
        self._horizon = max([self._horizon, *_horizons(parts)])
        self._note(parts)
        problems += self._missing(there)
        self._anchors.compare(self, unread)
        self._publish(problems, parts, unread)

    @property
    def sinks(self) -> Sequence[str]:
        """The sinks of anchors, in words for people."""
        return self._anchors.sinks

    # -- LogState -----------------------------------------------------------------------------------------

    def ends(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for (name, number), known in sorted(self._known.items()):
            found.setdefault(name, []).append((number, known.seq))
        return found

    def is_retired(self, opened: str) -> bool:
        """Records of removals may be anywhere in the log, which is searched once for each later time."""
        if not opened:  # its first line could not be read, or names no time
            return False
        if opened > max(self._horizon, self._searched):
            self._horizon = max(
                self._horizon, maintenance.removal_horizon(self.folder, PublicKeys.read(self._keys))
            )
            self._searched = opened
        return opened <= self._horizon

    def is_signed(self) -> bool:
        return self._signed

    def lost(self) -> Losses:
        return self._lost

    def _note(self, parts: Iterable[ScannedSpan]) -> None:
        """Note acknowledged losses that a signature covers, and whether an anchor is overdue."""
        due = text_of(datetime.now(UTC) - _ANCHORED_WITHIN)
        for part in parts:
            self._signed = self._signed or (part.signed_seq >= 0 and part.first_time < due)
            losses = {line.seq: line for line in self._losses.pop(part.path, [])}
            losses |= {line.seq: line for line in part.stages if acknowledged([line])}
            signed = (line for seq, line in losses.items() if seq < part.signed_seq)
            self._lost = acknowledged(signed, self._lost)
            if waiting := [line for seq, line in losses.items() if seq >= part.signed_seq]:
                self._losses[part.path] = waiting

    # -- the log itself -----------------------------------------------------------------------------------

    def _publish(self, problems: Iterable[ChainProblem], parts: Iterable[ScannedSpan], unread: str) -> None:
        before, now = self.condition, time.time()
        new = [problem for problem in problems if problem not in before.problems]
        kept = (*before.problems, *new)[:_MOST_PROBLEMS]
        for problem in kept[len(before.problems) :]:
            _log.error("audit.broken", code=problem.code, chain=problem.chain, seq=problem.seq)
        self.condition = Condition(
            kept,
            before.read_at if unread else now,
            max([before.newest, *(part.last_time for part in parts)]),
            sum(part.lines for part in parts),
            self._anchors.problems,
            self._anchors.away,
            unread,
        )
        metrics.AUDIT_CHAIN_OK.set(0 if kept else float("nan") if unread else 1)
        if unread:
            _log.warning("audit.not_read_back", reason=unread)
        else:
            metrics.AUDIT_READ_AT.set(now)

    def _read(
        self, segment: Segment, keys: dict[str, bytes], parts: list[ScannedSpan]
    ) -> Iterator[ChainProblem]:
        """Read a segment that changed: its last MiB, with lines read before, which may have been edited."""
        at, known = (segment.chain, segment.number), self._known.get((segment.chain, segment.number))
        stat = segment.path.stat()
        if known and (stat.st_ino, stat.st_size, stat.st_ctime_ns) == (
            known.inode,
            known.size,
            known.changed_ns,
        ):
            return
        if known and (stat.st_ino != known.inode or stat.st_size < known.end):
            yield _problem("cut", "the file was truncated or replaced", segment, known.seq)
            known = None
        begin = _begin(segment.path, stat.st_size, known)
        part = scan(Span(str(segment.path), begin, stat.st_size, segment.chain, keys))
        parts.append(part)
        yield from part.problems
        if not part.lines:
            return
        before = known or (None if begin else self._known.get((segment.chain, segment.number - 1)))
        if before and not _follows(part, before, known):
            yield _problem("rewritten", "its lines have changed", segment, before.seq)
        ended_at = max(part.ended_at, known.ended_at if known else -1)
        if -1 < ended_at < part.last_seq:
            yield part.problem_after_end(ended_at)
        opening = None if known else segment.opening()
        self._known[at] = _Known(
            stat.st_ino,
            stat.st_size,
            stat.st_ctime_ns,
            begin,
            stat.st_size - part.torn_bytes,
            part.last_seq,
            part.head,
            known.opened if known else (opening.time if opening else ""),
            ended_at,
        )

    def _missing(self, there: Iterable[Segment]) -> list[ChainProblem]:
        """Problems of segments that are gone without a record of their removal."""
        gone = self._known.keys() - {(segment.chain, segment.number) for segment in there}
        lost = [(at, self._known.pop(at)) for at in sorted(gone)]
        return [
            ChainProblem("missing_file", f"file {number} of the chain was removed", name, seq=known.seq)
            for (name, number), known in lost
            if not self.is_retired(known.opened)
        ]


def _reason(path: Path, exc: OSError) -> str:
    return f"{path} cannot be read ({exc.strerror})"


def _horizons(parts: Iterable[ScannedSpan]) -> Iterator[str]:
    """The horizons in records of removals that a signature covers."""
    for part in parts:
        for line in part.special:
            if line.kind == chain.RETIRED and line.seq < part.signed_seq:
                yield line.before


def _begin(path: Path, size: int, known: _Known | None) -> int:
    """The offset to read from: that of the last time, or the first line in the last MiB."""
    begin = known.begin if known else 0
    if size - begin <= _MOST_BYTES:
        return begin
    with segments.opened(path) as file:
        file.seek(size - _MOST_BYTES)
        file.readline(_MOST_BYTES)  # it may have grown
        return file.tell()


def _follows(part: ScannedSpan, before: _Known, known: _Known | None) -> bool:
    """Return whether lines continue those of the segment before, or the known ones are there."""
    if known is None:
        return (part.first_seq, part.before) == (before.seq + 1, before.head)
    return head_before(Path(part.path), known.end).hex() == known.head


def _problem(code: str, text: str, segment: Segment, seq: int) -> ChainProblem:
    return ChainProblem(code, text, segment.chain, segment.path.name, seq)
