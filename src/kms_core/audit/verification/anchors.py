"""Comparison of the log with its anchors, the signed lines in sinks.

An anchor proves that its chain once had a line with this number and head. A log without that line is older
than the anchor, was cut, or was rewritten. After restoring a backup, an operator acknowledges the loss in the
log (``acknowledged``): anchors of the lost lines then are notes.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.sinks import ANCHORS_SUFFIX, FolderSink, RedisSink, files_in, line_of
from kms_protocol.errors import AuditUnavailable

CUT: Final = "cut"
MISSING_CHAIN: Final = "missing_chain"
REWRITTEN: Final = "rewritten"
ACKNOWLEDGED: Final = "audit.acknowledge_loss"
"""The operation of the record; its effect names the lost lines, see ``effect_of``."""
NONE_OF_THIS_LOG: Final = "it has no anchor of this log: they were removed, or none was written yet"
_EFFECT: Final = re.compile(r"(.+):([0-9]{1,19})-([0-9]{1,19})-[0-9a-f]+")  # numbers of at most 2^63 - 1
_FIRST_READ: Final = 10_000  # entries of a stream, when a process starts; ``kms audit verify`` reads all
Losses = Mapping[str, tuple[int, int]]
"""Lines whose loss was acknowledged: of each chain, the first and the last."""


def effect_of(name: str, first: int, last: int) -> str:
    """The effect in the record of an acknowledged loss: the chain, and its last and first lost line."""
    return f"{name}:{last}-{first}"


def acknowledged(lines: Iterable[ChainLine]) -> Losses:
    """The losses in the given records, which a signature must cover."""
    found: dict[str, tuple[int, int]] = {}
    for line in lines:
        effect = _EFFECT.fullmatch(line.effect)
        if effect and line.operation == ACKNOWLEDGED and line.stage == "outcome":
            name, last, first = effect[1], int(effect[2]), int(effect[3])
            before = found.get(name, (first, last))
            found[name] = min(before[0], first), max(before[1], last)
    return found


def is_lost(lost: Losses, anchor: ChainLine, last_seq: int) -> bool:
    """True if the loss of all lines from a chain's end (``last_seq``) to the anchor's is acknowledged."""
    first, last = lost.get(anchor.chain, (0, -1))
    return first <= last_seq + 1 and anchor.seq <= last


# -- reading them again and again ---------------------------------------------------------------------


class _Stream:
    """Anchors in Redis. An entry that existed two reads ago must still exist.

    Entries of the last seconds may be lost when a replica takes over.
    """

    text, damaged = "Redis", ""

    def __init__(self, stream: RedisSink) -> None:
        self._stream = stream
        self._settled = self._last = ""

    def news(self, _keys: PublicKeys) -> tuple[list[bytes], bool]:
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
        self._seen: dict[Path, tuple[int, str]] = {}  # size, and what is wrong

    @property
    def damaged(self) -> str:
        return next((why for _, why in self._seen.values() if why), "")

    def news(self, keys: PublicKeys) -> tuple[list[bytes], bool]:
        seen: dict[Path, tuple[int, str]] = {}
        lines: list[bytes] = []
        for path in files_in(self._path, ANCHORS_SUFFIX):
            size, why = self._seen.get(path, (0, ""))
            try:
                size_before, size = size, path.stat().st_size
                if size != size_before or why:
                    line, why = _newest(path, keys)
                    lines.append(line)
            except OSError as exc:  # other files are compared all the same
                why = f"{path} cannot be read ({exc.strerror})"
            seen[path] = size, why
        lost = any(seen.get(path, (0, ""))[0] < size for path, (size, _) in self._seen.items())
        self._seen = seen
        return lines, lost


def _newest(path: Path, keys: PublicKeys) -> tuple[bytes, str]:
    """The newest anchor in a file, or the first line if none is near its end; and what is wrong with it."""
    line, after = segments.newest_signed(path, keys)
    first = line or next(segments.lines_of(path), b"")
    begin = chain.read(first)
    is_foreign = begin is not None and begin.kind in chain.SIGNED and begin.key not in keys.keys
    if (line and not after) or is_foreign:
        return first, ""
    return first, f"{path} is damaged: lines after its newest anchor are not anchors"


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
        """Read new anchors."""
        try:
            lines, lost = self._source.news(keys)
            why = ""
        except AuditUnavailable as exc:
            lines, lost, why = [], False, exc.detail
        self._away, self.lost = why, self.lost or lost
        for raw in reversed(lines):  # of each chain, the latest comes first: one signature is checked
            found = chain.read(raw)
            if found is None or found.seq <= self._seqs.get(found.chain, -1):
                continue
            if keys.signed(raw):
                self.newest[found.chain], self._seqs[found.chain] = raw, found.seq
