"""What a verification found: values only."""

from dataclasses import dataclass, field
from typing import Literal

State = Literal["closed", "open", "cut or crashed"]
Verdict = Literal["intact", "open end", "not compared", "damaged"]


@dataclass(frozen=True, slots=True)
class ChainProblem:
    """Something that does not hold. ``code`` is stable, the text is for people; ``seq`` -1 is none.

    ``anchor`` is the second place whose anchor the log contradicts, ``anchor_seq`` the line that it names.
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
class VerificationReport:
    """What was found. ``trusted`` says whether the keys came from elsewhere than the trail itself.

    ``not_compared`` holds the places of anchors that could not be read, each with the reason.
    """

    trusted: bool
    lines: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    chains: list[ChainReport] = field(default_factory=list)
    problems: list[ChainProblem] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """``open end``: nothing contradicts, but a chain ends without end or witness.

        ``not compared``: the log may be older than anchors that could not be read.
        """
        if self.problems:
            return "damaged"
        if self.not_compared:
            return "not compared"
        return "open end" if self.has_open_end else "intact"

    @property
    def has_open_end(self) -> bool:
        """Whether a chain has no closing record, and nobody else has seen its end."""
        return any(each.state == "cut or crashed" and not each.witness for each in self.chains)
