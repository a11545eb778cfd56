"""Metrics choose their storage when a process says so, and by no import; processes that ended in a scrape."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from prometheus_client import Gauge

from kms_core.observability import metrics, multiprocess_metrics
from kms_protocol import __version__
from support.small_disk import small_disk

IMPORT: Final = """
import os, threading
from unittest import mock
from prometheus_client import REGISTRY, values
hooks = mock.patch("os.register_at_fork").start()
before = dict(os.environ), values.ValueClass, list(REGISTRY._collector_to_names), threading.active_count()
from kms_core.observability import multiprocess_metrics
assert before == (
    dict(os.environ), values.ValueClass, list(REGISTRY._collector_to_names), threading.active_count()
)
from kms_core.observability import metrics
assert before[:2] == (dict(os.environ), values.ValueClass), "the collectors are the declared metrics"
assert threading.active_count() == before[3]
assert not hooks.called
"""
BEGIN: Final = """
import os
from kms_core.observability import multiprocess_metrics
multiprocess_metrics.share(os.environ)
from kms_core.observability import metrics
"""
COUNT: Final = """
metrics.WORKERS.set(3)
metrics.JOBS.labels("encrypt", "failed").inc()
"""
READ: Final = f"{BEGIN}print(metrics.exposition().decode())"
SHARE: Final = f"{BEGIN}{COUNT}print(metrics.exposition().decode())"
FULL: Final = f"""{BEGIN}
from pathlib import Path
ballast = Path(os.environ[multiprocess_metrics.FOLDER], "ballast")
with ballast.open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass

def count():
    for number in range(300):
        metrics.JOBS.labels("encrypt", f"state-{{number}}").inc()

count()
if not (child := os.fork()):
    count()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
metrics.exposition()
ballast.unlink()
count()
print(metrics.exposition().decode())
"""
LATE: Final = """
import os
from kms_core.observability import metrics, multiprocess_metrics
multiprocess_metrics.share(os.environ)
"""


def run(program: str, folder: Path | None = None, slot: str = "") -> subprocess.CompletedProcess[str]:
    named = {"PATH": "/usr/bin:/bin"}
    if folder:
        named[multiprocess_metrics.FOLDER] = str(folder)
    if slot:
        named[multiprocess_metrics.SLOT] = slot
    return subprocess.run(
        [sys.executable, "-c", program], env=named, capture_output=True, text=True, check=False
    )


def test_an_import_changes_nothing(tmp_path: Path) -> None:
    (left := tmp_path / "gauge_livesum_api-1.db").touch()  # of a predecessor

    assert run(IMPORT).stderr == ""
    assert run("import kms_core.observability.multiprocess_metrics", tmp_path, "api-1").stderr == ""
    assert list(tmp_path.iterdir()) == [left]


def test_a_process_in_a_slot_goes_on_with_counts_and_drops_gauges(tmp_path: Path) -> None:
    run(SHARE, tmp_path, "api-1")
    (tmp_path / "gauge_livesum_api-1.db").write_bytes(b"of a predecessor")
    page = run(SHARE, tmp_path, "api-1").stdout

    assert 'kms_jobs_total{kind="encrypt",state="failed"} 2.0' in page
    assert "kms_workers 3.0" in page


def test_a_process_without_a_slot_has_files_of_its_own(tmp_path: Path) -> None:
    run(SHARE, tmp_path)
    page = run(SHARE, tmp_path).stdout

    assert 'kms_jobs_total{kind="encrypt",state="failed"} 2.0' in page
    assert len(list(tmp_path.glob("counter_*.db"))) == 2


def test_a_process_that_ended_is_in_counts_and_in_no_gauge(tmp_path: Path) -> None:
    run(SHARE, tmp_path)
    page = run(READ, tmp_path).stdout

    assert 'kms_jobs_total{kind="encrypt",state="failed"} 1.0' in page
    assert "kms_workers 3.0" not in page


def test_gauges_of_several_processes_are_one_figure() -> None:
    """In other modes the library shows one series for each process id."""
    modes = {
        found._multiprocess_mode.removeprefix("live")  # noqa: SLF001 -- no other way to ask
        for found in vars(metrics).values()
        if isinstance(found, Gauge)
    }

    assert modes <= {"sum", "min", "max", "mostrecent"}


def test_metrics_that_are_declared_already_cannot_be_shared_any_more(tmp_path: Path) -> None:
    assert "metrics are declared already" in run(LATE, tmp_path).stderr


def test_a_full_disk_ends_no_process_and_loses_no_count(tmp_path: Path) -> None:
    """A write to a hole of a file that is mapped into memory is a signal, not an error."""
    with small_disk(tmp_path / "disk", 256 * 1024) as disk:
        done = run(FULL, disk)

    assert (done.returncode, done.stderr) == (0, "")
    counts = [line for line in done.stdout.splitlines() if 'state="state-' in line]
    assert len(counts) == 300
    assert all(line.endswith("} 2.0") for line in counts)


@pytest.mark.usefixtures("core")
def test_each_process_with_a_core_says_its_version() -> None:
    """Those of workers, too."""
    assert f'kms_build_info{{version="{__version__}"}} 1.0' in metrics.exposition().decode()
