"""Comparison of the log with its anchors, the signed lines in sinks.

An anchor proves that its chain once had a line with this number and head. A log without that line is older
than the anchor, was cut, or was rewritten. After restoring a backup, an operator acknowledges the loss in the
log (``acknowledged``): anchors of the lost lines then are notes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import structlog

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.sinks import ANCHORS_SUFFIX, FolderSink, RedisSink, files_in, line_of
from kms_core.audit.verification.scan import ChainProblem
from kms_protocol.errors import AuditUnavailable

CUT: Final = "cut"
MISSING_CHAIN: Final = "missing_chain"
REWRITTEN: Final = "rewritten"
ACKNOWLEDGED: Final = "audit.acknowledge_loss"
"""The operation of the record; its effect names the lost lines, see ``effect_of``."""
NONE_OF_THIS_LOG: Final = "it has no anchor of this log: they were removed, or none was written yet"
_MOST_DIGITS: Final = 19  # of a line number, at most 2^63 - 1
_FIRST_READ: Final = 10_000  # entries of a stream, when a process starts; ``kms audit verify`` reads all
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


# -- reading them again and again ---------------------------------------------------------------------


class _Stream:
    """Anchors in Redis. An entry that existed two reads ago must still exist.

    Entries of the last seconds may be lost when a replica takes over.
    """

    text, damaged = "Redis", ""

    def __init__(self, stream: RedisSink) -> None:
        self._stream = stream
        self._settled = self._last = ""

    def news(self, keys: PublicKeys) -> tuple[list[bytes], bool]:
        del keys
        begin = self._settled or self._last
        found = self._stream.entries(begin) if begin else self._stream.newest(_FIRST_READ)
        first = found[0][0].decode() if found else ""
        lost = bool(begin) and (not found or (bool(self._settled) and first != begin))
        if lost:
            found = self._stream.newest(_FIRST_READ)
        self._settled = "" if lost else self._last
        self._last = found[-1][0].decode() if found else ""
        return list(map(line_of, found)), lost


class _Files:
    """Anchors in a directory: the newest that a known key signed, of each file that changed or is damaged."""

    def __init__(self, folder: FolderSink) -> None:
        self._path = folder.path
        self.text = str(folder.path)
        self._sizes: dict[str, int] = {}
        self._damaged: dict[str, str] = {}

    @property
    def damaged(self) -> str:
        return next(iter(self._damaged.values()), "")

    def news(self, keys: PublicKeys) -> tuple[list[bytes], bool]:
        sizes = {path.name: self._size(path) for path in files_in(self._path, ANCHORS_SUFFIX)}
        self._damaged = {name: why for name, why in self._damaged.items() if name in sizes}
        wanted = [
            name for name, size in sizes.items() if size != self._sizes.get(name) or name in self._damaged
        ]
        lines = [self._newest(name, keys) for name in wanted if sizes[name]]
        lost = any(sizes.get(name, 0) < size for name, size in self._sizes.items())
        self._sizes = sizes
        return lines, lost

    def _size(self, path: Path) -> int:
        """The size of a file; that of one out of reach is as before, and it is read to say why."""
        try:
            return path.stat().st_size
        except OSError as exc:
            self._damaged[path.name] = f"{path} cannot be read ({exc.strerror})"
            return self._sizes.get(path.name, 1)

    def _newest(self, name: str, keys: PublicKeys) -> bytes:
        """The newest anchor in a file, or the first if none is near its end; empty if it has none."""
        path = self._path / name
        try:
            line, after = segments.newest_signed(path, keys)
            first = b"" if line else segments.first_line(path)
        except OSError as exc:  # other files are compared all the same
            self._damaged[name] = f"{path} cannot be read ({exc.strerror})"
            return b""
        begin = chain.read(first)
        is_foreign = begin is not None and begin.kind in chain.SIGNED and begin.key not in keys.keys
        self._damaged.pop(name, None)
        if (after or not line) and not is_foreign:
            self._damaged[name] = f"{path} is damaged: lines after its newest anchor are not anchors"
        return line or first


class AnchorReader:
    """Reads the anchors of a sink repeatedly, and keeps the newest line of each chain (``newest``).

    ``name`` is the label of the sink in metrics, ``text`` is for people. ``lost`` is True once anchors are
    gone that were there before.
    """

    def __init__(self, sink: RedisSink | FolderSink) -> None:
        self._source: _Stream | _Files = _Stream(sink) if isinstance(sink, RedisSink) else _Files(sink)
        self._seqs: dict[str, int] = {}
        self._away = ""
        self.name, self.text = sink.name, self._source.text
        self.newest: dict[str, bytes] = {}
        self.lost = False

    @property
    def unread(self) -> str:
        """The reason why newer anchors may exist that could not be read; empty without one."""
        return self._away or self._source.damaged

    def read(self, keys: PublicKeys) -> None:
        """Read new anchors; logs when the sink begins or ceases to fail."""
        try:
            lines, lost = self._source.news(keys)
            why = ""
        except AuditUnavailable as exc:
            lines, lost, why = [], False, exc.detail
        if bool(why) != bool(self._away):
            log, event = (_log.warning, "audit.anchors_away") if why else (_log.info, "audit.anchors_back")
            log(event, place=self.name, reason=why)
        self._away, self.lost = why, self.lost or lost
        done: set[str] = set()
        for raw in reversed(lines):  # of each chain, one signature is checked
            found = chain.read(raw)
            if found is None or found.chain in done or found.seq <= self._seqs.get(found.chain, -1):
                continue
            if keys.signed(raw):
                self.newest[found.chain], self._seqs[found.chain] = raw, found.seq
                done.add(found.chain)
