"""Reads a trail back while it is written: new lines must follow from old ones, and nothing may go missing.

A light companion of ``verify``, not a replacement. It begins near the end of each file and remembers how
each ended, so whoever changes the trail while the service runs is noticed within seconds, even with the
signing key in hand. It reads at most a MiB of a file at a time: what happened before, far above the end of
a file, or in the middle of thousands of lines a second, ``kms audit verify`` finds.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import structlog

from kms_core.audit import chain, retention, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys, public_path
from kms_core.audit.retention import text_of
from kms_core.audit.segments import Segment
from kms_core.audit.sinks import FolderSink, RedisSink
from kms_core.audit.verification.anchors import AnchorMonitor, Losses, acknowledged
from kms_core.audit.verification.report import ChainProblem
from kms_core.audit.verification.scan import ScannedSpan, Span, head_before, scan
from kms_core.observability import metrics
from kms_protocol.errors import ConfigurationError

EVERY_S: Final = 5.0
_MOST_BYTES: Final = 1024 * 1024  # of each file, at each look: some 2,500 lines, in 15 ms
_MOST_PROBLEMS: Final = 20
_ANCHORED_WITHIN: Final = timedelta(minutes=1)
_NOTHING: Final = nullcontext()
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Condition:
    """What was found so far. Problems stay until the process ends: somebody has to look.

    ``anchors`` are the problems that anchors are proof of: they end when the log has what is missing, or the
    loss is on record. ``not_compared`` holds the places of anchors that cannot be compared, with the reason.
    ``unread`` is why the log, or a file of it, could not be read at the last look; empty if it could.
    ``read_at`` is when, in seconds since the epoch, 0 before the first look; ``newest`` the time of the
    newest line that was read (RFC 3339), ``lines`` how many were.
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
    """A file as it was last read: bytes ``begin`` to ``end``, and the last line there.

    ``changed_ns`` is when its inode changed, which nobody can put back as the time of the last write.
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


class AuditMonitor(threading.Thread):
    """A look at the folder at once, and then every few seconds; metrics say what came of it."""

    def __init__(
        self,
        folder: Path,
        signing_key: Path,
        anchors: Iterable[RedisSink | FolderSink] = (),
        *,
        working: AbstractContextManager[object] = _NOTHING,
    ) -> None:
        """``anchors`` are the places to compare the log with.

        ``working`` is entered for each look: what must not happen meanwhile (a fork) waits for it.
        """
        super().__init__(name="audit-watch", daemon=True)
        self.folder = folder
        self._keys = public_path(signing_key)
        self._anchors = AnchorMonitor(anchors)
        self._losses: list[ChainLine] = []
        self._lost: dict[str, tuple[int, int]] = {}
        self._searched = ""
        self._signed = False
        self._working = working
        self._stop_asked = threading.Event()
        self._known: dict[tuple[str, int], _Known] = {}
        self._horizon = ""
        self.condition = Condition()
        metrics.AUDIT_CHAIN_OK.set(float("nan"))

    def run(self) -> None:
        self.look()
        while not self._stop_asked.wait(EVERY_S):
            self.look()

    def stop(self) -> None:
        self._stop_asked.set()

    def look(self) -> None:
        """Once; never raises. What cannot be read now is read the next time; ``read_at`` stays until then."""
        try:
            with self._working:
                self._look()
        except (OSError, ConfigurationError) as exc:
            why = exc.detail if isinstance(exc, ConfigurationError) else _reason(self.folder, exc)
            self._anchors.not_compared(why)
            self._tell([], [], why)

    def _look(self) -> None:
        keys = PublicKeys.read(self._keys)
        self._anchors.read(keys)  # first: what they name was in the log before
        there = segments.listed(self.folder)
        parts: list[ScannedSpan] = []
        problems: list[ChainProblem] = []
        unread = ""
        for segment in there:
            try:
                problems += self._read(segment, keys.keys, parts)
            except FileNotFoundError:
                continue  # since it was listed; the next look says whether that was recorded
            except OSError as exc:  # the others are compared all the same
                unread = unread or _reason(segment.path, exc)
        self._horizon = max([self._horizon, *_marks(parts)])
        self._note(parts)
        problems += self._missing(there)
        self._anchors.compare(self, unread)
        self._tell(problems, parts, unread)

    @property
    def places(self) -> Sequence[str]:
        """Where anchors are, for people."""
        return self._anchors.places

    # -- what anchors are compared with -----------------------------------------------------------------

    def ends(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for (name, number), known in sorted(self._known.items()):
            found.setdefault(name, []).append((number, known.seq))
        return found

    def is_retired(self, opened: str) -> bool:
        """The records of removals may stand anywhere in the log: it is searched once for each later time."""
        if not opened:  # its first line could not be read, or names no time
            return False
        if opened > max(self._horizon, self._searched):
            self._horizon = max(self._horizon, retention.horizon(self.folder, PublicKeys.read(self._keys)))
            self._searched = opened
        return opened <= self._horizon

    def is_signed(self) -> bool:
        return self._signed

    def lost(self) -> Losses:
        return self._lost

    def _note(self, parts: Iterable[ScannedSpan]) -> None:
        """Losses on record, once a signature covers them; whether an anchor is due since a minute."""
        due = text_of(datetime.now(UTC) - _ANCHORED_WITHIN)
        for part in parts:
            self._signed = self._signed or (part.signed_seq >= 0 and part.first_time < due)
            self._losses += [line for line in part.stages if acknowledged([line])]
            covered = [
                line for line in self._losses if line.chain == part.chain and line.seq < part.signed_seq
            ]
            self._lost = acknowledged(covered, self._lost)
            self._losses = [line for line in self._losses if line not in covered]

    # -- the log itself -----------------------------------------------------------------------------------

    def _tell(self, problems: Iterable[ChainProblem], parts: Iterable[ScannedSpan], unread: str) -> None:
        before, now = self.condition, time.time()
        new = [problem for problem in problems if problem not in before.problems]
        kept = (*before.problems, *new)[:_MOST_PROBLEMS]
        for problem in kept[len(before.problems) :]:
            _log.error("audit.broken", code=problem.code, chain=problem.chain, seq=problem.seq)
        self.condition = Condition(
            kept,
            before.read_at if unread else now,
            max([before.newest, *(part.last_time for part in parts)]),
            before.lines + sum(part.lines for part in parts),
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
        """What is new in a file; all that was read of it, if somebody wrote to it and it did not grow."""
        at, known = (segment.chain, segment.number), self._known.get((segment.chain, segment.number))
        stat = segment.path.stat()
        if known and (stat.st_ino, stat.st_size, stat.st_ctime_ns) == (
            known.inode,
            known.size,
            known.changed_ns,
        ):
            return
        if known and (stat.st_ino != known.inode or stat.st_size < known.end):
            yield _problem("cut", "the file was cut, or another has its name", segment, known.seq)
            known = None
        begin = _begin(segment.path, stat.st_size, known)
        part = scan(Span(str(segment.path), begin, stat.st_size, segment.chain, keys))
        parts.append(part)
        yield from part.problems
        if not part.lines:
            return
        before = known or (None if begin else self._known.get((segment.chain, segment.number - 1)))
        if before and not _follows(part, begin, before, known):
            yield _problem("rewritten", "its lines are not those that were there", segment, before.seq)
        ended_at = known.ended_at if known and begin >= known.end else part.ended_at
        if -1 < ended_at < part.last_seq:
            yield part.problem_behind_end(ended_at)
        opening = None if known else segment.opening()
        self._known[at] = _Known(
            stat.st_ino,
            stat.st_size,
            stat.st_ctime_ns,
            known.begin if known and begin <= known.end else begin,
            stat.st_size - part.torn_bytes,
            part.last_seq,
            part.head,
            known.opened if known else (opening.time if opening else ""),
            max(ended_at, part.ended_at),
        )

    def _missing(self, there: Iterable[Segment]) -> list[ChainProblem]:
        """Files that are gone, but for those whose removal is on record."""
        gone = self._known.keys() - {(segment.chain, segment.number) for segment in there}
        lost = [(at, self._known.pop(at)) for at in sorted(gone)]
        return [
            ChainProblem("missing_file", f"file {number} of the chain was removed", name, seq=known.seq)
            for (name, number), known in lost
            if not self.is_retired(known.opened)
        ]


def _reason(path: Path, exc: OSError) -> str:
    return f"{path} cannot be read ({exc.strerror})"


def _marks(parts: Iterable[ScannedSpan]) -> Iterator[str]:
    """Up to when files were removed, by records that a signature covers."""
    for part in parts:
        for line in part.special:
            if line.kind == chain.RETIRED and line.seq < part.signed_seq:
                yield line.before


def _begin(path: Path, size: int, known: _Known | None) -> int:
    """Where to read from: behind what is known; or nearer to the end, at the beginning of a line."""
    begin = 0
    if known is not None:
        begin = known.end if size > known.end else known.begin
    if size - begin <= _MOST_BYTES:
        return begin
    with path.open("rb") as file:
        file.seek(size - _MOST_BYTES)
        file.readline()
        return file.tell()


def _follows(part: ScannedSpan, begin: int, before: _Known, known: _Known | None) -> bool:
    """Whether lines continue those that are known; read again, whether they still end the same way."""
    if known is None or begin == known.end:
        return (part.first_seq, part.before) == (before.seq + 1, before.head)
    if begin < known.end:
        return (part.last_seq, part.head) == (known.seq, known.head)
    return head_before(Path(part.path), known.end).hex() == known.head


def _problem(code: str, text: str, segment: Segment, seq: int) -> ChainProblem:
    return ChainProblem(code, text, segment.chain, segment.path.name, seq)
