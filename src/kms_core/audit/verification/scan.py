"""Scan of a segment, or of its end: checks head, number and signature of each line.

Also the classes of a verification report.
"""

import os
from binascii import b2a_hex
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final, Literal

from kms_core.audit import chain
from kms_core.audit.chain import END, HEAD, TAIL_BYTES, ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.segments import LONGEST_LINE_BYTES, Segment

MOST_PROBLEMS: Final = 100
"""Of one segment; more are not reported."""
State = Literal["closed", "open", "cut or crashed"]
Verdict = Literal["intact", "open end", "late", "not compared", "damaged"]


@dataclass(frozen=True, slots=True)
class ChainProblem:
    """A violation of the chain. ``code`` is stable, ``text`` is for people; ``seq`` -1 means no line.

    ``anchor`` is the sink whose anchor the log contradicts, ``anchor_seq`` the line that the anchor names.
    """

    code: str
    text: str
    chain: str = ""
    file: str = ""
    seq: int = -1
    anchor: str = ""
    anchor_seq: int = -1


@dataclass(frozen=True, slots=True)
class Note:
    """An observation that violates nothing."""

    code: str
    text: str
    chain: str = ""
    seq: int = -1


@dataclass(slots=True)
class ChainReport:
    """The state of one chain. ``signed_seq`` is its last line with a good signature, -1 if it has none."""

    chain: str
    files: int
    lines: int
    first_seq: int
    last_seq: int
    first_time: str
    last_time: str
    state: State
    signed_seq: int
    witness: str = ""


@dataclass(slots=True)
class VerificationReport:
    """The result of a verification. ``trusted``: the keys came from elsewhere than the log itself.

    ``not_compared`` has the sinks whose anchors could not be read, each with the reason. ``late_since``: when
    the first line was named that a copy lacks at its end; empty if it lacks none. ``is_late``: too long ago.
    """

    trusted: bool
    lines: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    chains: list[ChainReport] = field(default_factory=list)
    problems: list[ChainProblem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)
    late_since: str = ""
    is_late: bool = False

    @property
    def verdict(self) -> Verdict:
        """``open end``: no violation, but a chain has neither a closing line nor a witness of its end.

        ``not compared``: the log may be older than anchors that could not be read. ``late``: a copy is too
        old, or was cut.
        """
        if self.problems:
            return "damaged"
        if self.not_compared:
            return "not compared"
        if self.is_late:
            return "late"
        return "open end" if self.has_open_end else "intact"

    @property
    def has_open_end(self) -> bool:
        """Return whether a chain has neither a closing line nor a witness of its end."""
        return any(each.state == "cut or crashed" and not each.witness for each in self.chains)


_BLOCK_BYTES: Final = 4 * 1024 * 1024
_TIME_CHARS: Final = len("2026-01-01T00:00:00.000000Z")
_USUAL: Final = b'","operation":"'  # follows the time of an operation while the clock runs forward
_STAGE: Final = b'"stage":"'
_TOO_LONG: Final = b"\0"
"""Replaces a line of more than 1 MiB."""


@dataclass(slots=True)
class ScannedSpan:
    """The result of a scan. ``before`` is the head before the first line, ``head`` the last one (in hex).

    ``chain`` is the chain in the first line of the segment. ``end`` is the offset behind the last whole line.
    ``heads`` has those of signed lines, by number.
    """

    path: Path
    chain: str
    lines: int = 0
    first_seq: int = -1
    last_seq: int = -1
    before: str = ""
    head: str = ""
    end: int = 0
    torn_bytes: int = 0
    signed_seq: int = -1
    first_time: str = ""
    last_time: str = ""
    heads: dict[int, str] = field(default_factory=dict)
    problems: list[ChainProblem] = field(default_factory=list)
    special: list[ChainLine] = field(default_factory=list)
    stages: list[ChainLine] = field(default_factory=list)


def scan(segment: Segment, keys: PublicKeys, end: int, begin: int = 0) -> ScannedSpan:
    """Scan the bytes of a segment between two offsets, where lines begin. Raises OSError."""
    with segment.path.open("rb") as file:
        return _Scan(segment, keys, file).run(begin, end)


