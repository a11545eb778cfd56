"""Charts of the jobs and operations of the last hours: stacked bars as SVG, and the same figures as a table.

All is drawn on the server, in units of a picture that ``page.css`` stretches to the page; text is HTML.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from kms_api.ui.job_pages import END
from kms_api.ui.render import number, took
from kms_core.jobs.store.charts import SAMPLE, Interval, OperationInterval

PERIODS: Final = {"1h": (300, 12, "hour"), "6h": (900, 24, "6 hours"), "24h": (3600, 24, "24 hours")}
"""Seconds of one interval, the number of intervals, and the period in words."""
HEIGHT: Final = 100
"""Of the picture, in which an interval is 10 wide."""
_OPEN: Final = ("queued", "running", "committing")
_TOPS: Final = (0.002, 0.01, 0.02, 0.1, 0.2, 1, 2, 10, 20, 60, 120, 600, 1200, 3600, 7200, 36_000, 86_400)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a bar: its colour, named for a series, its place from the top, and its height."""

    series: str
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Bar:
    """An interval: its time, the cursor of the list of jobs up to its end, and the text of each series."""

    time: str
    cursor: str
    texts: Mapping[str, str]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """``series`` has the label of each, from the axis upwards; ``ticks`` are the top and middle of the axis.

    ``summary`` says in a sentence what the picture shows. Without bars there is nothing to draw.
    """

    name: str
    title: str
    summary: str
    series: Mapping[str, str]
    ticks: tuple[str, str]
    bars: tuple[Bar, ...]


def jobs_chart(intervals: Sequence[Interval], words: str) -> Chart:
    """Jobs by when they were submitted, and by the state that they are in now."""
    rows = [
        {
            "failed": each.counts["failed"],
            "succeeded": each.counts["succeeded"],
            "cancelled": each.counts["cancelled"],
            "open": sum(each.counts[state] for state in _OPEN),
        }
        for each in intervals
    ]
    return _counts_chart(("jobs", "Jobs by time of submission"), "jobs submitted", intervals, rows, words)


def operations_chart(intervals: Sequence[OperationInterval], words: str) -> Chart:
    """Operations of all tenants by outcome; those that were refused have failed."""
    rows = [{"failed": each.failed, "succeeded": each.succeeded} for each in intervals]
    return _counts_chart(("operations", "Operations of all tenants"), "operations", intervals, rows, words)


def _counts_chart(
    names: tuple[str, str],
    counted: str,
    intervals: Sequence[Interval | OperationInterval],
    rows: Sequence[Mapping[str, int]],
    words: str,
) -> Chart:
    """``names``: of the chart, and its title. ``counted``: what the summary says that it counts."""
    sums = {series: sum(row[series] for row in rows) for series in rows[0]}
    series_text = ", ".join(f"{number(count)} {series}" for series, count in sums.items())
    labels = {series: f"{series} {number(count)}" for series, count in sums.items()}
    most = max(sum(row.values()) for row in rows)
    top = next(digit * 10**power for power in range(19) for digit in (2, 4, 10) if digit * 10**power >= most)
    summary = f"Of the {number(sum(sums.values()))} {counted} in the last {words}: {series_text}."
    summary = summary if most else f"No {names[0]} in the last {words}."
    return _chart((*names, summary), labels, intervals, rows, (top, number))


def durations_chart(intervals: Sequence[Interval], words: str) -> Chart:
    """Means for how long jobs waited and ran."""
    rows = [{"ran": each.ran_s or 0.0, "waited": each.waited_s or 0.0} for each in intervals]
    found = [row for row, each in zip(rows, intervals, strict=True) if each.ran_s is not None]
    means = {name: sum(row[name] for row in found) / max(1, len(found)) for name in rows[0]}
    labels = {name: f"{name} {took(seconds)}" for name, seconds in means.items()}
    most = max(sum(row.values()) for row in rows)
    top = next((top for top in _TOPS if top >= most), most)
    summary = (
        f"Jobs that succeeded in the last {words} waited {took(means['waited'])} and ran "
        f"{took(means['ran'])} on average, of up to {SAMPLE} jobs of each interval."
    )
    summary = summary if found else f"No job of the last {words} has succeeded."
    return _chart(
        ("durations", "Time from submission to end", summary), labels, intervals, rows, (float(top), took)
    )


def _chart(
    names: tuple[str, str, str],
    labels: Mapping[str, str],
    intervals: Sequence[Interval | OperationInterval],
    rows: Sequence[Mapping[str, float]],
    axis: tuple[float, Callable[..., str]],
) -> Chart:
    (top, text), every_s = axis, intervals[1].start - intervals[0].start
    bars = tuple(
        Bar(
            f"{datetime.fromtimestamp(each.start, UTC):%H:%M}",
            f"{each.start + every_s:.0f}-{END}",
            {series: text(value) for series, value in row.items() if value},
            tuple(_parts(row, top)),
        )
        for each, row in zip(intervals, rows, strict=True)
    )
    is_empty = not any(bar.parts for bar in bars)
    return Chart(*names, labels, (text(top), text(type(top)(top / 2))), () if is_empty else bars)


def _parts(row: Mapping[str, float], top: float) -> list[Part]:
    """The parts of a bar, one on the other; one that is not 0 is high enough to be seen."""
    made, y = [], float(HEIGHT)
    for series, value in row.items():
        if value:
            height = max(1.0, value / top * HEIGHT)
            y -= height
            made.append(Part(series, round(y, 2), round(height, 2)))
    return made
