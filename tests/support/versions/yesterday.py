"""Yesterday's version of this project, taken from the history of this clone and installed as its users do.

It is in the folder ``.cache/yesterday-<commit>``: the sources of that commit, and a virtual environment that
its own ``scripts/venv.sh`` makes of its own lock files. Made once for a checkout.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support.programs import locked_cache, program
from support.wheels import ROOT, SOURCES

COMMIT: Final = "f072542e51997ad0cf3b74ebfb4b29831674b1a0"
"""The last commit of 0.2. Another one is pinned when a version is released."""
NO_HISTORY: Final = "this clone is shallow, or none: yesterday's version is not in its history"
INSTALL_LIMIT_S: Final = 600
"""For the first test that needs yesterday's version: it installs some fifty packages."""
_READY: Final = 'set -euo pipefail; source "$1/scripts/venv.sh"; ready runtime'


@functools.cache
def yesterdays_python() -> Path:
    """The Python of an environment that has yesterday's version and what its lock files name."""
    with locked_cache(f"yesterday-{COMMIT}") as folder:
        sources = folder / "sources"
        if not sources.exists():
            half = folder / "half"  # there, if another run was killed
            half.mkdir(exist_ok=True)
            subprocess.run(["tar", "-x", "-C", half], input=_archive(), check=True)
            half.rename(sources)
        done = subprocess.run(
            ["bash", "-c", _READY, "bash", sources],
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_LIMIT_S,
        )
    if done.returncode != 0:
        pytest.skip(f"yesterday's version cannot be installed: {done.stderr}")
    return sources / ".venv/bin/python"


def _archive() -> bytes:
    """The files of the commit that an installation needs, as a tar archive."""
    git = (program("git"), "-c", f"safe.directory={ROOT}", "-C", str(ROOT))  # it may be another user's
    done = subprocess.run(
        [*git, "archive", COMMIT, "--", *SOURCES, "requirements", "scripts"], capture_output=True, check=False
    )
    if done.returncode == 0:
        return done.stdout
    asked = subprocess.run(
        [*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, check=False
    )
    if asked.stdout.strip() != "false":
        pytest.skip(NO_HISTORY)
    pytest.skip(f"yesterday's version is not in this full clone: {done.stderr.decode()}")  # fails in CI
