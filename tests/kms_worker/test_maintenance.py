"""The maintenance process: real processes, which are killed, stopped, and left by their parent."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_core.periodic import PeriodicThread
from kms_worker.maintenance import NAME, Maintenance
from support.waiting import until


class Noting(PeriodicThread):
    """Notes which process it runs in, and that it is to end."""

    def __init__(self, folder: Path) -> None:
        super().__init__("noting", 0.01, failed="noting.failed")
        self._folder = folder

    def round(self) -> None:
        (self._folder / str(os.getpid())).touch()

    def finish(self) -> None:
        threading.Event().wait(0.3)  # a round that takes its time
        (self._folder / "finished").touch()


def runs(folder: Path) -> int:
    """The process that noted itself last; none if it has ended."""
    pids = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    return next((pid for pid in pids if Path(f"/proc/{pid}/comm").exists()), 0)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Maintenance]:
    found = Maintenance(lambda: None, lambda: [Noting(tmp_path)])
    found.start()
    until(lambda: runs(tmp_path), "it works")
    yield found
    found.end(10)


def test_it_is_another_process_by_name_and_replaced_when_it_is_killed(
    kept: Maintenance, tmp_path: Path
) -> None:
    first = runs(tmp_path)
    kept.round()
    assert (runs(tmp_path), Path(f"/proc/{first}/comm").read_text().strip()) == (first, NAME)

    os.kill(first, signal.SIGKILL)

    until(lambda: runs(tmp_path) not in {0, first}, "another one works")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signals_of_a_terminal_are_for_its_parent(kept: Maintenance, tmp_path: Path, number: int) -> None:
    os.kill(runs(tmp_path), number)
    kept.end(10)

    assert (tmp_path / "finished").exists(), "its parent alone ends it"


def test_it_ends_with_its_parent_in_order(kept: Maintenance, tmp_path: Path) -> None:
    kept.end(10)

    assert (runs(tmp_path), (tmp_path / "finished").exists()) == (0, True)


def test_one_that_replaced_another_ends_in_order(kept: Maintenance, tmp_path: Path) -> None:
    """A thread forked it, and the kernel would kill it with that thread."""
    first = runs(tmp_path)
    os.kill(first, signal.SIGKILL)
    until(lambda: runs(tmp_path) not in {0, first}, "another one works")
    kept.end(10)

    assert (runs(tmp_path), (tmp_path / "finished").exists()) == (0, True)


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kms_worker.maintenance import Maintenance;"
        "sys.path.insert(0, sys.argv[2]); from test_maintenance import Noting;"
        "Maintenance(lambda: None, lambda: [Noting(Path(sys.argv[1]))]).start(); time.sleep(600)"
    )
    words = [sys.executable, "-P", "-c", code, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(words, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) as parent:
        until(lambda: runs(tmp_path), "it works")
        parent.kill()
    until(lambda: not runs(tmp_path), "it has ended")


def test_no_group_is_signalled_where_the_process_could_not_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process 0 of a signal is the whole group of its sender."""

    def refuse() -> int:
        raise BlockingIOError

    signalled: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "kill", lambda *given: signalled.append(given))
    monkeypatch.setattr(os, "fork", refuse)
    made = Maintenance(lambda: None, list)
    made.start()
    made.end(10)

    assert signalled == []


@pytest.mark.parametrize("fails", ["prepare", "build"])
def test_one_that_cannot_begin_ends(tmp_path: Path, fails: str) -> None:
    def step(name: str) -> list[PeriodicThread]:
        if name == fails:
            (tmp_path / "tried").touch()
            raise OSError("as it is")
        return [Noting(tmp_path)]

    made = Maintenance(lambda: step("prepare") and None, lambda: step("build"))
    made.start()
    until((tmp_path / "tried").exists, "it tried")
    (tmp_path / "tried").unlink()
    until((tmp_path / "tried").exists, "it tries again")
    made.end(10)
    assert runs(tmp_path) == 0
