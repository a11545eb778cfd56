"""Compares the log with its anchors: the signed lines that second places keep of it.

An anchor proves that its chain once had a line of this number and head. A log without that line is older
than the anchor, was cut, or was written anew. An operator who restored a backup acknowledges the loss on
record (``acknowledged``): anchors of the lost lines are then notes.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

import structlog

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.sinks import ANCHORS_SUFFIX, PAGE, Entry, FolderSink, RedisSink, files_in, line_of
from kms_core.audit.verification.report import ChainProblem
from kms_core.observability import metrics
from kms_protocol.errors import AuditUnavailable

EVERY_S: Final = 30.0
CUT: Final = "cut"
MISSING_CHAIN: Final = "missing_chain"
REWRITTEN: Final = "rewritten"
LOST: Final = "anchors_lost"
ACKNOWLEDGED: Final = "audit.acknowledge_loss"
"""The operation of the record; its effect names the anchor, see ``effect_of``."""
NONE_OF_THIS_LOG: Final = "it holds no anchor of this log: they were removed, or none was taken yet"
_FIRST_READ: Final = 10_000  # of a stream, when a process starts: ``kms audit verify`` reads all
_MOST_PROBLEMS: Final = 20
_NAN: Final = float("nan")
Losses = Mapping[str, tuple[int, int]]
"""Lines whose loss is on record: of each chain, the first and the last."""
_log = structlog.get_logger(__name__)


def effect_of(name: str, first: int, last: int) -> str:
    """What a record of an acknowledged loss names: a chain, and the last and the first line that it lost."""
    return f"{name}:{last}-{first}"


def acknowledged(
    lines: Iterable[ChainLine], known: Losses = MappingProxyType({})
) -> dict[str, tuple[int, int]]:
    """The losses on record, with those ``known`` before. ``lines`` are covered by a signature.

    A record of an earlier version names only the last line, and stands for all lines before it.
    """
    found = dict(known)
    for line in lines:
        name, _, rest = line.effect.partition(":")
        last, *more = rest.split("-")
        first = more[0] if len(more) > 1 else "0"
        if line.operation != ACKNOWLEDGED or line.stage != "outcome":
            continue
        if last.isdecimal() and first.isdecimal():
            before = found.get(name, (int(first), int(last)))
            found[name] = min(before[0], int(first)), max(before[1], int(last))
    return found


def is_lost(lost: Losses, anchor: ChainLine, last_seq: int) -> bool:
    """Whether the loss on record covers all lines from the end of a chain (``last_seq``) to the anchor's."""
    first, last = lost.get(anchor.chain, (0, -1))
    return first <= last_seq + 1 and anchor.seq <= last


def contradiction(code: str, anchor: ChainLine, place: str, last_seq: int) -> ChainProblem:
    """The problem of a log that lacks what an anchor names; its chain there ends with ``last_seq``."""
    seen = f"the anchor in {place} names line {anchor.seq}, signed at {anchor.time}"
    texts = {
        CUT: f"lines {last_seq + 1} to {anchor.seq} are missing: {seen}, and the log ends at line {last_seq}",
        MISSING_CHAIN: f"a chain of at least {anchor.seq + 1} lines is missing: {seen}",
        REWRITTEN: f"{seen}, and the log has another there: the chain was written anew",
    }
    seq = last_seq + 1 if code == CUT else anchor.seq
    return ChainProblem(code, texts[code], anchor.chain, seq=seq, anchor=place, anchor_seq=anchor.seq)


# -- while the log is written ------------------------------------------------------------------------


class LogState(Protocol):
    """What the monitor knows of the log: of each chain, number and last line of each segment (``ends``)."""

    folder: Path

    def ends(self) -> Mapping[str, Sequence[tuple[int, int]]]: ...

    def is_retired(self, opened: str) -> bool:
        """Whether the segment that was opened then may be gone by a removal on record."""

    def is_signed(self) -> bool:
        """Whether the log holds signed lines for which an anchor is due since some time."""

    def lost(self) -> Losses:
        """What was acknowledged."""


class _AnchorSource(Protocol):
    """A place whose anchors are read as they come."""

    name: str
    text: str

    @property
    def damaged(self) -> str:
        """Why newer anchors may be there that cannot be read; empty for none."""

    def news(self, keys: PublicKeys) -> tuple[list[bytes], bool]:
        """Lines since the last call, oldest first; whether older ones have gone. Raises AuditUnavailable."""


