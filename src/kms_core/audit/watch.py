"""Reads a trail back while it is written: new lines must follow from old ones, and nothing may go missing.

A light companion of ``verify``, not a replacement. It begins near the end of each file and remembers how
each ended, so whoever changes the trail while the service runs is noticed within seconds, even with the
signing key in hand. It reads at most a MiB of a file at a time: what happened before, far above the end of
a file, or in the middle of thousands of lines a second, ``kms audit verify`` finds.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import structlog

from kms_core import metrics
from kms_core.audit import chain, segments
from kms_core.audit.keys import PublicKeys, public_path
from kms_core.audit.report import Problem
from kms_core.audit.scan import Found, Span, head_before, scan
from kms_core.audit.segments import Segment
from kms_core.errors import ConfigurationError
from kms_core.settings import Settings

EVERY_S: Final = 5.0
_MOST_BYTES: Final = 1024 * 1024  # of each file, at each look: some 2,500 lines, in 15 ms
_MOST_PROBLEMS: Final = 20
_NOTHING: Final = nullcontext()
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Condition:
    """What was found so far. Problems stay until the process ends: somebody has to look.

    ``read_at`` is when, in seconds since the epoch, 0 before the first look; ``newest`` the time of the
    newest line that was read (RFC 3339), ``lines`` how many were.
    """

    problems: tuple[Problem, ...] = ()
    read_at: float = 0.0
    newest: str = ""
    lines: int = 0


@dataclass(frozen=True, slots=True)
class _Known:
    """A file as it was last read: bytes ``begin`` to ``end``, and the last line there."""

    inode: int
    size: int
    changed_ns: int
    begin: int
    end: int
    seq: int
    head: str
    opened: str


class Watch(threading.Thread):
    """A look at the folder at once, and then every few seconds; metrics say what came of it."""

    def __init__(
        self, folder: Path, signing_key: Path, *, working: AbstractContextManager[object] = _NOTHING
    ) -> None:
        """``working`` is entered for each look: what must not happen meanwhile (a fork) waits for it."""
        super().__init__(name="audit-watch", daemon=True)
        self._folder = folder
        self._keys = public_path(signing_key)
        self._working = working
        self._stop_asked = threading.Event()
        self._known: dict[tuple[str, int], _Known] = {}
        self._horizon = ""
        self.condition = Condition()
        metrics.AUDIT_CHAIN_OK.set(1)

    @classmethod
    def of(cls, settings: Settings, *, working: AbstractContextManager[object] = _NOTHING) -> Self:
        section = settings.kms.audit
        return cls(section.path, section.signing_key_path, working=working)

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
            _log.warning("audit.not_read_back", error=type(exc).__name__)

    def _look(self) -> None:
        keys = PublicKeys.read(self._keys).keys
        there = segments.listed(self._folder)
        parts: list[Found] = []
        problems = [problem for segment in there for problem in self._read(segment, keys, parts)]
        marks = [line.before for part in parts for line in part.special if line.kind == chain.RETIRED]
        self._horizon = max([self._horizon, *marks])
        problems += self._missing(there)
        self._tell(problems, parts)

    def _tell(self, problems: Iterable[Problem], parts: Iterable[Found]) -> None:
        before, now = self.condition, time.time()
        kept = (*before.problems, *problems)[:_MOST_PROBLEMS]
        for problem in kept[len(before.problems) :]:
            _log.error("audit.broken", code=problem.code, chain=problem.chain, seq=problem.seq)
        self.condition = Condition(
            kept,
            now,
            max([before.newest, *(part.last_time for part in parts)]),
            before.lines + sum(part.lines for part in parts),
        )
        metrics.AUDIT_CHAIN_OK.set(not self.condition.problems)
        metrics.AUDIT_READ_AT.set(now)

    def _read(self, segment: Segment, keys: dict[str, bytes], parts: list[Found]) -> Iterator[Problem]:
        """What is new in a file; all that was read of it, if somebody wrote to it and it did not grow."""
        at, known = (segment.chain, segment.number), self._known.get((segment.chain, segment.number))
        try:
            stat = segment.path.stat()
        except FileNotFoundError:
            return  # since it was listed; the next look says whether that was recorded
        if known and (stat.st_ino, stat.st_size, stat.st_mtime_ns) == (
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
        opening = None if known else segment.opening()
        self._known[at] = _Known(
            stat.st_ino,
            stat.st_size,
            stat.st_mtime_ns,
            known.begin if known and begin <= known.end else begin,
            stat.st_size - part.torn_bytes,
            part.last_seq,
            part.head,
            known.opened if known else (opening.time if opening else ""),
        )

    def _missing(self, there: Iterable[Segment]) -> list[Problem]:
        """Files that are gone, but for those whose removal is on record."""
        gone = self._known.keys() - {(segment.chain, segment.number) for segment in there}
        lost = [(at, self._known.pop(at)) for at in sorted(gone)]
        return [
            Problem("missing_file", f"file {number} of the chain was removed", name, seq=known.seq)
            for (name, number), known in lost
            if known.opened > self._horizon
        ]


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


def _follows(part: Found, begin: int, before: _Known, known: _Known | None) -> bool:
    """Whether lines continue those that are known; read again, whether they still end the same way."""
    if known is None or begin == known.end:
        return (part.first_seq, part.before) == (before.seq + 1, before.head)
    if begin < known.end:
        return (part.last_seq, part.head) == (known.seq, known.head)
    return head_before(Path(part.path), known.end).hex() == known.head


def _problem(code: str, text: str, segment: Segment, seq: int) -> Problem:
    return Problem(code, text, segment.chain, segment.path.name, seq)
