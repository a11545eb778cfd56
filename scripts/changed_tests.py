"""Prints the tests of what changed since a commit (HEAD), one path a line; of the last commit if nothing did.

A module is tested by the files of its folder in ``tests`` that carry its name or import it, and by those that
``tests/modules.txt`` names for it; by its folder if none of these is of the first tier; a test by itself.
Other files are judged by ``tests/repository``, and by unit tests that name their path. ``--own`` prints no
folder, and nothing for other files. ``scripts/test --changed`` runs the first tier of what this prints, then
the second of what ``--own`` prints.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
TESTS: Final = Path("tests")
REPOSITORY: Final = TESTS / "repository"
LISTED: Final = TESTS / "modules.txt"


def changed(since: str) -> list[Path]:
    """Paths from the top of the repository. Raises CalledProcessError without git, or such a commit."""
    found = _git("diff", "--name-only", since) + _git("ls-files", "--others", "--exclude-standard")
    return [Path(name) for name in found or _git("diff", "--name-only", "HEAD~1")]


def affected_by(path: Path) -> set[Path]:
    """The test files to run for a changed file, which may be gone."""
    own = own_tests(path)
    if path.parts[0] == "src" and path.suffix and all(map(_is_second, own)):
        return own | set(_of_folder(path))
    if own:
        return own
    if path.name == "conftest.py":
        return {path.parent}
    if path.parts[0] == "tests" and path.suffix == ".py":
        return set(_importing(path))
    return {REPOSITORY, *_reading(path)}


def own_tests(path: Path) -> set[Path]:
    """The test files of a module, by name, import or list, or a test itself; empty for other files."""
    if path.parts[0] == "tests" and path.match("test_*.py"):
        return {path}
    if path.parts[0] != "src" or not path.suffix:
        return set()
    module = path.relative_to("src")
    imports = _imports(module.with_suffix(""))
    return set(_listed(module)) | {
        each
        for each in _of_folder(path)
        if _is_named(each, module.stem) or imports.search((ROOT / each).read_text("utf-8"))
    }


def _of_folder(module: Path) -> Iterator[Path]:
    """The test files of the folder that mirrors a module's, or of one above it.

    A folder that Git removed may remain, with compiled files alone.
    """
    folder = TESTS / module.relative_to("src").parent
    while folder != TESTS and not any((ROOT / folder).glob("test_*.py")):
        folder = folder.parent
    return (each.relative_to(ROOT) for each in sorted((ROOT / folder).glob("test_*.py")))


def _listed(module: Path) -> list[Path]:
    """The tests of a module without a test file of its name."""
    lines = (ROOT / LISTED).read_text("utf-8").splitlines()
    return [Path(name) for line in lines if line.startswith(f"{module} ") for name in line.split()[1:]]


def _is_second(test: Path) -> bool:
    """Whether a file is of the second tier as a whole."""
    is_named = str(test) in (ROOT / TESTS / "second_tier.txt").read_text("utf-8").splitlines()
    return is_named or test.parts[1] in {"chaos", "deploy", "e2e", "monitoring", "peers"}


def _importing(helper: Path) -> Iterator[Path]:
    """Tests beside a helper, and unit tests of the packages that import it."""
    imports = _imports(helper.relative_to(TESTS).with_suffix(""))
    for package in ("kms_*", helper.parts[1]):
        for each in ROOT.glob(f"tests/{package}/**/test_*.py"):
            if imports.search(each.read_text("utf-8")):
                yield each.relative_to(ROOT)


def _reading(path: Path) -> Iterator[Path]:
    """Unit tests with the path of a file in quotes, and those of the helpers that have it."""
    for each in sorted((ROOT / TESTS).glob("**/*.py")):
        test = each.relative_to(ROOT)
        if f'"{path}"' not in each.read_text("utf-8"):
            continue
        if test.parts[1] == "support":
            yield from _importing(test)
        elif test.parts[1].startswith("kms_") and test.match("test_*.py"):
            yield test


def _is_named(test: Path, module: str) -> bool:
    return f"{test.stem}_".startswith(f"test_{module}_")


def _imports(module: Path) -> re.Pattern[str]:
    """The module imported by its full name, or from its package by its own."""
    dotted, package = ".".join(module.parts), ".".join(module.parent.parts)
    return re.compile(
        rf"^\s*(?:from|import) {dotted}\b|^from {package} import [^\n]*\b{module.name}\b", re.MULTILINE
    )


def _git(*words: str) -> list[str]:
    argv = ["git", *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


if __name__ == "__main__":
    since = next((word for word in sys.argv[1:] if word != "--own"), "HEAD")
    tests_of = own_tests if "--own" in sys.argv else affected_by
    for found in sorted(set().union(*map(tests_of, changed(since)))):
        if (ROOT / found).exists():
            print(found)  # noqa: T201 -- a program