class _Scan:
    """``_before`` is the head before the next line, ``_expected`` its number; None if it is not known."""

    def __init__(self, segment: Segment, keys: PublicKeys, file: BinaryIO) -> None:
        self._chain = segment.chain
        self._source = file
        self._keys = keys
        self._found = ScannedSpan(segment.path, segment.chain)
        self._expected: int | None = None
        self._before = chain.ZERO

    def run(self, begin: int, end: int) -> ScannedSpan:
        found, lines = self._found, []
        for lines in self._blocks(begin, end):
            if not found.lines:
                self._begin(lines[0], begin)
            self._check(lines)
            found.lines += len(lines)
        ending = next(filter(None, map(chain.read, reversed(lines))), None)
        if ending is not None:
            found.last_time, found.last_seq, found.head = ending.time, ending.seq, ending.head
        if self._expected is not None:  # by position: a line may have a second number, or be no JSON
            found.last_seq, found.head = self._expected - 1, self._before.hex()
        found.end = end - found.torn_bytes
        return found

    def _blocks(self, begin: int, end: int) -> Iterator[list[bytes]]:
        """Lines without their newline, many at a time; bytes after the last newline count as torn."""
        self._source.seek(begin)
        left, rest = end - begin, b""
        while left > 0 and (block := self._source.read(min(left, _BLOCK_BYTES))):
            left -= len(block)
            *lines, rest = (rest + block).split(b"\n")
            if lines:
                yield [line if len(line) <= LONGEST_LINE_BYTES else _TOO_LONG for line in lines]
        if len(rest) > LONGEST_LINE_BYTES:
            self._diagnose(_TOO_LONG, self._before, self._expected)
        self._found.torn_bytes = len(rest)

    def _begin(self, line: bytes, begin: int) -> None:
        """Set number and head before the first line: from the line before it, or the opening line."""
        found = chain.read(line)
        if found is None:
            return
        self._expected = self._found.first_seq = found.seq
        self._found.first_time = found.time
        if begin:
            self._before = head_before(self._found.path, begin)
        elif found.kind != chain.OPEN:
            self._problem(
                "gap", "the file does not begin with an opening record: its first lines are missing"
            )
            self._expected = None
        elif found.previous:
            self._before = chain.from_hex(found.previous) or chain.ZERO
        self._found.before = self._before.hex()

    def _check(self, lines: list[bytes]) -> None:
        """Check lines by two hashes and two comparisons each, without parsing them: this is the hot loop."""
        before, expected = self._before, self._expected
        middle = b',"chain":"%b","time":"' % self._chain.encode()
        for line in lines:
            if expected is None:
                before, expected = self._diagnose(line, before, expected)
                continue
            head = sha256(before + sha256(line[:-TAIL_BYTES]).digest()).digest()
            start = b'{"seq":%d%b' % (expected, middle)
            if not (line.startswith(start) and line.endswith(b"%b%b%b" % (HEAD, b2a_hex(head), END))):
                before, expected = self._diagnose(line, before, expected)
                continue
            if not line.startswith(_USUAL, len(start) + _TIME_CHARS) or _STAGE in line:
                self._special(line, before, expected)
            before = head
            expected += 1
        self._before, self._expected = before, expected

    def _diagnose(self, line: bytes, before: bytes, expected: int | None) -> tuple[bytes, int | None]:
        """Report the problem of a line, and go on from the number and head that it has."""
        if line is _TOO_LONG:
            self._problem("unreadable", "a line has more than 1 MiB, and is not a record", expected)
            return before, None
        found, claimed = chain.read(line), chain.claimed_head(line)
        if found is None or claimed is None:
            self._problem("unreadable", "a line is not a record: torn, joined or overwritten", expected)
            return before, None
        if found.chain != self._chain:
            self._problem("misplaced", f"a line of chain {found.chain}", found.seq)
        elif expected is None or found.seq == expected:
            if expected is not None:  # another head, or another form of the line
                self._problem("edited", "a line was changed after it was written", found.seq)
        elif found.seq > expected:
            self._problem("gap", f"lines {expected} to {found.seq - 1} are missing", expected)
        else:
            self._problem("reordered", "a line is repeated, or follows a later one", found.seq)
        if found.kind:
            self._keep(found)
        return claimed, found.seq + 1

    def _special(self, line: bytes, before: bytes, expected: int) -> None:
        """Keep a line that is not a plain operation: a line of the chain, or an intent or outcome.

        JSON allows a second ``seq`` or ``chain``, by which a line could pass for one before a signature.
        """
        found = chain.read(line)
        if found is None or (found.seq, found.chain) != (expected, self._chain):
            self._problem("unreadable", "a line is not a record, or has two numbers or chains", expected)
            return
        if found.stage:
            self._found.stages.append(found)
        if found.kind or found.clock:
            self._keep(found)
        if found.kind in chain.SIGNED:
            self._signature(line, found, before)

    def _keep(self, found: ChainLine) -> None:
        self._found.special.append(found)
        if found.kind in chain.SIGNED and found.chain == self._chain:
            self._found.heads[found.seq] = found.head

    def _signature(self, line: bytes, found: ChainLine, before: bytes) -> None:
        if found.key not in self._keys.keys:
            self._problem("unknown_key", f"signed by a key that is not trusted here ({found.key})", found.seq)
        elif found.previous != before.hex() or self._keys.signed(line) is None:
            self._problem("bad_signature", "a checkpoint's signature does not fit", found.seq)
        else:
            self._found.signed_seq = found.seq

    def _problem(self, code: str, text: str, seq: int | None = None) -> None:
        if len(self._found.problems) < MOST_PROBLEMS:
            where, number = self._found.path.name, -1 if seq is None else seq
            self._found.problems.append(ChainProblem(code, text, self._chain, where, number))


def head_before(path: Path, begin: int) -> bytes:
    """The head in the line that ends at ``begin``, unchecked."""
    with path.open("rb") as file:
        tail = os.pread(file.fileno(), TAIL_BYTES + 1, max(0, begin - TAIL_BYTES - 1))
    return chain.claimed_head(tail[:-1]) or chain.ZERO
