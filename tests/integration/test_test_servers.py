"""Servers that tests start end with the tests, however those end."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from peers import program
from service import until

TESTS: Final = Path(__file__).parents[1]
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


def test_rabbitmq_ends_with_killed_tests(tmp_path: Path) -> None:
    program("rabbitmq-server")
    (tmp_path / "test_killed.py").write_text(KILLED)
    options = ["-p", "rabbits", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "own")]
    command = [sys.executable, "-m", "pytest", "-q", *options, "test_killed.py"]
    environ = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent / 'src'}"}
    with subprocess.Popen(command, cwd=tmp_path, env=environ) as running:
        until((tmp_path / "running").exists, "the test runs")
        assert len(related(tmp_path / "own")) >= 2
        running.kill()

    until(lambda: not related(tmp_path / "own"), "its servers have ended")
