"""What others made and tests compare with: a missing program skips at home and fails in CI."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kms_core.programs import tether

_CACHE: Final = Path(__file__).parents[1] / ".cache"


def program(name: str) -> str:
    """The path of a program on the PATH, or of a server where Debian puts those."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found:
        return found
    if os.environ.get("CI"):
        pytest.fail(f"{name} is not on the PATH, and CI must not skip what compares with it")
    pytest.skip(f"{name} is not on the PATH")


def tied(*argv: object) -> list[str]:
    """The command of a program that dies with this process, even where that is killed (``tether``)."""
    return [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *map(str, argv)]


@contextmanager
def kept(name: str) -> Iterator[Path]:
    """The folder ``.cache/<name>``, for one test process at a time: others wait while the first fetches."""
    folder = _CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    with (_CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
