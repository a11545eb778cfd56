"""What a goal is, how its figures are found among the medians that scripts leave, and its table; knows none.

Where a goal has several figures the worst counts, and the range is shown.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import report

Figures = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
"""By script, table, contender and name of the figure."""
Find = Callable[[Figures], float | None]
MISSING: Final = "not measured"
MISSED: Final = "**missed**"
_ABOUT: Final = (
    "Beside a peer: how many times better ours is, or, with ≤, how many times the peer's it takes. "
    "Of several figures the worst counts."
)


@dataclass(frozen=True, slots=True)
class Goal:
    """``must`` and ``aim`` in ``unit``; what is measured is at least that much, or at most."""

    what: str
    must: float
    aim: float
    finds: Sequence[Find]
    unit: str = "x"
    at_most: bool = False

    def values(self, figures: Figures) -> Sequence[float]:
        """From the best to the worst; none if one is missing."""
        found = [value for find in self.finds if (value := find(figures)) is not None]
        return sorted(found, reverse=not self.at_most) if len(found) == len(self.finds) else ()

    def reaches(self, values: Sequence[float], bound: float) -> bool:
        return values[-1] <= bound if self.at_most else values[-1] >= bound

    def shown(self, value: float) -> str:
        if math.isinf(value):
            return "-"
        return f"{value:,.3g}{'' if self.unit == '%' else ' '}{self.unit}"

    def bound(self, value: float) -> str:
        return f"≤ {self.shown(value)}" if self.at_most and math.isfinite(value) else self.shown(value)

    def measured(self, values: Sequence[float]) -> str:
        if not values:
            return MISSING
        ends = [self.shown(value) for value in (values[0], values[-1])]
        return f"{self.what} {ends[0] if ends[0] == ends[1] else ' to '.join(ends)}".strip()


@dataclass(frozen=True, slots=True)
class Row:
    """A question with its goals. ``note``: what bounds a goal that is missed, and what would lift it."""

    question: str
    peer: str
    goals: Sequence[Goal]
    note: str = ""

    def verdict(self, figures: Figures) -> str:
        found = [(goal, goal.values(figures)) for goal in self.goals]
        if any(values and not goal.reaches(values, goal.must) for goal, values in found):
            return MISSED
        if not all(values for _, values in found):
            return MISSING
        return "met, aim too" if all(goal.reaches(values, goal.aim) for goal, values in found) else "met"

    def cells(self, figures: Figures) -> Sequence[str]:
        musts, aims = (
            "; ".join(goal.bound(getattr(goal, name)) for goal in self.goals) for name in ("must", "aim")
        )
        measured = "; ".join(goal.measured(goal.values(figures)) for goal in self.goals)
        return [self.question, self.peer, musts, aims, measured, self.verdict(figures)]


def value(script: str, table: str, name: str, key: str, factor: float = 1.0) -> Find:
    """One figure."""

    def find(figures: Figures) -> float | None:
        found = figures.get(script, {}).get(table, {}).get(name, {}).get(key)
        return None if found is None else found * factor

    return find


def ratio(script: str, table: str, names: tuple[str, str], key: str, factor: float = 1.0) -> Find:
    """The figure of the first name over that of the second."""
    upper, lower = (value(script, table, name, key) for name in names)

    def find(figures: Figures) -> float | None:
        above, below = upper(figures), lower(figures)
        return above / below * factor if above is not None and below else None

    return find


def reached(find: Find, size: Find, least: float) -> Find:
    """The figure, if it was measured up to the size that the goal speaks of."""

    def found(figures: Figures) -> float | None:
        return find(figures) if (size(figures) or 0.0) >= least else None

    return found


def at_most(what: str, must: float, aim: float, finds: Sequence[Find], unit: str = "x") -> Goal:
    """A goal of which less is better."""
    return Goal(what, must, aim, finds, unit, at_most=True)


def table(rows: Sequence[Row], figures: Figures, runs: Mapping[str, str]) -> str:
    """The rows, and a note for each that is missed. ``runs``: date and commit of each script's figures."""
    columns = ("question", "peer, same run", "must", "aim", "measured", "")
    found = [(row, row.cells(figures)) for row in rows]
    notes = [
        f"- {row.question} ({row.peer}): {row.note or 'what bounds it is not known yet'}"
        for row, cells in found
        if cells[-1] == MISSED
    ]
    names: dict[str, list[str]] = {}
    for name, run in runs.items():
        names.setdefault(run, []).append(name)
    of = "; ".join(f"{run} ({', '.join(some)})" for run, some in names.items())
    about = f"{_ABOUT} Figures of {of}."
    grid = report.grid("Goals, and what was measured", columns, [cells for _, cells in found])
    return "\n\n".join(
        [
            grid,
            about,
            *(["Missed, what bounds it, and what would lift it:", "\n".join(notes)] if notes else []),
        ]
    )
