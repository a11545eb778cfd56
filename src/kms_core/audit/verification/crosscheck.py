"""Holds the files of a trail against each other, and against what other chains and anchors say of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainHead, ChainLine
from kms_core.audit.keys import PublicKeys
from kms_core.audit.segments import Segment
from kms_core.audit.verification.anchors import (
    CUT,
    MISSING_CHAIN,
    NONE_OF_THIS_LOG,
    REWRITTEN,
    acknowledged,
    contradiction,
    is_lost,
)
from kms_core.audit.verification.report import ChainProblem, ChainReport, Note, State, VerificationReport
from kms_core.audit.verification.scan import ScannedSpan

_INTERVAL_LINES: Final = 1_100
"""Lines between two signed ones of a chain with the usual settings: 1,000, and those that one batch adds."""
Anchors = Mapping[str, Sequence[bytes]]
"""Signed lines that second places keep, by the name of the place."""


@dataclass(frozen=True, slots=True)
class _WitnessedHead:
    """The end of a chain as somebody else saw it: who, and when."""

    tip: ChainHead
    by: str
    time: str


def judge(
    report: VerificationReport, found: Mapping[Segment, ScannedSpan], anchors: Anchors, keys: PublicKeys
) -> None:
    """Fill in the report. Of anchors, only those count that one of ``keys`` has signed."""
    chains: dict[str, list[tuple[Segment, ScannedSpan]]] = {}
    for segment, each in sorted(found.items()):
        chains.setdefault(segment.chain, []).append((segment, each))
        report.problems += each.problems
    lines = [line for each in found.values() for line in each.special]
    horizon = max(
        (line.before for each in found.values() for line in each.special if _retires(line, each)), default=""
    )
    seen = _seen(lines)
    signed_to: dict[str, int] = {}
    for segment, each in found.items():
        signed_to[segment.chain] = max(each.signed_seq, signed_to.get(segment.chain, -1))
    witnesses = _seen(line for line in lines if line.seq <= signed_to.get(line.chain, -1))
    log = _log_of(chains, horizon)
    for name, files in chains.items():
        report.problems += _joints(files, horizon)
        made = _chain_report(name, files)
        report.chains.append(made)
        report.problems += _torn(files, made)
        report.problems += _behind_ends(files)
        report.notes += _misplaced(files)
        _witness(files, made, witnesses.get(name))
        if name in seen:
            report.problems += _held_against(files, made, seen[name], horizon)
    report.problems += _absent(seen, chains.keys(), horizon)
    for place, kept in anchors.items():
        newest = _against_anchors(report, log, place, kept, keys)
        _bear_witness(report, place, newest)
        _tell_coverage(report, place, newest, witnesses)
    report.notes += [
        *_noted(lines),
        *_unresolved(each.stages for each in found.values()),
        *_open_ends(report),
    ]


def _retires(line: ChainLine, found: ScannedSpan) -> bool:
    """Whether a line puts a removal on record; without a signature over it anybody may have written it."""
    return line.kind == chain.RETIRED and line.seq < found.signed_seq


def _is_retired(opened: str, horizon: str) -> bool:
    """Whether the file that was opened then may be gone by a removal on record."""
    return "" < opened <= horizon


def _seen(lines: Iterable[ChainLine]) -> dict[str, _WitnessedHead]:
    """Of each chain, the latest end that another chain names."""
    seen: dict[str, _WitnessedHead] = {}
    for line in lines:
        for name, tip in line.heads.items():
            if name not in seen or seen[name].tip.seq < tip.seq:
                seen[name] = _WitnessedHead(tip, line.chain, line.time)
    return seen


# -- anchors -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Log:
    """What anchors are compared with: first and last line of each chain, and the heads of signed lines.

    ``lost`` holds the lines whose loss is on record: of each chain, the first and the last number.
    """

    first: Mapping[str, int]
    last: Mapping[str, int]
    heads: Mapping[tuple[str, int], str]
    lost: Mapping[str, tuple[int, int]]
    horizon: str

    def contradicts(self, anchor: ChainLine) -> str:
        """The code of the problem that the anchor is proof of, if it is genuine; empty for none."""
        name, seq = anchor.chain, anchor.seq
        if name not in self.last:
            return "" if _is_retired(anchor.opened, self.horizon) else MISSING_CHAIN
        if seq > self.last[name]:
            return CUT
        if seq >= self.first[name]:
            return REWRITTEN
        # what stands there now names no line before it
        return "" if _is_retired(anchor.opened, self.horizon) else MISSING_CHAIN


def _log_of(chains: Mapping[str, Sequence[tuple[Segment, ScannedSpan]]], horizon: str) -> _Log:
    parts = [found for files in chains.values() for _, found in files]
    return _Log(
        {name: files[0][1].first_seq for name, files in chains.items()},
        {name: max(found.last_seq for _, found in files) for name, files in chains.items()},
        {
            (line.chain, line.seq): line.head
            for found in parts
            for line in found.special
            if line.kind in chain.SIGNED
        },
        acknowledged(line for found in parts for line in found.stages if line.seq < found.signed_seq),
        horizon,
    )


def _against_anchors(
    report: VerificationReport, log: _Log, place: str, kept: Sequence[bytes], keys: PublicKeys
) -> Mapping[str, int]:
    """Hold the log against every anchor of one place; the newest of each chain that the log has.

    A signature is checked only where an anchor and the log differ: an equal line was checked in the log.
    """
    newest: dict[str, int] = {}
    told: set[tuple[str, str]] = set()
    parsed = _parsed(kept)
    if len(parsed) < len(kept):
        text = f"{len(kept) - len(parsed)} lines in {place} are no anchors: they may have been some"
        report.notes.append(Note("anchors_damaged", text))
    for raw, anchor in parsed:
        name = anchor.chain
        if log.heads.get((name, anchor.seq)) == anchor.head:
            newest.setdefault(name, anchor.seq)
            continue
        code = log.contradicts(anchor)
        if not code or (name, code) in told or keys.signed(raw) is None:
            continue
        told.add((name, code))
        problem = contradiction(code, anchor, place, log.last.get(name, -1))
        if code != REWRITTEN and is_lost(log.lost, anchor, log.last.get(name, -1)):
            report.notes.append(Note("acknowledged", f"{problem.text}; the loss is on record", name))
        else:
            report.problems.append(problem)
    return newest


def _parsed(kept: Iterable[bytes]) -> list[tuple[bytes, ChainLine]]:
    """The anchors of the latest lines first."""
    read = ((raw, chain.read(raw)) for raw in kept)
    return sorted(((raw, line) for raw, line in read if line), key=lambda each: -each[1].seq)


def _bear_witness(report: VerificationReport, place: str, newest: Mapping[str, int]) -> None:
    for made in report.chains:
        if made.state == "cut or crashed" and newest.get(made.chain) == made.last_seq:
            made.witness = made.witness or f"the anchor in {place}"


def _tell_coverage(
    report: VerificationReport, place: str, newest: Mapping[str, int], seen: Mapping[str, _WitnessedHead]
) -> None:
    """Say what the anchors of a place cannot prove: they are written after the log, and may be removed."""
    signed = [made for made in report.chains if made.signed_seq >= 0]
    if signed and not newest and not any(problem.anchor == place for problem in report.problems):
        report.not_compared[place] = NONE_OF_THIS_LOG
        return
    bare = [made for made in signed if newest.get(made.chain, -1) < _due(made, seen)]
    if bare:
        others = f", and of {len(bare) - 1} other chains" if len(bare) > 1 else ""
        text = (
            f"{place} has no anchor of its end{others}, and no other chain names it: it was not taken, or "
            "was removed; whether lines were cut there is not known"
        )
        report.notes.append(Note("not_anchored", text, bare[0].chain, bare[0].signed_seq))


def _due(made: ChainReport, seen: Mapping[str, _WitnessedHead]) -> int:
    """The line from which on an anchor should be there: the last signed one, unless another chain saw it.

    Of a chain that is written to, any: the next checkpoint is on its way.
    """
    known = made.chain in seen and seen[made.chain].tip.seq >= made.signed_seq
    return -1 if known else 0 if made.state == "open" else made.signed_seq


# -- one chain ---------------------------------------------------------------------------------------


def _joints(files: Sequence[tuple[Segment, ScannedSpan]], horizon: str) -> Iterator[ChainProblem]:
    """Whether the files of a chain are all there and continue each other."""
    first, found = files[0]
    opening = _opening(found)
    if first.number > 1 and not (opening is not None and _is_retired(opening.previous_opened, horizon)):
        missing = f"file {first.number - 1} of the chain and all before it are missing"
        yield ChainProblem("missing_file", missing, first.chain)
    for (before, earlier), (segment, later) in pairwise(files):
        if segment.number == before.number:
            yield ChainProblem(
                "duplicate_file", "two files say they are the same one", segment.chain, segment.path.name
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


def _chain_report(name: str, files: Sequence[tuple[Segment, ScannedSpan]]) -> ChainReport:
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


def _torn(files: Sequence[tuple[Segment, ScannedSpan]], made: ChainReport) -> Iterator[ChainProblem]:
    """Half a line at the end of a file is what a crash leaves, unless the chain says it went on or closed."""
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


def _behind_ends(files: Sequence[tuple[Segment, ScannedSpan]]) -> Iterator[ChainProblem]:
    for _, found in files:
        if -1 < found.ended_at < found.last_seq:
            yield found.problem_behind_end(found.ended_at)


def _misplaced(files: Sequence[tuple[Segment, ScannedSpan]]) -> Iterator[Note]:
    for segment, _ in files:
        if segment.path.name != segments.path_of(segment.path.parent, segment.chain, segment.number).name:
            text = f"{segment.path.name} is its file {segment.number}; under this name only verify reads it"
            yield Note("misplaced", text, segment.chain)


def _witness(
    files: Sequence[tuple[Segment, ScannedSpan]], made: ChainReport, seen: _WitnessedHead | None
) -> None:
    """Another chain saw the signed end of one that has no closing record, and not much stands behind it."""
    if seen is None or made.state != "cut or crashed":
        return
    if made.signed_seq <= seen.tip.seq <= made.last_seq <= _credible(files, made.signed_seq):
        made.witness = seen.by


def _credible(files: Sequence[tuple[Segment, ScannedSpan]], signed_seq: int) -> int:
    """The last line that the process of a chain can have written: a checkpoint interval behind a signed one.

    Behind a closed end it is the closing line.
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


