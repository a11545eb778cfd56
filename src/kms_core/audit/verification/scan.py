"""One pass over a stretch of a file: whether each line is what its head says, and follows the one before.

The heart of ``verify``; runs in several processes, so it takes and gives plain values.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final

from kms_core.audit import chain
from kms_core.audit.chain import END, HEAD, TAIL_BYTES, ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.verification.report import ChainProblem

_BLOCK_BYTES: Final = 4 * 1024 * 1024
_TIME_CHARS: Final = len("2026-01-01T00:00:00.000000Z")
_USUAL: Final = b'","operation":"'  # what follows the time of an operation while the clock runs forward
_STAGE: Final = b'"stage":"'
_MOST_PROBLEMS: Final = 100


@dataclass(frozen=True, slots=True)
class Span:
    """Whole lines of one file: bytes ``begin`` to ``end``. ``chain`` is the one that its first line names."""

    path: str
    begin: int
    end: int
    chain: str
    keys: dict[str, bytes]


@dataclass(slots=True)
class ScannedSpan:
    """What a stretch holds. ``before`` and ``head`` are what it continues and how it ends, in hex."""

    path: str
    chain: str
    lines: int = 0
    first_seq: int = -1
    last_seq: int = -1
    before: str = ""
    head: str = ""
    torn_bytes: int = 0
    signed_seq: int = -1
    first_time: str = ""
    last_time: str = ""
    problems: list[ChainProblem] = field(default_factory=list)
    special: list[ChainLine] = field(default_factory=list)
    stages: list[ChainLine] = field(default_factory=list)

    @property
    def ended_at(self) -> int:
        """The line that says it is the last one of its file; -1 if none does."""
        return next(
            (each.seq for each in self.special if each.kind in chain.ENDS and each.chain == self.chain), -1
        )

    def problem_behind_end(self, ended_at: int) -> ChainProblem:
        """The problem of lines behind the one that ended the file."""
        first = max(self.first_seq, ended_at + 1)
        text = (
            f"{self.last_seq - first + 1} lines behind line {ended_at}, which ends the file: its process "
            "wrote none there"
        )
        return ChainProblem("after_closed", text, self.chain, Path(self.path).name, first)


def scan(span: Span) -> ScannedSpan:
    """Read a stretch. Raises OSError."""
    with Path(span.path).open("rb") as file:
        return _Scan(span, file).run()


class _Scan:
    """``_before`` is the head that the next line continues, ``_expected`` its number; None if not known."""

    def __init__(self, span: Span, file: BinaryIO) -> None:
        self._span = span
        self._source = file
        self._keys = PublicKeys(span.keys)
        self._found = ScannedSpan(span.path, span.chain)
        self._expected: int | None = None
        self._before = chain.ZERO

    def run(self) -> ScannedSpan:
        found, lines = self._found, []
        for lines in self._blocks():
            if not found.lines:
                self._begin(lines[0])
            self._check(lines)
            found.lines += len(lines)
        ending = next(filter(None, map(chain.read, reversed(lines))), None)
        if ending is not None:
            found.last_time, found.last_seq, found.head = ending.time, ending.seq, ending.head
        return found

    def _blocks(self) -> Iterator[list[bytes]]:
        """Lines without their newline, many at a time; what follows the last newline is noted as torn."""
        self._source.seek(self._span.begin)
        left, rest = self._span.end - self._span.begin, b""
        while left > 0 and (block := self._source.read(min(left, _BLOCK_BYTES))):
            left -= len(block)
            *lines, rest = (rest + block).split(b"\n")
            if lines:
                yield lines
        self._found.torn_bytes = len(rest)

    def _begin(self, line: bytes) -> None:
        """Where the stretch takes up the chain: behind the line before it, or as its opening line says."""
        found = chain.read(line)
        if found is None:
            return
        self._expected = self._found.first_seq = found.seq
        self._found.first_time = found.time
        if self._span.begin:
            self._before = _head_before(self._source, self._span.begin)
        elif found.kind != chain.OPEN:
            self._problem(
                "gap", "the file does not begin with an opening record: its first lines are missing"
            )
            self._expected = None
        elif found.previous:
            self._before = chain.octets(found.previous) or chain.ZERO
        self._found.before = self._before.hex()

    def _check(self, lines: list[bytes]) -> None:
        """The hot loop: two hashes and two comparisons a line, and no JSON."""
        before, expected = self._before, self._expected
        middle = b',"chain":"%b","time":"' % self._span.chain.encode()
        for line in lines:
            head = sha256(before + sha256(line[:-TAIL_BYTES]).digest()).digest()
            start = b'{"seq":%d%b' % (expected or 0, middle)
            if not (line.startswith(start) and line.endswith(b"%b%b%b" % (HEAD, head.hex().encode(), END))):
                before, expected = self._diagnose(line, before, expected)
                continue
            at = len(start) + _TIME_CHARS
            if line[at : at + len(_USUAL)] != _USUAL or _STAGE in line:
                self._special(line, before)
            before = head
            expected = (expected or 0) + 1
        self._before, self._expected = before, expected

    def _diagnose(self, line: bytes, before: bytes, expected: int | None) -> tuple[bytes, int | None]:
        """Say what is wrong with a line, and go on from what it claims."""
        found, claimed = chain.read(line), chain.claimed_head(line)
        if found is None or claimed is None:
            self._problem("unreadable", "a line is no record: torn, fused or overwritten", expected)
            return before, None
        if found.chain != self._span.chain:
            self._problem("misplaced", f"a line of chain {found.chain}", found.seq)
        elif expected is None or found.seq == expected:
            if expected is not None and not chain.is_sound(before, line):
                self._problem("edited", "a line was changed after it was written", found.seq)
        elif found.seq > expected:
            self._problem("gap", f"lines {expected} to {found.seq - 1} are missing", expected)
        else:
            self._problem("reordered", "a line stands again, or after a later one", found.seq)
        if found.kind:
            self._found.special.append(found)
        return claimed, found.seq + 1

    def _special(self, line: bytes, before: bytes) -> None:
        """A line that is more than an operation, or one half of an effect."""
        found = chain.read(line)
        if found is None:
            return
        if found.stage:
            self._found.stages.append(found)
        if found.kind or found.clock:
            self._found.special.append(found)
        if found.kind in chain.SIGNED:
            self._signature(line, found, before)

    def _signature(self, line: bytes, found: ChainLine, before: bytes) -> None:
        if found.key not in self._keys.keys:
            self._problem("unknown_key", f"signed by a key that is not trusted here ({found.key})", found.seq)
        elif found.previous != before.hex() or self._keys.signed(line) is None:
            self._problem("bad_signature", "a checkpoint's signature does not fit", found.seq)
        else:
            self._found.signed_seq = found.seq

    def _problem(self, code: str, text: str, seq: int | None = None) -> None:
        if len(self._found.problems) < _MOST_PROBLEMS:
            where = Path(self._span.path).name
            self._found.problems.append(
                ChainProblem(code, text, self._span.chain, where, -1 if seq is None else seq)
            )


def _head_before(file: BinaryIO, begin: int) -> bytes:
    """What the line that ends at ``begin`` says its head is; the stretch before this one checks that."""
    tail = os.pread(file.fileno(), TAIL_BYTES + 1, max(0, begin - TAIL_BYTES - 1))
    return chain.claimed_head(tail[:-1]) or chain.ZERO


def head_before(path: Path, begin: int) -> bytes:
    """The same of a file by its name. Raises OSError."""
    with path.open("rb") as file:
        return _head_before(file, begin)
