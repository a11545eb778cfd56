"""``scripts/test`` runs failures again, alone, and ends what hangs; the tiers hold each test once.

``scripts/test --changed`` finds the tests of a change by the mirror of src in tests.
"""

import json
import re
import runpy
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from support import tiers

ROOT: Final = Path(__file__).parents[2]
ONCE: Final = """
    from pathlib import Path
    import pytest

    def test_good():
        pass

    @pytest.mark.parametrize("number", range({times}))
    def test_fails_the_first_time(number):
        note = Path(f"note-{{number}}")
        is_first = not note.exists()
        note.touch()
        assert not is_first, "the first time"
"""
HANGS: Final = """
    import time

    def test_hangs():
        time.sleep(600)
"""
ALWAYS: Final = """
    def test_good():
        pass

    def test_fails():
        assert False
"""
CRASHES: Final = """
    import os

    def test_crashes():
        os.abort()
"""
NOT_COLLECTED: Final = """
    import no_such_module
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The module, over a folder of tests of its own."""
    found = runpy.run_path(str(ROOT / "scripts/run_tests.py"))
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npythonpath = " + shlex.quote(str(ROOT / "tests")), "utf-8"
    )
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["support.tiers"]')
    found["run"].__globals__.update(ROOT=tmp_path, CACHE=tmp_path / "cache")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return SimpleNamespace(**found)


def outcome(runner: SimpleNamespace, tests: str, limit_s: float = 60, **options: int) -> Any:  # noqa: ANN401 -- of a script
    folder = runner.run.__globals__["ROOT"]
    (folder / "test_it.py").write_text(textwrap.dedent(tests))
    words = ("-p", "xdist", "--numprocesses=1")
    return runner.run(runner.Run("it", words, limit_s, options.get("retried", 3)))


def test_what_passes_alone_is_green_and_noted(
    runner: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = outcome(runner, ONCE.format(times=3))

    assert (found.is_green, str(found)) == (True, "4 passed, 0 failed, 3 flaky")
    notes = [json.loads(line) for line in (tmp_path / "cache/flaky.jsonl").read_text().splitlines()]
    assert [each["test"] for each in notes] == [
        f"test_it.py::test_fails_the_first_time[{n}]" for n in range(3)
    ]
    assert all("the first time" in each["failure"] for each in notes)
    assert "flaky: test_it.py::test_fails_the_first_time[0]" in capfd.readouterr().err


def test_many_failures_are_not_run_again(runner: SimpleNamespace, tmp_path: Path) -> None:
    found = outcome(runner, ONCE.format(times=4))

    assert (found.is_green, str(found)) == (False, "1 passed, 4 failed")
    assert not (tmp_path / "cache/flaky.jsonl").exists()


@pytest.mark.parametrize(
    ("tests", "said"),
    [(ALWAYS, "1 passed, 1 failed"), (CRASHES, "0 passed, 1 failed"), (NOT_COLLECTED, "0 passed, 1 failed")],
)
def test_what_fails_again_is_red(runner: SimpleNamespace, tests: str, said: str) -> None:
    found = outcome(runner, tests)

    assert (found.is_green, str(found)) == (False, said)


def test_a_run_that_hangs_ends_and_says_where(
    runner: SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    found = outcome(runner, HANGS, limit_s=8)

    assert not found.is_green
    assert "test_it.py::test_hangs" in capfd.readouterr().err


def test_the_list_of_the_second_tier_names_tests() -> None:
    for each in tiers.listed():
        path, _, name = each.partition("::")
        assert (ROOT / path).is_file(), each
        function = name.partition("[")[0].rpartition("::")[2]
        assert not name or re.search(rf"def {function}\(", (ROOT / path).read_text("utf-8")), each


@pytest.mark.parametrize(
    ("test", "part"),
    [
        ("tests/chaos/test_storm.py::test_x[1]", "chaos"),
        ("tests/kms_core/age/test_header.py::test_x", None),
    ],
)
def test_a_folder_or_the_list_makes_the_tier(test: str, part: str | None) -> None:
    assert tiers.is_second(test) is (part is not None)
    assert part in {None, tiers.part_of(test)}


# -- scripts/test --changed -------------------------------------------------------------------------------

CHANGED: Final = runpy.run_path(str(ROOT / "scripts/changed_tests.py"))
affected_by: Final = cast("Callable[[Path], set[Path]]", CHANGED["affected_by"])
own_tests: Final = cast("Callable[[Path], set[Path]]", CHANGED["own_tests"])
MODULES: Final = sorted(path.relative_to(ROOT) for path in (ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("src/kms_core/age/header.py", "tests/kms_core/age/test_header.py"),
        ("src/kms_core/age/__init__.py", "tests/kms_core/age/test_header.py"),
        ("src/kms_core/service.py", "tests/kms_core/test_service_reseal.py"),
        ("src/kms_core/jobs/store/lua/claim.lua", "tests/kms_core/jobs/store/test_store.py"),
        ("src/kms_api/routes/keys.py", "tests/kms_api/test_permissions.py"),
        ("tests/kms_core/age/test_header.py", "tests/kms_core/age/test_header.py"),
        ("tests/kms_client/conftest.py", "tests/kms_client"),
        ("tests/support/ports.py", "tests/support/test_ports.py"),
        ("docs/security.md", "tests/repository"),
        ("docs/kms.example.toml", "tests/kms_core/settings/test_load.py"),
        ("docs/authorization.md", "tests/kms_api/test_permissions.py"),
        ("scripts/lint", "tests/repository"),
    ],
)
def test_a_change_has_its_tests(changed: str, expected: str) -> None:
    assert Path(expected) in affected_by(Path(changed))


def test_a_new_backend_has_the_tests_that_walk_all_backends() -> None:
    walk = re.compile(r"^from kms_core\.backends import .*\bSCHEMES\b", re.MULTILINE)
    tests = (ROOT / "tests").rglob("test_*.py")
    walking = {each.relative_to(ROOT) for each in tests if walk.search(each.read_text("utf-8"))}

    assert walking
    assert walking <= affected_by(Path("src/kms_core/backends/__init__.py"))


def test_a_module_does_not_run_the_tests_of_its_neighbours() -> None:
    assert Path("tests/kms_core/age/test_bech32.py") not in affected_by(Path("src/kms_core/age/armor.py"))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            "src/kms_core/key_rotation.py",
            {"tests/e2e/test_rotation.py", "tests/kms_core/test_key_rotation.py"},
        ),
        ("tests/e2e/test_rotation.py", {"tests/e2e/test_rotation.py"}),
        ("tests/support/ports.py", set()),
        ("docs/security.md", set()),
    ],
)
def test_the_second_tier_runs_what_holds_a_module_and_no_more(changed: str, expected: set[str]) -> None:
    assert own_tests(Path(changed)) == set(map(Path, expected))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_each_module_has_tests(module: Path) -> None:
    assert affected_by(module)


def test_a_folder_that_git_removed_hides_no_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests/kms_core/gone/__pycache__").mkdir(parents=True)  # Git leaves files that it ignores
    (tmp_path / "tests/kms_core/test_above.py").touch()
    (tmp_path / "tests/modules.txt").touch()
    (tmp_path / "tests/second_tier.txt").touch()
    monkeypatch.setitem(affected_by.__globals__, "ROOT", tmp_path)

    assert affected_by(Path("src/kms_core/gone/module.py")) == {Path("tests/kms_core/test_above.py")}
