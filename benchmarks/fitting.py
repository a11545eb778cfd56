"""Whether a series of sizes lies on a line: a fixed cost, and a cost for each byte or item.

The line is that of least squares of the relative errors: every size counts alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import report
from benchmarks.measure import Series

COLUMNS: Final = ("", "count", "s", "µs each", "off the line")
_LEAST: Final = 3


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds: ``fixed``, and ``each``."""

    fixed: float
    each: float

    def off(self, count: float, seconds: float) -> float:
        """By what share a size costs more than the line says."""
        return seconds / (self.fixed + self.each * count) - 1


def line(points: Sequence[tuple[float, float]]) -> Line:
    """The line through (count, seconds); at least two counts that differ."""
    ones, counts = [1 / y for _, y in points], [x / y for x, y in points]
    aa, bb = sum(a * a for a in ones), sum(b * b for b in counts)
    ab = sum(a * b for a, b in zip(ones, counts, strict=True))
    fixed = sum(ones) * bb - sum(counts) * ab
    each = sum(counts) * aa - sum(ones) * ab
    return Line(fixed / (aa * bb - ab * ab), each / (aa * bb - ab * ab))


def grown(
    title: str, unit: str, found: Sequence[tuple[int, Series]], options: report.Options
) -> tuple[str, Sequence[Sequence[str]]]:
    """What a series of sizes costs, in words and in rows of ``COLUMNS``; its largest deviation is kept."""
    points = [(float(count), middle) for count, series in found if (middle := series.median("seconds"))]
    if len(points) < _LEAST:
        return f"{title}: too few sizes.", []
    fitted = line(points)
    off = [fitted.off(*point) for point in points]
    options.note("deviation", title, {"share": max(map(abs, off)), "to": points[-1][0]})
    rows = [
        [title, f"{count:,.0f}", f"{seconds:,.3f}", f"{seconds / count * 1e6:,.2f}", f"{share:+.1%}"]
        for (count, seconds), share in zip(points, off, strict=True)
    ]
    words = f"{fitted.fixed * 1e3:,.1f} ms, and {fitted.each * 1e6:,.2f} µs {unit}"
    return f"{title}: {words}; at most {max(map(abs, off)):.1%} off that line.", rows
