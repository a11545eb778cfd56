"""The page of several processes says what the library's own collector says of the same files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from kms_core.observability import metrics, multiprocess_metrics

MOVE: Final = """
import sys
from prometheus_client import Counter, Gauge, Histogram
number = int(sys.argv[1])
strange = 'a "b" \\\\ c\\n{d}="e",'
counter = Counter("jobs", "Counts \\\\ of\\nthings", ["kind", "by"])
counter.labels("x", strange).inc(number)
counter.labels("y", "only " + sys.argv[1]).inc()
Counter("plain", "No labels").inc(0.5)
seconds = Histogram("seconds", "Times", ["zone", "at"], buckets=(0.1, 1.0, 10.0))
for at in (0.05, 0.5, 5, 50):
    seconds.labels("z", "a").observe(at * number)
Histogram("bare", "Times without labels").observe(0.3)
for mode in ("livesum", "livemin", "livemax", "livemostrecent", "sum", "min", "max", "mostrecent"):
    gauge = Gauge("gauge_" + mode, "Of " + mode, ["name"], multiprocess_mode=mode)
    gauge.labels("set").set(-number if number % 2 else number)
    gauge.labels("never")
Gauge("lost", "Not known", multiprocess_mode="livesum").set(float("nan"))
"""
Samples = dict[tuple[str, str, str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of three processes."""
    place = tmp_path_factory.mktemp("metrics")
    environ = {**os.environ, multiprocess_metrics.FOLDER: str(place)}
    for number in (1, 2, 3):
        subprocess.run([sys.executable, "-c", MOVE, str(number)], env=environ, check=True)
    return place


def samples(page: str) -> Samples:
    return {
        (
            family.name,
            family.type,
            family.documentation,
            (("", each.name), *sorted(each.labels.items())),
        ): each.value
        for family in text_string_to_metric_families(page)
        for each in family.samples
    }


def theirs(folder: Path) -> Samples:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]  # untyped there
    return samples(generate_latest(registry).decode())


def test_every_sample_is_the_librarys(folder: Path) -> None:
    ours, expected = samples(multiprocess_metrics.text(str(folder)).decode()), theirs(folder)

    assert ours.keys() == expected.keys()
    assert len(ours) > 40
    assert ours == pytest.approx(expected, rel=1e-12, nan_ok=True)  # sums in the disk's order


def test_a_second_page_is_the_same(folder: Path) -> None:
    assert multiprocess_metrics.text(str(folder)) == multiprocess_metrics.text(str(folder))


def test_a_folder_without_files_is_an_empty_page(tmp_path: Path) -> None:
    assert multiprocess_metrics.text(str(tmp_path)) == b""


def test_a_file_that_is_being_made_is_passed_over(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "counter_4.db").touch()  # between open(2) and the first write

    assert multiprocess_metrics.text(str(tmp_path / "copy")) == multiprocess_metrics.text(str(folder))


def test_every_gauge_of_ours_can_be_told_of_several_processes() -> None:
    modes = {
        found._multiprocess_mode.removeprefix("live")  # noqa: SLF001 -- no other way to ask
        for found in vars(metrics).values()
        if isinstance(found, Gauge)
    }

    assert modes <= {"sum", "min", "max", "mostrecent"}
