"""Compares the segments of a log with each other, with the heads in other chains, and with anchors.

Notes of an operator acknowledge a loss: what they name is reported, and no damage.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Final

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.hosts import complete_to
from kms_core.audit.keys import PublicKeys
from kms_core.audit.segments import Segment
from kms_core.audit.verification.anchors import (
    CUT,
    MISSING_CHAIN,
    NONE_OF_THIS_LOG,
    REWRITTEN,
    acknowledged,
    is_lost,
)
from kms_core.audit.verification.scan import (
    ChainProblem,
    ChainReport,
    Note,
    ScannedSpan,
    State,
    VerificationReport,
)

_INTERVAL_LINES: Final = 1_100
"""Lines between two signed ones with the default settings: 1,000, and those that one batch adds."""
Anchors = Mapping[str, Sequence[bytes]]
"""Signed lines by the name of their sink."""
Files = Sequence[tuple[Segment, ScannedSpan]]
"""The segments of one chain, in order, each with its scan."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A line of a chain with its head (hex), as ``by``, another chain or an anchor, named it at a time.

    ``opened`` is the opening time of its segment.
    """

    chain: str
    seq: int
    head: str
    opened: str
    by: str
    time: str


@dataclass(slots=True)
class Lateness:
    """Decides which lines that a copy lacks are late: newer than the copy, rather than missing.

    ``last`` has the last line of each chain. The copy must have every line that was named up to the time
    ``complete_to``. None for an original log, which has no late lines.
    """

    last: Mapping[str, int]
    complete_to: str | None
    since: str = ""
    _late: dict[str, tuple[int, str]] = field(default_factory=dict)

    def covers(self, claim: Claim) -> bool:
        """Return whether the line of a claim is late; ``notes`` then has it."""
        name, seq, time = claim.chain, claim.seq, claim.time
        if self.complete_to is None or seq <= self.last.get(name, -1) or time <= self.complete_to:
            return False
        self.since = min(self.since or time, time)
        if seq > self._late.get(name, (-1, ""))[0]:
            self._late[name] = seq, f"{claim.by} named the last at {time}"
        return True

    def notes(self) -> Iterator[Note]:
        for name, (seq, text) in self._late.items():
            first = self.last.get(name, -1) + 1
            yield Note("late", f"lines {first} to {seq} are not in the copy yet: {text}", name, first)


_REASONS: Final = {
    "vanished": "its file was deleted or moved while it was written",
    "disturbed": "its file was truncated, or written to by another program",
    "torn": "a part of a line could not be removed",
    "unsynced": "the disk failed to store its lines",
}


def notes_of(lines: Iterable[ChainLine]) -> Iterator[Note]:
    """Notes of clocks, full disks and lost files that are in the chains."""
    for line in lines:
        if line.clock:
            yield Note("clock_behind", f"the clock showed {line.clock} at {line.time}", line.chain, line.seq)
        if line.kind == chain.RESUMED:
            text = f"{line.refused} records could not be written before; their operations were refused"
            yield Note("resumed", text, line.chain, line.seq)
        elif line.kind == chain.OPEN and line.reason in _REASONS:
            yield Note(line.reason, _REASONS[line.reason], line.chain, line.seq)


def unresolved(stages: Iterable[Iterable[ChainLine]]) -> Iterator[Note]:
    """Effects with an intent and without an outcome."""
    open_: dict[str, ChainLine] = {}
    ended: set[str] = set()
    for line in (line for each in stages for line in each):
        if line.stage == "outcome":
            ended.add(line.effect)
        else:
            open_[line.effect] = line
    for name in open_.keys() - ended:
        line = open_[name]
        yield Note("no_outcome", f"{line.operation} {name} has no outcome", line.chain, line.seq)


def open_ends(report: VerificationReport) -> Iterator[Note]:
    """Chains without a closing line, and what confirms their ends."""
    for each in report.chains:
        if each.state == "cut or crashed":
            seen = f"; {each.witness} confirms its end" if each.witness else ", and nothing confirms its end"
            text = f"the chain has no closing record: cut or crashed{seen}{_unsigned(each)}"
            yield Note("cut_or_crashed", text, each.chain, each.last_seq)


def _unsigned(made: ChainReport) -> str:
    count = made.last_seq - made.signed_seq
    if not count:
        return ""
    doubt = "any program that can write to the folder may have changed, removed or added some"
    return f"; its last {count} lines are not signed: {doubt}"


@dataclass(slots=True)
class Removals:
    """Recorded removals: segments opened up to the time ``horizon`` may be gone.

    ``search`` finds that time in all of the log, where only a part of it was scanned.
    """

    horizon: str = ""
    search: Callable[[], str] = str
    _searched: str = ""

    def cover(self, opened: str) -> bool:
        """Return whether a segment opened at a time may be gone; False for no time. Raises OSError."""
        if opened > max(self.horizon, self._searched):
            self.horizon, self._searched = max(self.horizon, self.search()), opened
        return "" < opened <= self.horizon


def crosscheck(  # noqa: PLR0913 -- a log, its keys and anchors; and what is known of it
    report: VerificationReport,
    found: Mapping[Segment, ScannedSpan],
    anchors: Anchors,
    keys: PublicKeys,
    removals: Removals,
    *,
    is_copy: bool = False,
    unread: Collection[str] = (),
) -> None:
    """Fill in the report. Only anchors with a signature by one of ``keys`` count.

    ``is_copy``: lines that may not have been copied yet are late, not missing. ``unread`` are chains of
    which a segment is not known. Raises OSError.
    """
    chains: dict[str, list[tuple[Segment, ScannedSpan]]] = {}
    for segment, each in sorted(found.items()):
        chains.setdefault(segment.chain, []).append((segment, each))
        report.problems += each.problems
    lines = [line for each in found.values() for line in each.special]
    retired = (line.before for each in found.values() for line in each.special if _retires(line, each))
    removals.horizon = max((removals.horizon, *retired))
    seen = _seen(lines)
    signed_to = {name: max(each.signed_seq for _, each in files) for name, files in chains.items()}
    witnesses = _seen(line for line in lines if line.seq <= signed_to.get(line.chain, -1))
    times = (*(each.last_time for each in found.values()), *(line.time for line in lines))
    log = _Log(chains, removals, complete_to(times) if is_copy else None)
    for name, files in chains.items():
        if name not in unread:
            report.problems += _joints(files, removals)
        made = _chain_report(name, files)
        report.chains.append(made)
        report.problems += _torn(files, made)
        report.problems += _after_end(files)
        report.notes += _misplaced(files)
        _witness(files, made, witnesses.get(name))
    for name in seen:  # an unsigned claim never replaces a signed one
        claims = [each[name] for each in (witnesses, seen) if name in each and not log.is_late(each[name])]
        report.problems += islice(filter(None, map(log.contradiction, claims)), 1)
    for sink, kept in anchors.items():
        newest = _compared_with_anchors(report, log, sink, kept, keys)
        for made in report.chains:
            if made.state == "cut or crashed" and newest.get(made.chain, -1) in _ends(chains, made, is_copy):
                made.witness = made.witness or f"the anchor in {sink}"
        _note_coverage(report, sink, newest, witnesses)
    report.late_since = log.late.since
    report.lines = sum(each.lines for each in found.values())
    report.notes += [
        *log.late.notes(),
        *notes_of(lines),
        *unresolved(each.stages for each in found.values()),
        *open_ends(report),
    ]


def _retires(line: ChainLine, found: ScannedSpan) -> bool:
    """True if a line records a removal; without a signature over it, any program may have written it."""
    return line.kind == chain.RETIRED and line.seq < found.signed_seq


def _seen(lines: Iterable[ChainLine]) -> dict[str, Claim]:
    """The latest head of each chain in lines of other chains."""
    seen: dict[str, Claim] = {}
    for line in lines:
        for name, head in line.heads.items():
            if name not in seen or seen[name].seq < head.seq:
                seen[name] = Claim(name, head.seq, head.head, head.opened, line.chain, line.time)
    return seen


def _ends(chains: Mapping[str, Files], made: ChainReport, is_copy: bool) -> set[int]:
    """The lines whose anchor confirms the end of a chain; in a copy also the last signed one."""
    goes_on = is_copy and made.last_seq <= _credible(chains[made.chain], made.signed_seq)
    return {made.last_seq, made.signed_seq} if goes_on else {made.last_seq}


# -- anchors -----------------------------------------------------------------------------------------


class _Log:
    """The log as claims are compared with it: its chains, and the last line of each.

    ``heads`` has those of signed lines, not all where only a part of the log was scanned. ``lost`` has the
    lines whose loss was acknowledged: of each chain, the first and the last number. ``late`` decides
    which may not have been copied yet.
    """

    def __init__(self, chains: Mapping[str, Files], removals: Removals, complete_to: str | None) -> None:
        """``complete_to`` is that of ``Lateness``."""
        parts = [found for files in chains.values() for _, found in files]
        self.chains, self.removals = chains, removals
        self.last = {name: max(found.last_seq for _, found in files) for name, files in chains.items()}
        self.heads = {(found.chain, seq): head for found in parts for seq, head in found.heads.items()}
        self.lost = acknowledged(
            line for found in parts for line in found.stages if line.seq < found.signed_seq
        )
        self.late = Lateness(self.last, complete_to)

    def contradiction(self, claim: Claim) -> ChainProblem | None:
        """The problem that a claim proves, if it is genuine; None if the log has its line. Raises OSError.

        The line may be missing if its removal was recorded, or a gap that is a problem of its own.
        """
        name, seq, last = claim.chain, claim.seq, self.last.get(claim.chain, -1)
        text = f"{claim.by} names line {seq} at {claim.time}"
        if name not in self.chains or seq < self.chains[name][0][1].first_seq:
            if self.removals.cover(claim.opened):
                return None
            text = f"a chain of at least {seq + 1} lines is missing: {text}"
            return ChainProblem(MISSING_CHAIN, text, name, seq=seq)
        if seq > last:
            text = f"lines {last + 1} to {seq} are missing: {text}, and the log ends at line {last}"
            return ChainProblem(CUT, text, name, self.chains[name][-1][0].path.name, last + 1)
        if self._has(claim):
            return None
        text = f"{text}, and the log has another line there: the chain was rewritten"
        return ChainProblem(REWRITTEN, text, name, seq=seq)

    def _has(self, claim: Claim) -> bool:
        heads: list[str] = []
        for segment, found in self.chains[claim.chain]:
            if found.first_seq <= claim.seq <= found.last_seq:
                if claim.seq not in found.heads:  # not signed, or in a part that was not scanned
                    head = chain.claimed_head(segments.line_of(segment.path, claim.seq)) or b""
                    found.heads[claim.seq] = head.hex()
                heads.append(found.heads[claim.seq])
        return not heads or claim.head in heads

    def is_late(self, claim: Claim) -> bool:
        """Return whether the line that another chain names may not have been copied yet."""
        return not self.removals.cover(claim.opened) and self.late.covers(claim)


def _compared_with_anchors(
    report: VerificationReport, log: _Log, sink: str, kept: Sequence[bytes], keys: PublicKeys
) -> Mapping[str, int]:
    """Compare the log with every anchor of a sink; the newest anchor of each chain that the log has.

    A signature is checked only where an anchor and the log differ: an equal line was checked in the log.
    """
    newest: dict[str, int] = {}
    reported: set[tuple[str, str]] = set()
    parsed = _parsed(kept)
    if len(parsed) < len(kept):
        text = f"{len(kept) - len(parsed)} lines in {sink} are not anchors: anchors may have been damaged"
        report.notes.append(Note("anchors_damaged", text))
    for raw, anchor in parsed:
        name, last = anchor.chain, log.last.get(anchor.chain, -1)
        claim = Claim(name, anchor.seq, anchor.head, anchor.opened, f"the anchor in {sink}", anchor.time)
        is_known = log.heads.get((name, anchor.seq)) == anchor.head
        problem = None if is_known else log.contradiction(claim)
        if problem is None:
            if name in log.chains:
                newest.setdefault(name, anchor.seq)
            continue
        if (name, problem.code) in reported or keys.signed(raw) is None or log.late.covers(claim):
            continue
        reported.add((name, problem.code))
        if problem.code != REWRITTEN and is_lost(log.lost, anchor, last):
            report.notes.append(Note("acknowledged", f"{problem.text}; the loss was acknowledged", name))
        else:
            report.problems.append(replace(problem, anchor=sink, anchor_seq=anchor.seq))
    return newest


def _parsed(kept: Iterable[bytes]) -> list[tuple[bytes, ChainLine]]:
    """The anchors, those of the latest lines first."""
    read = ((raw, chain.read(raw)) for raw in kept)
    return sorted(((raw, line) for raw, line in read if line), key=lambda each: -each[1].seq)


def _note_coverage(
    report: VerificationReport, sink: str, newest: Mapping[str, int], seen: Mapping[str, Claim]
) -> None:
    """Note what the anchors of a sink do not prove: they are written after the log, and may be removed."""
    signed = [made for made in report.chains if made.signed_seq >= 0]
    if signed and not newest and not any(problem.anchor == sink for problem in report.problems):
        report.not_compared[sink] = NONE_OF_THIS_LOG
        return
    bare = [made for made in signed if newest.get(made.chain, -1) < _due(made, seen)]
    if bare:
        others = f", and of {len(bare) - 1} other chains" if len(bare) > 1 else ""
        text = (
            f"{sink} has no anchor of its end{others}, and no other chain names it: the anchor was not "
            "written, or was removed; whether lines were cut there is not known"
        )
        report.notes.append(Note("not_anchored", text, bare[0].chain, bare[0].signed_seq))


def _due(made: ChainReport, seen: Mapping[str, Claim]) -> int:
    """The line from which on an anchor is due: the last signed one, unless another chain names it.

    Of a chain that is being written, any line: the next checkpoint will be anchored soon.
    """
    known = made.chain in seen and seen[made.chain].seq >= made.signed_seq
    return -1 if known else 0 if made.state == "open" else made.signed_seq


# -- one chain ---------------------------------------------------------------------------------------


def _joints(files: Files, removals: Removals) -> Iterator[ChainProblem]:
    """Problems of missing segments, and of segments that do not continue the one before."""
    first, found = files[0]
    opening = _opening(found)
    if first.number > 1 and not (opening is not None and removals.cover(opening.previous_opened)):
        missing = f"file {first.number - 1} of the chain and all before it are missing"
        yield ChainProblem("missing_file", missing, first.chain)
    for (before, earlier), (segment, later) in pairwise(files):
        if segment.number == before.number:
            yield ChainProblem(
                "duplicate_file", "two files have the same number", segment.chain, segment.path.name
            )
        elif segment.number > before.number + 1:
            missing = f"files {before.number + 1} to {segment.number - 1} of the chain are missing"
            yield ChainProblem("missing_file", missing, segment.chain)
        elif later.lines and (later.first_seq, later.before) != (earlier.last_seq + 1, earlier.head):
            cut = (
                f"the next file continues line {later.first_seq - 1}, and this one ends at {earlier.last_seq}"
            )
            yield ChainProblem("cut", cut, before.chain, before.path.name, earlier.last_seq)


def _opening(found: ScannedSpan) -> ChainLine | None:
    return next((line for line in found.special if line.kind == chain.OPEN), None)


def _chain_report(name: str, files: Files) -> ChainReport:
    last, found = files[-1]
    return ChainReport(
        chain=name,
        files=len(files),
        lines=sum(each.lines for _, each in files),
        first_seq=files[0][1].first_seq,
        last_seq=found.last_seq,
        first_time=files[0][1].first_time,
        last_time=found.last_time,
        state=_state(last, found),
        signed_seq=max(each.signed_seq for _, each in files),
    )


def _state(segment: Segment, found: ScannedSpan) -> State:
    ending = found.special[-1] if found.special else None
    if ending is not None and ending.kind == chain.CLOSED and ending.seq == found.last_seq:
        return "closed"
    return "open" if segments.is_live(segment.path) else "cut or crashed"


def _torn(files: Files, made: ChainReport) -> Iterator[ChainProblem]:
    """Problems of torn last lines, but for those that a crash explains or the next segment records."""
    nexts = [_opening(found) for _, found in files[1:]]
    known = [after is not None and after.reason == "torn" for after in nexts]
    for (segment, found), is_known in zip(files, [*known, made.state != "closed"], strict=True):
        if found.torn_bytes and not is_known:
            yield ChainProblem(
                "unreadable",
                f"{found.torn_bytes} bytes after the last record",
                segment.chain,
                segment.path.name,
                found.last_seq,
            )


def _after_end(files: Files) -> Iterator[ChainProblem]:
    """Problems of lines after the one that ends its segment."""
    for segment, found in files:
        ends = (each.seq for each in found.special if each.kind in chain.ENDS and each.chain == found.chain)
        end = next(ends, found.last_seq)
        if end < found.last_seq:
            first = max(found.first_seq, end + 1)
            count = found.last_seq - first + 1
            text = f"{count} lines after line {end}, which ends the file: its process wrote none there"
            yield ChainProblem("after_closed", text, found.chain, segment.path.name, first)


def _misplaced(files: Files) -> Iterator[Note]:
    for segment, _ in files:
        if segment.path.name != segments.path_of(segment.path.parent, segment.chain, segment.number).name:
            text = f"{segment.path.name} is file {segment.number} of the chain; only verify reads this name"
            yield Note("misplaced", text, segment.chain)


def _witness(files: Files, made: ChainReport, seen: Claim | None) -> None:
    """Set the chain that names the end of one without a closing line as its witness, if that is credible."""
    if seen is None or made.state != "cut or crashed":
        return
    if made.signed_seq <= seen.seq <= made.last_seq <= _credible(files, made.signed_seq):
        made.witness = seen.by


def _credible(files: Files, signed_seq: int) -> int:
    """The last line that the process of a chain can have written: a checkpoint interval after a signed one.

    In a closed chain it is the closing line.
    """
    signed = [
        line
        for _, found in files
        for line in found.special
        if line.kind in chain.SIGNED and line.seq <= signed_seq
    ]
    if signed and signed[-1].kind == chain.CLOSED:
        return signed_seq
    return signed_seq + max([_INTERVAL_LINES, *(after.seq - line.seq for line, after in pairwise(signed))])
