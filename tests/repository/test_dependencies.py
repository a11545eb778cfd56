"""What is imported is declared, and what is declared is imported or has a reason beside it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "pyproject.toml").read_text()
SETTINGS: Final[dict[str, Any]] = tomllib.loads(TEXT)
CLIENT_TEXT: Final = (ROOT / "client/pyproject.toml").read_text()
CLIENT: Final[dict[str, Any]] = tomllib.loads(CLIENT_TEXT)["project"]
OURS: Final = frozenset(path.name for path in (ROOT / "src").iterdir())
TYPING_ONLY: Final = frozenset({"_typeshed"})  # exists for type checkers
BROUGHT: Final = frozenset({"pyarrow"})  # by the programs that import kms_client.parquet; it says so without
NAME: Final = re.compile(r"[A-Za-z0-9._-]+")
LINE: Final = re.compile(r'^ *(?:aws = \[)?"([A-Za-z0-9._-]+)[^"]*",?\]?[ ]*(#.*)?$', re.MULTILINE)
TESTS: Final = ("tests", "benchmarks", "monitoring", "scripts")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(needs: list[Any]) -> set[str]:
    found = (NAME.match(need) for need in needs if isinstance(need, str))
    return {canonical(match[0]) for match in found if match}


def modules(folder: Path) -> Iterator[str]:
    """Yield each module that a file below ``folder`` imports, inside functions too."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module


def imported(*folders: str) -> dict[str, set[str]]:
    """Each package that is imported, with the distributions that may carry it."""
    tops = {module.partition(".")[0] for folder in folders for module in modules(ROOT / folder)}
    carriers = packages_distributions()
    foreign = tops - sys.stdlib_module_names - OURS - TYPING_ONLY - BROUGHT
    return {top: {canonical(name) for name in carriers.get(top, ())} for top in foreign}


PROJECT: Final = SETTINGS["project"]
RUNTIME: Final = names(PROJECT["dependencies"])
EXTRAS: Final = names([need for needs in PROJECT["optional-dependencies"].values() for need in needs])
GROUPS: Final = names([need for needs in SETTINGS["dependency-groups"].values() for need in needs])


def undeclared(declared: set[str], *folders: str) -> set[str]:
    return {top for top, carriers in imported(*folders).items() if not carriers & declared}


def test_what_the_service_imports_is_declared() -> None:
    assert undeclared(RUNTIME | EXTRAS, "src") == set()


def test_what_the_client_imports_is_declared() -> None:
    declared = names(CLIENT["dependencies"])
    extra = names(CLIENT["optional-dependencies"]["async"])

    assert undeclared(declared | extra, "src/kms_client", "src/kms_protocol") == set()
    assert declared | extra <= set[str]().union(*imported("src/kms_client", "src/kms_protocol").values())


def test_the_service_and_its_client_accept_the_same_versions() -> None:
    needed = {*CLIENT["dependencies"], *CLIENT["optional-dependencies"]["async"]}

    assert needed <= set(PROJECT["dependencies"])


def test_what_is_declared_is_imported_or_has_a_reason() -> None:
    service = set[str]().union(*imported("src").values())
    tests = set[str]().union(*imported(*TESTS).values())
    lines = {canonical(name): bool(reason) for name, reason in LINE.findall(TEXT)}
    reasons = {name for name, reason in lines.items() if reason}

    assert lines.keys() >= RUNTIME | EXTRAS, "this test reads pyproject.toml line by line"
    assert (RUNTIME | EXTRAS) - service - reasons == set()
    assert GROUPS - tests - service - reasons == set()
