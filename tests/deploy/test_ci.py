""".ci/all installs every program that tests ask for: a missing one fails there, and skips at home."""

import re
from pathlib import Path
from typing import Final

from support.programs import SAME_PACKAGE

ROOT: Final = Path(__file__).parents[2]
TESTS: Final = ROOT / "tests"
ASKED: Final = re.compile(r'\b(?:program|which)\(f?"([a-z-]+)')
OF_PYTHON: Final = {"bao", "sops", "weed"}  # packages of requirements/dev.lock bring these
OPTIONAL: Final = {
    "minio",  # built by hand: tests of stores take it along where it is
    "terraform",  # in no package of Debian: its recipe is tested where it is
}
OF_DEBIAN: Final = {"bash", "mount", "tar"}  # on every system


def test_ci_installs_what_tests_ask_for() -> None:
    asked = {name for path in TESTS.rglob("*.py") for name in ASKED.findall(path.read_text("utf-8"))}
    installed = set(re.findall(r"^needs (\S+)", (ROOT / ".ci/all").read_text("utf-8"), re.MULTILINE))

    assert len(asked) > 20
    needed = {SAME_PACKAGE.get(name, name) for name in asked - OF_PYTHON - OF_DEBIAN - OPTIONAL}
    assert needed <= installed
