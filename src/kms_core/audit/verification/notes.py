"""Observations of a verification that violate nothing: late lines, reasons in the log, open ends."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from kms_core.audit import chain
from kms_core.audit.chain import ChainLine
from kms_core.audit.verification.scan import ChainReport, Note, VerificationReport


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
    """Tells late lines from missing ones: those were named before all of the copy was made.

    ``last`` has the last line of each chain. The copy must have all lines up to the time ``complete_to``,
    None for an original log.
    """

    last: Mapping[str, int]
    complete_to: str | None
    since: str = ""
    _late: dict[str, tuple[int, str]] = field(default_factory=dict)

    def covers(self, claim: Claim) -> bool:
        """Return whether the line of a claim is late; it then is noted."""
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


def noted(lines: Iterable[ChainLine]) -> Iterator[Note]:
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
