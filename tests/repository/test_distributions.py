"""What both pyproject.toml say of the two distributions: one version, and metadata that registries accept."""

import re
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.requirements import Requirement
from trove_classifiers import classifiers

from kms_protocol import __version__

ROOT: Final = Path(__file__).parents[2]
SERVICE: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT: Final[dict[str, Any]] = tomllib.loads((ROOT / "client/pyproject.toml").read_text())
BOTH: Final = pytest.mark.parametrize(
    "project", [SERVICE["project"], CLIENT["project"]], ids=lambda project: project["name"]
)


def test_there_is_one_version() -> None:
    (need,) = [
        need
        for need in map(Requirement, SERVICE["project"]["dependencies"])
        if need.name == "kms-service-client"
    ]

    assert SERVICE["project"]["version"] == CLIENT["project"]["version"] == __version__
    assert str(need.specifier) == f"=={__version__}"


@BOTH
def test_pythons_are_the_same(project: dict[str, Any]) -> None:
    assert project["requires-python"] == ">=3.11"
    assert {"Programming Language :: Python :: 3.11", "Typing :: Typed"} <= set(project["classifiers"])


@BOTH
def test_classifiers_are_known(project: dict[str, Any]) -> None:
    assert set(project["classifiers"]) <= classifiers


@BOTH
def test_the_page_of_a_distribution_is_there(project: dict[str, Any]) -> None:
    folder = ROOT if project is SERVICE["project"] else ROOT / "client"

    assert (folder / project["readme"]).is_file()
    assert project["description"]


def test_both_are_built_by_one_backend() -> None:
    assert CLIENT["build-system"] == SERVICE["build-system"]


def test_nothing_says_to_install_a_name_that_no_registry_has() -> None:
    """``pip install kms-service`` would run what a stranger registered under that name."""
    told = re.compile(r"\binstall\b[^`\n]*?['\"\s]kms-service(?:-client)?(?:\[[a-z]+\])?(?:['\"`\s]|$)")
    texts = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*"),
        *ROOT.glob("deploy/**/*"),
        *ROOT.glob("src/**/*.py"),
    ]

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