class _Stream:
    """Anchors in Redis. An entry that was there two reads ago must still be there.

    Those of the last seconds may be lost when a replica takes over from its master.
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
        """All entries from this one on."""
        found: list[Entry] = []
        while page := self._stream.after(cursor):
            found += page
            cursor = f"({page[-1][0].decode()}"
            if len(page) < PAGE:
                break
        return found


class _Files:
    """Anchors in a directory: of each file that has changed, the newest that a known key signed."""

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
        try:
            files = files_in(self._path, f"*{ANCHORS_SUFFIX}")
            sizes = {path.name: path.stat().st_size for path in files}
            if not sizes and not self._path.is_dir():
                raise AuditUnavailable(f"{self._path} is not there: mount or make it")
        except OSError as exc:
            raise AuditUnavailable(f"{self._path} cannot be read ({exc.strerror})") from exc
        changed = [name for name, size in sizes.items() if size != self._sizes.get(name)]
        wanted = {*changed, *self._unread & sizes.keys()}
        self._unread = set()
        self._damaged = {name: why for name, why in self._damaged.items() if name in sizes}
        lines = [self._newest(name, keys) for name in wanted if sizes[name]]
        lost = any(sizes.get(name, 0) < size for name, size in self._sizes.items())
        self._sizes = sizes
        return lines, lost

    def _newest(self, name: str, keys: PublicKeys) -> bytes:
        """The newest anchor in a file, or the first if none is near its end; empty if it has none of ours."""
        path = self._path / name
        try:
            line, behind = segments.newest_signed(path, keys)
            first = b"" if line else segments.first_line(path)
        except OSError as exc:  # the others are compared all the same
            self._unread.add(name)
            self._damaged[name] = f"{path} cannot be read ({exc.strerror})"
            return b""
        begin = chain.read(first)
        is_foreign = begin is not None and begin.kind in chain.SIGNED and begin.key not in keys.keys
        self._damaged.pop(name, None)
        if (behind or not line) and not is_foreign:
            self._damaged[name] = f"{path} is damaged: behind its newest anchor stands what is none"
        return line or first


@dataclass(slots=True)
class _Reader:
    """One place: the newest anchor of each chain there, and which of them were not yet compared by head."""

    source: _AnchorSource
    newest: dict[str, ChainLine] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    rewritten: dict[str, ChainProblem] = field(default_factory=dict)
    away: str = ""
    unread: str = ""
    lost: bool = False
    read_at: float = -EVERY_S

    def read(self, keys: PublicKeys) -> None:
        """What is new, if it is time; each time while the place is away."""
        if not self.away and time.monotonic() - self.read_at < EVERY_S:
            return
        try:
            lines, lost = self.source.news(keys)
        except AuditUnavailable as exc:
            self._tell_away(exc.detail)
            return
        self.read_at = time.monotonic()
        self._tell_away("")
        self.lost = self.lost or lost
        self._note(lines, keys)

    def _note(self, lines: Iterable[bytes], keys: PublicKeys) -> None:
        """Keep the newest anchor of each chain that a known key signed; checks few signatures."""
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

    def _tell_away(self, why: str) -> None:
        """Say once that a place went away or came back."""
        if bool(why) != bool(self.away):
            log, event = (_log.warning, "audit.anchors_away") if why else (_log.info, "audit.anchors_back")
            log(event, place=self.source.name, reason=why)
        self.away = why


class AnchorMonitor:
    """Compares the log with all anchors, at a bounded pace and at a constant cost for each chain.

    ``read`` comes before the log is read, ``compare`` after it: what an anchor names was in the log before.
    """

    def __init__(self, places: Iterable[RedisSink | FolderSink]) -> None:
        self._readers = [
            _Reader(_Stream(place) if isinstance(place, RedisSink) else _Files(place)) for place in places
        ]
        self.problems: tuple[ChainProblem, ...] = ()
        self.away: dict[str, str] = {}
        for each in self._readers:
            metrics.AUDIT_ANCHORS_OK.labels(each.source.name).set(_NAN)

    @property
    def places(self) -> Sequence[str]:
        """For people."""
        return [each.source.text for each in self._readers]

    def read(self, keys: PublicKeys) -> None:
        for each in self._readers:
            each.read(keys)

    def compare(self, log: LogState, unread: str = "") -> None:
        """Hold all that was read against the log as it is now; ``unread`` is why some of it is not known."""
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
                _log.error("audit.anchor_ahead", **_told(problem))

    def not_compared(self, why: str) -> None:
        """The log could not be read: what was found before stands, and nothing else is known."""
        self.away = {each.source.name: each.away or why for each in self._readers}
        for each in self._readers:
            if not any(problem.anchor == each.source.text for problem in self.problems):
                metrics.AUDIT_ANCHORS_OK.labels(each.source.name).set(_NAN)


def _told(problem: ChainProblem) -> dict[str, object]:
    return {
        "code": problem.code,
        "place": problem.anchor,
        "chain": problem.chain,
        "seq": problem.seq,
        "detail": problem.text,
    }


def _gone(reader: _Reader) -> list[ChainProblem]:
    if not reader.lost:
        return []
    text = f"anchors that were in {reader.source.text} are gone, or older: they were removed or put back"
    return [ChainProblem(LOST, text, anchor=reader.source.text)]


def _compared(
    reader: _Reader, log: LogState, ends: Mapping[str, Sequence[tuple[int, int]]], lost: Losses
) -> Iterable[ChainProblem]:
    place, reader.unread = reader.source.text, ""
    for name, anchor in list(reader.newest.items()):
        last_seq = ends[name][-1][1] if name in ends else -1
        if last_seq < anchor.seq:
            if is_lost(lost, anchor, last_seq):
                continue
            if name not in ends and log.is_retired(anchor.opened):
                del reader.newest[name]
                continue
            yield contradiction(CUT if name in ends else MISSING_CHAIN, anchor, place, last_seq)
        elif name in reader.fresh:
            try:
                has = _has(log, ends[name], anchor)
            except OSError as exc:
                reader.unread = f"a file of {name} cannot be read ({exc.strerror})"
                continue
            reader.fresh.discard(name)
            if not has:
                reader.rewritten[name] = contradiction(REWRITTEN, anchor, place, last_seq)
    yield from reader.rewritten.values()


def _has(log: LogState, ends: Sequence[tuple[int, int]], anchor: ChainLine) -> bool:
    """Whether the log has the very line of an anchor; also where its segment was retired meanwhile."""
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
