"""Charts: a bar is as high as its figures say, its axis is round, and each figure is in the table."""

import pytest

from kms_api.ui import charts
from kms_core.jobs.store.charts import Interval, OperationInterval
from kms_protocol.wire import STATES

START = 1_764_288_000  # 2025-11-28T00:00:00Z
NONE = dict.fromkeys(STATES, 0)


def interval(
    number: int = 0, waited_s: float | None = None, ran_s: float | None = None, **counts: int
) -> Interval:
    return Interval(START + 900 * number, NONE | counts, waited_s, ran_s)


def test_parts_stand_on_each_other_from_the_axis_upwards_and_fill_what_they_are_of_the_top() -> None:
    chart = charts.jobs_chart([interval(failed=1, succeeded=4, running=3, queued=2), interval(1)], "6 hours")

    first, second = chart.bars
    assert chart.ticks == ("10", "5")
    assert [(part.series, part.y, part.height) for part in first.parts] == [
        ("failed", 90, 10),
        ("succeeded", 50, 40),
        ("open", 0, 50),
    ]
    assert first.texts == {"failed": "1", "succeeded": "4", "open": "5"}
    assert second.parts == ()
    assert [(bar.time, bar.cursor.partition("-")[0]) for bar in chart.bars] == [
        ("00:00", str(START + 900)),
        ("00:15", str(START + 1800)),
    ]


def test_summary_and_legend_have_the_sums() -> None:
    chart = charts.jobs_chart([interval(failed=2), interval(1, succeeded=1_500, cancelled=3)], "hour")

    assert chart.series == {
        "failed": "failed 2",
        "succeeded": "succeeded 1,500",
        "cancelled": "cancelled 3",
        "open": "open 0",
    }
    assert chart.summary == (
        "Of the 1,505 jobs submitted in the last hour: 2 failed, 1,500 succeeded, 3 cancelled, 0 open."
    )


@pytest.mark.parametrize(
    ("most", "ticks"),
    [(1, ("2", "1")), (3, ("4", "2")), (11, ("20", "10")), (4_001, ("10,000", "5,000"))],
)
def test_axis_of_jobs_ends_at_a_round_count(most: int, ticks: tuple[str, str]) -> None:
    assert charts.jobs_chart([interval(succeeded=most), interval(1)], "hour").ticks == ticks


@pytest.mark.parametrize(
    ("seconds", "ticks"),
    [
        (0.004, ("10 ms", "5 ms")),
        (0.7, ("1 second", "500 ms")),
        (7, ("10 seconds", "5 seconds")),
        (5_000, ("2 hours", "60 minutes")),
    ],
)
def test_axis_of_durations_ends_at_a_round_time(seconds: float, ticks: tuple[str, str]) -> None:
    assert charts.durations_chart([interval(waited_s=0, ran_s=seconds), interval(1)], "hour").ticks == ticks


def test_durations_are_averages_over_the_intervals_that_have_some() -> None:
    chart = charts.durations_chart(
        [interval(waited_s=2, ran_s=6), interval(1), interval(2, waited_s=4, ran_s=4)], "6 hours"
    )

    assert chart.series == {"ran": "ran 5 seconds", "waited": "waited 3 seconds"}
    assert [part.height for part in chart.bars[0].parts] == [60, 20]


def test_one_job_among_many_is_seen_and_without_jobs_nothing_is_drawn() -> None:
    chart = charts.jobs_chart([interval(failed=1, succeeded=90_000), interval(1)], "hour")

    assert chart.bars[0].parts[0].height >= 1
    assert charts.jobs_chart([interval(), interval(1)], "hour").bars == ()
    assert charts.durations_chart([interval(), interval(1)], "hour").bars == ()


def test_operations_are_drawn_by_outcome() -> None:
    chart = charts.operations_chart(
        [OperationInterval(START, 1_500, 500), OperationInterval(START + 900, 0, 0)], "6 hours"
    )

    assert chart.summary == "Of the 2,000 operations in the last 6 hours: 500 failed, 1,500 succeeded."
    assert [(part.series, part.height) for part in chart.bars[0].parts] == [("failed", 25), ("succeeded", 75)]
    none = charts.operations_chart(
        [OperationInterval(START, 0, 0), OperationInterval(START + 900, 0, 0)], "hour"
    )
    assert (none.bars, none.summary) == ((), "No operations in the last hour.")
