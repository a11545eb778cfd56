"""``scripts/test --changed`` finds the tests of a change by the mirror of src in tests."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import pytest

ROOT: Final = Path(__file__).parents[2]
affected_by: Final = cast(
    "Callable[[Path], set[Path]]", runpy.run_path(str(ROOT / "scripts/changed_tests.py"))["affected_by"]
)
MODULES: Final = sorted(path.relative_to(ROOT) for path in (ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("src/kms_core/age/header.py", "tests/kms_core/age/test_header.py"),
        ("src/kms_core/age/__init__.py", "tests/kms_core/age/test_header.py"),
        ("src/kms_core/service.py", "tests/kms_core/test_service_reseal.py"),
        ("tests/kms_core/age/test_header.py", "tests/kms_core/age/test_header.py"),
        ("tests/kms_client/conftest.py", "tests/kms_client"),
        ("tests/support/ports.py", "tests/support/test_ports.py"),
        ("docs/security.md", "tests/repository"),
        ("scripts/lint", "tests/repository"),
    ],
)
def test_a_change_has_its_tests(changed: str, expected: str) -> None:
    assert Path(expected) in affected_by(Path(changed))


def test_a_module_does_not_run_the_tests_of_its_neighbours() -> None:
    assert Path("tests/kms_core/age/test_bech32.py") not in affected_by(Path("src/kms_core/age/armor.py"))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_each_module_has_tests(module: Path) -> None:
    assert affected_by(module)
