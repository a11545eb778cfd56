"""Keeps temporary files in pytest's folder, and removes that folder if pytest is killed: a pytest plugin.

Programs that tests start by ``tether`` die with pytest. What they leave on disk is removed by a guard, a
small process that waits for the end of pytest.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Final

import pytest

_GUARD: Final = """
import pathlib, shutil, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
if sys.stdin.read():
    sys.exit()  # pytest ended by itself: it keeps what it wants to keep
from kms_cli.local.directories import runtime_dir
for lock in folder.rglob("valkey/lock"):
    shutil.rmtree(runtime_dir(lock.parents[1], {}), ignore_errors=True)
for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
    if line.split()[1].startswith(f"{folder}/"):
        subprocess.run(["umount", "-l", line.split()[1]])
deadline = time.monotonic() + 60
while folder.exists() and time.monotonic() < deadline:  # processes that end may still write
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.1)
"""


@pytest.fixture(scope="session", autouse=True)
def _nothing_stays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    argv = [sys.executable, "-P", "-c", _GUARD, str(tmp_path_factory.getbasetemp())]
    guard = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
    with pytest.MonkeyPatch.context() as patch, guard:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
        yield
        guard.communicate(b"ended")
