"""Holds the files of a trail against each other, and against what other chains and anchors say of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from kms_core.audit import chain, segments
from kms_core.audit.chain import Line, Tip
from kms_core.audit.report import ChainReport, Note, Problem, Report, State
from kms_core.audit.scan import Found
from kms_core.audit.segments import Segment

_AN_ANCHOR: Final = "an anchor"


@dataclass(frozen=True, slots=True)
class _Seen:
    """The end of a chain as somebody else saw it: who, and when."""

    tip: Tip
    by: str
    time: str


def judge(report: Report, found: Mapping[Segment, Found], anchors: Iterable[Line]) -> None:
    """Fill in the report. ``anchors`` are signed lines whose signatures fit."""
    chains: dict[str, list[tuple[Segment, Found]]] = {}
    for segment, each in sorted(found.items()):
        chains.setdefault(segment.chain, []).append((segment, each))
        report.problems += each.problems
    lines = [line for each in found.values() for line in each.special]
    horizon = max((line.before for line in lines if line.kind == chain.RETIRED), default="")
    seen = _seen(lines, anchors)
    for name, files in chains.items():
        report.problems += _joints(files, horizon)
        made = _chain_report(name, files)
        report.chains.append(made)
        report.problems += _torn(files, made)
        if name in seen:
            report.problems += _held_against(files, made, seen[name])
    report.problems += _absent(seen, chains.keys(), horizon)
    report.notes += [
        *_noted(lines),
        *_unresolved(each.stages for each in found.values()),
        *_open_ends(report),
    ]


def _seen(lines: Iterable[Line], anchors: Iterable[Line]) -> dict[str, _Seen]:
    """Of each chain, the latest end that another chain or an anchor names."""
    seen: dict[str, _Seen] = {}

    def note(name: str, new: _Seen) -> None:
        if name not in seen or seen[name].tip.seq < new.tip.seq:
            seen[name] = new

    for line in lines:
        for name, tip in line.heads.items():
            note(name, _Seen(tip, line.chain, line.time))
    for line in anchors:
        note(line.chain, _Seen(Tip(line.seq, line.head, line.opened), _AN_ANCHOR, line.time))
    return seen


# -- one chain ---------------------------------------------------------------------------------------


def _joints(files: Sequence[tuple[Segment, Found]], horizon: str) -> Iterator[Problem]:
    """Whether the files of a chain are all there and continue each other."""
    first, found = files[0]
    opening = _opening(found)
    if first.number > 1 and not (opening is not None and opening.previous_opened <= horizon):
        missing = f"file {first.number - 1} of the chain and all before it are missing"
        yield Problem("missing_file", missing, first.chain)
    for (before, earlier), (segment, later) in pairwise(files):
        if segment.number == before.number:
            yield Problem(
                "duplicate_file", "two files say they are the same one", segment.chain, segment.path.name
            )
        elif segment.number > before.number + 1:
            missing = f"files {before.number + 1} to {segment.number - 1} of the chain are missing"
            yield Problem("missing_file", missing, segment.chain)
        elif later.lines and (later.first_seq, later.before) != (earlier.last_seq + 1, earlier.head):
            cut = (
                f"the next file continues line {later.first_seq - 1}, and this one ends at {earlier.last_seq}"
            )
            yield Problem("cut", cut, before.chain, before.path.name, earlier.last_seq)


def _opening(found: Found) -> Line | None:
    return next((line for line in found.special if line.kind == chain.OPEN), None)


def _chain_report(name: str, files: Sequence[tuple[Segment, Found]]) -> ChainReport:
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


def _state(segment: Segment, found: Found) -> State:
    ending = found.special[-1] if found.special else None
    if ending is not None and ending.kind == chain.CLOSED and ending.seq == found.last_seq:
        return "closed"
    return "open" if segments.is_live(segment.path) else "cut or crashed"


def _torn(files: Sequence[tuple[Segment, Found]], made: ChainReport) -> Iterator[Problem]:
    """Half a line at the end of a file is what a crash leaves, unless the chain says it went on or closed."""
    nexts = [_opening(found) for _, found in files[1:]]
    known = [after is not None and after.reason == "torn" for after in nexts]
    for (segment, found), is_known in zip(files, [*known, made.state != "closed"], strict=True):
        if found.torn_bytes and not is_known:
            yield Problem(
                "unreadable",
                f"{found.torn_bytes} bytes after the last record",
                segment.chain,
                segment.path.name,
                found.last_seq,
            )


def _held_against(
    files: Sequence[tuple[Segment, Found]], made: ChainReport, seen: _Seen
) -> Iterator[Problem]:
    if seen.tip.seq > made.last_seq:
        missing = (
            f"lines {made.last_seq + 1} to {seen.tip.seq} are missing: {seen.by} saw them at {seen.time}"
        )
        yield Problem("cut", missing, made.chain, files[-1][0].path.name, made.last_seq + 1)
        return
    if made.state == "cut or crashed" and seen.tip.seq == made.last_seq:
        made.witness = seen.by
    for segment, found in files:
        if found.first_seq <= seen.tip.seq <= found.last_seq:
            line = segments.line_of(segment.path, seen.tip.seq)
            if line is None or chain.claimed_head(line) != chain.octets(seen.tip.head):
                text = f"not the line that {seen.by} saw at {seen.time}: the chain was written anew"
                yield Problem("rewritten", text, made.chain, segment.path.name, seen.tip.seq)


# -- all of them -------------------------------------------------------------------------------------


def _absent(seen: Mapping[str, _Seen], there: Iterable[str], horizon: str) -> Iterator[Problem]:
    for name in seen.keys() - set(there):
        each = seen[name]
        if each.tip.opened > horizon:
            text = f"a chain of at least {each.tip.seq + 1} lines is missing: {each.by} saw it at {each.time}"
            yield Problem("missing_chain", text, name)


_REASONS: Final = {
    "vanished": "its file was deleted or moved while it was written to",
    "disturbed": "its file was cut or written to by another hand",
    "torn": "the end of a line could not be taken back",
    "unsynced": "the disk failed to keep its lines",
}


def _noted(lines: Iterable[Line]) -> Iterator[Note]:
    for line in lines:
        if line.clock:
            yield Note("clock_behind", f"the clock said {line.clock} at {line.time}", line.chain, line.seq)
        if line.kind == chain.RESUMED:
            text = f"{line.refused} records could not be written before; their operations were refused"
            yield Note("resumed", text, line.chain, line.seq)
        elif line.kind == chain.OPEN and line.reason in _REASONS:
            yield Note(line.reason, _REASONS[line.reason], line.chain, line.seq)


def _unresolved(stages: Iterable[Iterable[Line]]) -> Iterator[Note]:
    """Effects that somebody set out for, and of which nobody has said how they ended."""
    open_: dict[str, Line] = {}
    ended: set[str] = set()
    for line in (line for each in stages for line in each):
        if line.stage == "outcome":
            ended.add(line.effect)
        else:
            open_[line.effect] = line
    for name in open_.keys() - ended:
        line = open_[name]
        yield Note("no_outcome", f"{line.operation} {name} has no outcome", line.chain, line.seq)


def _open_ends(report: Report) -> Iterator[Note]:
    for each in report.chains:
        if each.state == "cut or crashed":
            seen = f"; {each.witness} found it so" if each.witness else ", and nobody else has seen its end"
            yield Note(
                "cut_or_crashed",
                f"the chain has no closing record: cut or crashed{seen}",
                each.chain,
                each.last_seq,
            )