def _held_against(
    files: Sequence[tuple[Segment, ScannedSpan]], made: ChainReport, seen: _WitnessedHead, horizon: str
) -> Iterator[ChainProblem]:
    if seen.tip.seq < files[0][1].first_seq and not _is_retired(seen.tip.opened, horizon):
        missing = f"line {seen.tip.seq} and all before it are missing: {seen.by} saw it at {seen.time}"
        yield ChainProblem("cut", missing, made.chain, files[0][0].path.name, seen.tip.seq)
        return
    if seen.tip.seq > made.last_seq:
        missing = (
            f"lines {made.last_seq + 1} to {seen.tip.seq} are missing: {seen.by} saw them at {seen.time}"
        )
        yield ChainProblem("cut", missing, made.chain, files[-1][0].path.name, made.last_seq + 1)
        return
    for segment, found in files:
        if found.first_seq <= seen.tip.seq <= found.last_seq:
            line = segments.line_of(segment.path, seen.tip.seq)
            if line is None or chain.claimed_head(line) != chain.octets(seen.tip.head):
                text = f"not the line that {seen.by} saw at {seen.time}: the chain was written anew"
                yield ChainProblem("rewritten", text, made.chain, segment.path.name, seen.tip.seq)


# -- all of them -------------------------------------------------------------------------------------


