"""What is skipped at home fails in CI, as CONTRIBUTING.md says."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support import programs
from support.ci_skips import ALLOWED

TESTS: Final = Path(__file__).parents[1]
PROGRAM: Final = """
import pytest

@pytest.mark.parametrize("none", [])
def test_without_cases(none):
    pass

@pytest.mark.skipif(True, reason="no tool")
def test_marked():
    pass

def test_asks():
    pytest.skip("no tool")

def test_allowed():
    pytest.skip({allowed!r})
"""


@pytest.mark.parametrize(("ci", "counts"), [("", "4 skipped"), ("true", "1 failed, 1 skipped, 2 errors")])
def test_a_skip_is_a_failure_in_ci(tmp_path: Path, ci: str, counts: str) -> None:
    (tmp_path / "test_it.py").write_text(PROGRAM.format(allowed=ALLOWED[0]))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "support.ci_skips"]
    argv += ["-p", "no:cacheprovider", str(tmp_path)]
    env = os.environ | {"CI": ci, "PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.stdout.splitlines()[-1].startswith(counts), done.stdout


@pytest.mark.parametrize(("name", "says"), [("age-keygen", ": apt-get install age"), ("minio", "")])
def test_a_skip_says_how_to_install_it(name: str, says: str) -> None:
    with pytest.MonkeyPatch.context() as patch:  # the fixture would undo it after ``first_tier``
        patch.setattr(programs, "which", lambda *_, **__: None)
        with pytest.raises(pytest.skip.Exception) as skipped:
            programs.program(name)

    assert skipped.value.msg == f"{name} is not on the PATH{says}"
