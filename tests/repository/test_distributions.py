"""What both pyproject.toml say: what is imported is declared, and the two distributions agree."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.requirements import Requirement
from trove_classifiers import classifiers

from kms_protocol import __version__

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "pyproject.toml").read_text()
SETTINGS: Final[dict[str, Any]] = tomllib.loads(TEXT)
CLIENT_SETTINGS: Final[dict[str, Any]] = tomllib.loads((ROOT / "client/pyproject.toml").read_text())
PROJECT, CLIENT = SETTINGS["project"], CLIENT_SETTINGS["project"]
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


# -- the two distributions -----------------------------------------------------------------------------


def test_there_is_one_version() -> None:
    needs = {need.name: need for need in map(Requirement, PROJECT["dependencies"])}

    assert PROJECT["version"] == CLIENT["version"] == __version__
    assert str(needs["kms-service-client"].specifier) == f"=={__version__}"


@pytest.mark.parametrize(("project", "folder"), [(PROJECT, "."), (CLIENT, "client")])
def test_metadata_are_alike_and_known_to_registries(project: dict[str, Any], folder: str) -> None:
    assert project["requires-python"] == ">=3.11"
    assert {"Programming Language :: Python :: 3.11", "Typing :: Typed"} <= set(project["classifiers"])
    assert set(project["classifiers"]) <= classifiers
    assert (ROOT / folder / project["readme"]).is_file()
    assert project["description"]


def test_both_are_built_by_one_backend() -> None:
    assert CLIENT_SETTINGS["build-system"] == SETTINGS["build-system"]


def test_nothing_says_to_install_a_name_that_no_registry_has() -> None:
    """``pip install kms-service`` would run what a stranger registered under that name."""
    told = re.compile(r"\binstall\b[^`\n]*?['\"\s]kms-service(?:-client)?(?:\[[a-z]+\])?(?:['\"`\s]|$)")
    texts = [path for each in ("*.md", "docs/**/*", "deploy/**/*", "src/**/*.py") for path in ROOT.glob(each)]

    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in texts
        if path.suffix in {".md", ".py", ".toml", ".yml"}
        for line in path.read_text("utf-8").splitlines()
        if told.search(line)
    ]

    assert found == []


@pytest.mark.parametrize(
    ("link", "holds"),
    [
        ("client/src", "kms_client"),
        ("deploy/helm/kms-service/files/dashboards", "kms-jobs.json"),
        ("deploy/helm/kms-service/files/rules", "slo.yml"),
    ],
)
def test_what_is_packed_twice_is_linked(link: str, holds: str) -> None:
    """A copy of the tree may turn links into files with their targets, which silently pack nothing."""
    assert (ROOT / link).is_symlink()
    assert (ROOT / link / holds).exists()