def _absent(seen: Mapping[str, _WitnessedHead], there: Iterable[str], horizon: str) -> Iterator[ChainProblem]:
    for name in seen.keys() - set(there):
        each = seen[name]
        if not _is_retired(each.tip.opened, horizon):
            text = f"a chain of at least {each.tip.seq + 1} lines is missing: {each.by} saw it at {each.time}"
            yield ChainProblem("missing_chain", text, name)


_REASONS: Final = {
    "vanished": "its file was deleted or moved while it was written to",
    "disturbed": "its file was cut or written to by another hand",
    "torn": "the end of a line could not be taken back",
    "unsynced": "the disk failed to keep its lines",
}


def _noted(lines: Iterable[ChainLine]) -> Iterator[Note]:
    for line in lines:
        if line.clock:
            yield Note("clock_behind", f"the clock said {line.clock} at {line.time}", line.chain, line.seq)
        if line.kind == chain.RESUMED:
            text = f"{line.refused} records could not be written before; their operations were refused"
            yield Note("resumed", text, line.chain, line.seq)
        elif line.kind == chain.OPEN and line.reason in _REASONS:
            yield Note(line.reason, _REASONS[line.reason], line.chain, line.seq)


def _unresolved(stages: Iterable[Iterable[ChainLine]]) -> Iterator[Note]:
    """Effects that somebody set out for, and of which nobody has said how they ended."""
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


def _open_ends(report: VerificationReport) -> Iterator[Note]:
    for each in report.chains:
        if each.state == "cut or crashed":
            seen = f"; {each.witness} found it so" if each.witness else ", and nobody else has seen its end"
            text = f"the chain has no closing record: cut or crashed{seen}{_unsigned(each)}"
            yield Note("cut_or_crashed", text, each.chain, each.last_seq)


def _unsigned(made: ChainReport) -> str:
    count = made.last_seq - made.signed_seq
    if not count:
        return ""
    doubt = "whoever can write to the folder may have changed, removed or added some"
    return f"; its last {count} lines are not signed: {doubt}"
