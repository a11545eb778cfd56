"""What a verification found: values only."""

from dataclasses import dataclass, field
from typing import Literal

State = Literal["closed", "open", "cut or crashed"]
Verdict = Literal["intact", "open end", "damaged"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not hold. ``code`` is stable, the text is for people; ``seq`` -1 is none."""

    code: str
    text: str
    chain: str = ""
    file: str = ""
    seq: int = -1


@dataclass(frozen=True, slots=True)
class Note:
    """Something to know that contradicts nothing."""

    code: str
    text: str
    chain: str = ""
    seq: int = -1


@dataclass(slots=True)
class ChainReport:
    """One chain as it was found. ``signed_seq`` is the last line with a good signature, -1 if none."""

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
class Report:
    """What was found. ``trusted`` says whether the keys came from elsewhere than the trail itself."""

    trusted: bool
    lines: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    chains: list[ChainReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """``open end``: nothing contradicts, but a chain ends without end or witness."""
        if self.problems:
            return "damaged"
        ended = all(each.state != "cut or crashed" or each.witness for each in self.chains)
        return "intact" if ended else "open end"
