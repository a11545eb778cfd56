"""Comparison of the log with its anchors, the signed lines in sinks.

An anchor proves that its chain once had a line with this number and head. A log without that line is older
than the anchor, was cut, or was rewritten. After restoring a backup, an operator acknowledges the loss in the
log (``acknowledged``): anchors of the lost lines then are notes.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

import structlog

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.sinks import ANCHORS_SUFFIX, PAGE, Entry, FolderSink, RedisSink, files_in, line_of
from kms_core.audit.verification.scan import ChainProblem
from kms_core.observability import metrics
from kms_protocol.errors import AuditUnavailable

EVERY_S: Final = 30.0
CUT: Final = "cut"
MISSING_CHAIN: Final = "missing_chain"
REWRITTEN: Final = "rewritten"
LOST: Final = "anchors_lost"
ACKNOWLEDGED: Final = "audit.acknowledge_loss"
"""The operation of the record; its effect names the lost lines, see ``effect_of``."""
NONE_OF_THIS_LOG: Final = "it has no anchor of this log: they were removed, or none was written yet"
_MOST_DIGITS: Final = 19  # of a line number, at most 2^63 - 1
_FIRST_READ: Final = 10_000  # entries of a stream, when a process starts; ``kms audit verify`` reads all
_MOST_PROBLEMS: Final = 20
_NAN: Final = float("nan")
Losses = Mapping[str, tuple[int, int]]
"""Lines whose loss was acknowledged: of each chain, the first and the last."""
_log = structlog.get_logger(__name__)


def effect_of(name: str, first: int, last: int) -> str:
    """The effect in the record of an acknowledged loss: the chain, and its last and first lost line."""
    return f"{name}:{last}-{first}"


def acknowledged(
    lines: Iterable[ChainLine], known: Losses = MappingProxyType({})
) -> dict[str, tuple[int, int]]:
    """The losses in the given records, added to those ``known``. A signature must cover ``lines``.

    A record of an earlier version names only the last line, and covers all lines before it.
    """
    found = dict(known)
    for line in lines:
        if line.operation != ACKNOWLEDGED or line.stage != "outcome":
            continue
        name, _, rest = line.effect.partition(":")
        last, *more = rest.split("-")
        first = more[0] if len(more) > 1 else "0"
        if last.isdecimal() and first.isdecimal() and max(len(last), len(first)) <= _MOST_DIGITS:
            before = found.get(name, (int(first), int(last)))
            found[name] = min(before[0], int(first)), max(before[1], int(last))
    return found


def is_lost(lost: Losses, anchor: ChainLine, last_seq: int) -> bool:
    """True if the loss of all lines from a chain's end (``last_seq``) to the anchor's is acknowledged."""
    first, last = lost.get(anchor.chain, (0, -1))
    return first <= last_seq + 1 and anchor.seq <= last


def contradiction(code: str, anchor: ChainLine, sink: str, last_seq: int) -> ChainProblem:
    """The problem of a log without the line of an anchor; its chain in the log ends with ``last_seq``."""
    seen = f"the anchor in {sink} names line {anchor.seq}, signed at {anchor.time}"
    texts = {
        CUT: f"lines {last_seq + 1} to {anchor.seq} are missing: {seen}, and the log ends at line {last_seq}",
        MISSING_CHAIN: f"a chain of at least {anchor.seq + 1} lines is missing: {seen}",
        REWRITTEN: f"{seen}, and the log has another line there: the chain was rewritten",
    }
    seq = last_seq + 1 if code == CUT else anchor.seq
    return ChainProblem(code, texts[code], anchor.chain, seq=seq, anchor=sink, anchor_seq=anchor.seq)


# -- while the log is written ------------------------------------------------------------------------


class LogState(Protocol):
    """The log as the monitor has read it."""

    folder: Path

    def ends(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """Number and last line of each segment, by chain."""

    def is_retired(self, opened: str) -> bool:
        """Return whether a segment that was opened then may be gone by a recorded removal."""

    def is_signed(self) -> bool:
        """Return whether the log has had signed lines for so long that an anchor is due."""

    def lost(self) -> Losses:
        """The acknowledged losses."""


class _AnchorSource(Protocol):
    """A sink from which new anchors are read."""

    name: str
    text: str

    @property
    def damaged(self) -> str:
        """The reason why newer anchors may exist that cannot be read; empty without one."""

    def news(self, keys: PublicKeys) -> tuple[list[bytes], bool]:
        """New lines, oldest first, and whether older ones are missing. Raises AuditUnavailable."""


class _Stream:
    """Anchors in Redis. An entry that existed two reads ago must still exist.

    Entries of the last seconds may be lost when a replica takes over.
    """

    name, text, damaged = "redis", "Redis", ""

    def __init__(self, stream: RedisSink) -> None:
        self._stream = stream
        self._settled = self._last = ""

    def news(self, keys: PublicKeys) -> tuple[list[bytes], bool]:
        del keys
        begin = self._settled or self._last
        found = self._from(begin) if begin else self._stream.newest(_FIRST_READ)
        first = found[0][0].decode() if found else ""
        lost = bool(begin) and (not found or (bool(self._settled) and first != begin))
        if lost:
            found = self._stream.newest(_FIRST_READ)
        self._settled = "" if lost else self._last
        self._last = found[-1][0].decode() if found else ""
        return list(map(line_of, found)), lost

    def _from(self, cursor: str) -> list[Entry]:
        """All entries from a cursor on."""
        found: list[Entry] = []
        while page := self._stream.after(cursor):
            found += page
            cursor = f"({page[-1][0].decode()}"
            if len(page) < PAGE:
                break
        return found


class _Files:
    """Anchors in a directory: the newest one signed by a known key, of each file that has changed."""

    name = "directory"

    def __init__(self, folder: FolderSink) -> None:
        self._path = folder.path
        self.text = str(folder.path)
        self._sizes: dict[str, int] = {}
        self._damaged: dict[str, str] = {}
        self._unread: set[str] = set()

    @property
    def damaged(self) -> str:
        return next(iter(self._damaged.values()), "")

    def news(self, keys: PublicKeys) -> tuple[list[bytes], bool]:
        sizes = {path.name: self._size(path) for path in files_in(self._path, ANCHORS_SUFFIX)}
        changed = [name for name, size in sizes.items() if size != self._sizes.get(name)]
        wanted = {*changed, *self._unread & sizes.keys()}
        self._unread = set()
        self._damaged = {name: why for name, why in self._damaged.items() if name in sizes}
        lines = [self._newest(name, keys) for name in wanted if sizes[name]]
        lost = any(sizes.get(name, 0) < size for name, size in self._sizes.items())
        self._sizes = sizes
        return lines, lost

    def _size(self, path: Path) -> int:
        """The size of a file; that of one out of reach is as before, and it is read to say why."""
        with suppress(OSError):
            return path.stat().st_size
        self._unread.add(path.name)
        return self._sizes.get(path.name, 1)

    def _newest(self, name: str, keys: PublicKeys) -> bytes:
        """The newest anchor in a file, or the first if none is near its end; empty if it has none."""
        path = self._path / name
        try:
            line, after = segments.newest_signed(path, keys)
            first = b"" if line else segments.first_line(path)
        except OSError as exc:  # other files are compared all the same
            self._unread.add(name)
            self._damaged[name] = f"{path} cannot be read ({exc.strerror})"
            return b""
        begin = chain.read(first)
        is_foreign = begin is not None and begin.kind in chain.SIGNED and begin.key not in keys.keys
        self._damaged.pop(name, None)
        if (after or not line) and not is_foreign:
            self._damaged[name] = f"{path} is damaged: lines after its newest anchor are not anchors"
        return line or first


@dataclass(slots=True)
class _Reader:
    """One sink: the newest anchor of each chain, and those not yet compared by head (``fresh``)."""

    source: _AnchorSource
    newest: dict[str, ChainLine] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    rewritten: dict[str, ChainProblem] = field(default_factory=dict)
    away: str = ""
    unread: str = ""
    lost: bool = False
    read_at: float = -EVERY_S

    def read(self, keys: PublicKeys) -> None:
        """Read new anchors every 30 seconds, and at each call while the sink fails."""
        if not self.away and time.monotonic() - self.read_at < EVERY_S:
            return
        try:
            lines, lost = self.source.news(keys)
        except AuditUnavailable as exc:
            self._set_away(exc.detail)
            return
        self.read_at = time.monotonic()
        self._set_away("")
        self.lost = self.lost or lost
        self._note(lines, keys)

    def _note(self, lines: Iterable[bytes], keys: PublicKeys) -> None:
        """Keep the newest anchor of each chain with a signature by a known key; checks few signatures."""
        done: set[str] = set()
        for raw in reversed(list(lines)):
            found = chain.read(raw)
            if found is None or found.chain in done:
                continue
            before = self.newest.get(found.chain)
            if (before is None or before.seq < found.seq) and keys.signed(raw):
                self.newest[found.chain] = found
                self.fresh.add(found.chain)
                done.add(found.chain)

    def _set_away(self, why: str) -> None:
        """Note why the sink fails; logs when it begins or ceases to fail."""
        if bool(why) != bool(self.away):
            log, event = (_log.warning, "audit.anchors_away") if why else (_log.info, "audit.anchors_back")
            log(event, place=self.source.name, reason=why)
        self.away = why


class AnchorMonitor:
    """Compares the log with all anchors, at a bounded rate and at a constant cost for each chain.

    Call ``read`` before the log is read, and ``compare`` after it: the lines of anchors then are in the log.
    """

    def __init__(self, sinks: Iterable[RedisSink | FolderSink]) -> None:
        self._readers = [
            _Reader(_Stream(sink) if isinstance(sink, RedisSink) else _Files(sink)) for sink in sinks
        ]
        self.problems: tuple[ChainProblem, ...] = ()
        self.away: dict[str, str] = {}
        for each in self._readers:
            metrics.AUDIT_ANCHORS_OK.labels(each.source.name).set(_NAN)

    @property
    def sinks(self) -> Sequence[str]:
        """The sinks of anchors, in words for people."""
        return [each.source.text for each in self._readers]

    def read(self, keys: PublicKeys) -> None:
        for each in self._readers:
            each.read(keys)

    def compare(self, log: LogState, unread: str = "") -> None:
        """Compare the anchors with the log; ``unread`` is the reason why a part of the log is not known."""
        before, ends, lost = self.problems, log.ends(), log.lost()
        found: list[ChainProblem] = []
        self.away = {}
        for each in self._readers:
            problems = [*_gone(each), *_compared(each, log, ends, lost)][:_MOST_PROBLEMS]
            why = each.away or each.source.damaged or unread or each.unread
            if not why and not each.newest and log.is_signed():
                why = NONE_OF_THIS_LOG
            if why:
                self.away[each.source.name] = why
            metrics.AUDIT_ANCHORS_OK.labels(each.source.name).set(0 if problems else _NAN if why else 1)
            found += problems
        self.problems = tuple(found)
        for problem in found:
            if problem not in before:
                _log.error(
                    "audit.anchor_ahead",
                    code=problem.code,
                    place=problem.anchor,
                    chain=problem.chain,
                    seq=problem.seq,
                    detail=problem.text,
                )

    def not_compared(self, why: str) -> None:
        """Note that the log could not be read: earlier problems stay, and nothing else is known."""
        self.away = {each.source.name: each.away or why for each in self._readers}
        for each in self._readers:
            if not any(problem.anchor == each.source.text for problem in self.problems):
                metrics.AUDIT_ANCHORS_OK.labels(each.source.name).set(_NAN)


def _gone(reader: _Reader) -> list[ChainProblem]:
    if not reader.lost:
        return []
    text = f"anchors in {reader.source.text} are gone or older than before: they were removed or restored"
    return [ChainProblem(LOST, text, anchor=reader.source.text)]


def _compared(
    reader: _Reader, log: LogState, ends: Mapping[str, Sequence[tuple[int, int]]], lost: Losses
) -> Iterable[ChainProblem]:
    sink, reader.unread = reader.source.text, ""
    for name, anchor in list(reader.newest.items()):
        last_seq = ends[name][-1][1] if name in ends else -1
        if last_seq < anchor.seq:
            if is_lost(lost, anchor, last_seq):
                continue
            if name not in ends and log.is_retired(anchor.opened):
                del reader.newest[name]
                continue
            yield contradiction(CUT if name in ends else MISSING_CHAIN, anchor, sink, last_seq)
        elif name in reader.fresh:
            try:
                has = _has(log, ends[name], anchor)
            except OSError as exc:
                reader.unread = f"a file of {name} cannot be read ({exc.strerror})"
                continue
            reader.fresh.discard(name)
            if not has:
                reader.rewritten[name] = contradiction(REWRITTEN, anchor, sink, last_seq)
    yield from reader.rewritten.values()


def _has(log: LogState, ends: Sequence[tuple[int, int]], anchor: ChainLine) -> bool:
    """True if the log has the line of an anchor; True for a line in a segment that was just removed."""
    number = next(number for number, seq in ends if seq >= anchor.seq)
    path = segments.path_of(log.folder, anchor.chain, number)
    try:
        line = segments.line_of(path, anchor.seq)
    except FileNotFoundError:
        return True
    if line is None:
        opening = segments.Segment(anchor.chain, number, path).opening()
        is_before = opening is not None and opening.seq > anchor.seq
        return is_before and log.is_retired(anchor.opened)
    return line.endswith(chain.HEAD + anchor.head.encode() + chain.END)
