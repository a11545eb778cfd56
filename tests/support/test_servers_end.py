"""Servers that tests start end with the tests, however those end."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from kms_cli.local.directories import runtime_dir
from support.programs import program
from support.waiting import until

TESTS: Final = Path(__file__).parents[1]
INSTALL: Final = """
import pathlib, time
from support.aws_servers import ministack
from support.service import Service

def test_that_is_killed(tmp_path):
    ministack()
    with Service(tmp_path) as service:
        service.start()
        pathlib.Path("running").touch()
        time.sleep(600)
"""
KILLED: Final = """
import pathlib, time

def test_that_is_killed(rabbit):
    pathlib.Path("running").touch()
    time.sleep(600)
"""


def related(folder: Path) -> list[str]:
    """Command lines of the processes whose environment names ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if bytes(folder) in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended
            continue
    return found


def killed(folder: Path, test: str, *plugins: str) -> None:
    """Run a test in ``folder / "own"``, and kill pytest in the middle of it."""
    (folder / "test_killed.py").write_text(test)
    options = ["-p", "no:cacheprovider", "--basetemp", str(folder / "own")]
    named = [word for plugin in plugins for word in ("-p", plugin)]
    command = [sys.executable, "-m", "pytest", "-q", *named, *options, "test_killed.py"]
    named_to_all = {"STARTED_IN": str(folder / "own")}  # whatever the tests start inherits it
    environ = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent / 'src'}"} | named_to_all
    with subprocess.Popen(command, cwd=folder, env=environ) as running:
        until((folder / "running").exists, "the test runs")
        assert len(related(folder / "own")) >= 2
        running.kill()

    until(lambda: not related(folder / "own"), "its servers have ended")


def test_rabbitmq_ends_with_killed_tests(tmp_path: Path) -> None:
    program("rabbitmq-server")
    killed(tmp_path, KILLED, "support.rabbitmq")


def test_killed_tests_leave_no_process_and_no_file(tmp_path: Path) -> None:
    killed(tmp_path, INSTALL, "support.cleanup")

    until(lambda: not (tmp_path / "own").exists(), "its files are gone")
    state = tmp_path / "own/test_that_is_killed0/state"
    assert not runtime_dir(state, {}).exists()
