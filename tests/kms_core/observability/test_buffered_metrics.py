"""What is piled up is on the metrics whenever somebody looks, and is what one move a call would have made."""

import os
import threading
from collections.abc import Iterator
from typing import Final

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest, values

from kms_core.observability import buffered_metrics

BUCKETS: Final = (0.1, 1.0, 10.0)
TIMES: Final = (0.0, 0.05, 0.1, 0.5, 1.0, 9.0, 10.0, 11.0)
THREADS: Final = 4


class Names:
    """Metrics for one test: names are taken for good."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.counted = Counter(f"piled_{number}", "Calls", ["kind"])
        self.duration = Histogram(f"piled_seconds_{number}", "Times", ["kind"], buckets=BUCKETS)
        self.size = Counter(f"piled_bytes_{number}", "Bytes")

    def value(self, name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(name, labels)


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return iter(range(1000))


@pytest.fixture
def names(numbers: Iterator[int]) -> Names:
    return Names(next(numbers))


def test_what_is_piled_up_is_what_one_move_a_call_makes(names: Names) -> None:
    calls = buffered_metrics.CallStats(
        names.counted.labels("piled"), names.duration.labels("piled"), names.size
    )
    for seconds in TIMES:
        calls.add(seconds, 10)
        names.counted.labels("moved").inc()
        names.duration.labels("moved").observe(seconds)
    page = generate_latest(REGISTRY).decode().splitlines()
    piled, moved = ([line for line in page if f'kind="{kind}"' in line] for kind in ("piled", "moved"))

    assert [line.replace("piled", "moved") for line in strip(piled)] == [
        line.replace("piled", "moved") for line in strip(moved)
    ]
    assert len(piled) > len(BUCKETS)
    assert names.value(f"piled_bytes_{names.number}_total") == 10 * len(TIMES)


def strip(lines: list[str]) -> list[str]:
    """Without when a series began."""
    return [line for line in lines if "_created" not in line]


def test_a_second_look_shows_no_more(names: Names) -> None:
    calls = buffered_metrics.CallStats(names.counted.labels("x"))
    calls.add()

    assert names.value(f"piled_{names.number}_total", kind="x") == 1
    assert names.value(f"piled_{names.number}_total", kind="x") == 1


def test_threads_lose_no_call(names: Names) -> None:
    calls = buffered_metrics.CallStats(names.counted.labels("x"), names.duration.labels("x"))

    def work() -> None:
        for _ in range(1000):
            calls.add(0.5)
            buffered_metrics.settle()

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert names.value(f"piled_{names.number}_total", kind="x") == 1000 * THREADS
    assert names.value(f"piled_seconds_{names.number}_count", kind="x") == 1000 * THREADS


def test_a_forked_child_does_not_count_its_parents_calls_again(names: Names) -> None:
    calls = buffered_metrics.CallStats(names.counted.labels("x"))
    calls.add()
    buffered_metrics.protect_forks()
    pid = os.fork()
    if not pid:
        os._exit(int(names.value(f"piled_{names.number}_total", kind="x") or 0))
    _, status = os.waitpid(pid, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert names.value(f"piled_{names.number}_total", kind="x") == 1


def test_a_tide_shows_its_level(names: Names) -> None:
    gauge = Gauge(f"piled_tide_{names.number}", "Level")
    tide = buffered_metrics.BufferedGauge(gauge)
    tide.level += 3
    risen = names.value(f"piled_tide_{names.number}")
    tide.level -= 2

    assert (risen, names.value(f"piled_tide_{names.number}")) == (3, 1)


def test_a_call_after_a_moment_of_silence_settles_by_itself(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = buffered_metrics.CallStats(names.counted.labels("x"))
    monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue())  # type: ignore[no-untyped-call]  # there
    shown = 0.0
    while not shown:  # the moment may not be over yet
        calls.add()
        buffered_metrics.settle_if_shared()
        shown = max(sample.value for metric in names.counted.collect() for sample in metric.samples[:1])

    assert shown >= 1
