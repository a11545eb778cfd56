"""The last version before 0.2, from the repository's own history, run beside the code of the tree."""

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Final

import pytest

from support.service import Service

_ROOT: Final = Path(__file__).parents[2]
_FIRST: Final = '__version__: Final = "0.2.0"'
_WHERE: Final = "src/kms_protocol/__init__.py"


def source_of_0_1(folder: Path) -> Path:
    """The ``src`` of the last commit of 0.1, in ``folder``. Skips without the history."""
    log = ("log", "--format=%H", f"-S{_FIRST}", "--", _WHERE)
    later = _git(*log).decode().split()
    parent = f"{later[-1]}^" if later else ""
    if not later or not _git("rev-parse", "--verify", "--quiet", parent):
        pytest.skip("the history of version 0.1 is not here: clone without --depth")
    with tarfile.open(fileobj=io.BytesIO(_git("archive", parent, "src"))) as found:
        found.extractall(folder, filter="data")
    return folder / "src"


def _git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=_ROOT, check=False, capture_output=True).stdout


class Release(Service):
    """An install whose processes run the code in ``source``, or that of the tree."""

    source: Path | None = None
    worker_probe = "/livez"  # the worker of 0.1 has no other

    @property
    def environ(self) -> dict[str, str]:
        return super().environ | ({"PYTHONPATH": str(self.source)} if self.source else {})
