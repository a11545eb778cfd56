"""The layout of the tests: helpers are in this package, unit tests lie where their module lies."""

import ast
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parents[1]
SUPPORT: Final = TESTS / "support"
SOURCE: Final = TESTS.parent / "src"
INDEX: Final = (TESTS / "README.md").read_text("utf-8")
MODULES: Final = sorted(TESTS.rglob("*.py"))
LISTED: Final = dict(
    line.split(maxsplit=1)
    for line in (TESTS / "modules.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
)
PACKAGES: Final = sorted(path.name for path in SOURCE.iterdir() if path.is_dir())


def is_test(path: Path) -> bool:
    is_fuzz_target = path.parent.name == "fuzz" and path.name.startswith("fuzz_")
    return path.name.startswith("test_") or path.name == "conftest.py" or is_fuzz_target


def test_no_helper_is_outside_the_package() -> None:
    outside = [path for path in MODULES if not path.is_relative_to(SUPPORT) and not is_test(path)]

    assert [str(path.relative_to(TESTS)) for path in outside] == []


def imports(path: Path) -> set[str]:
    """The names of modules that a file imports, with dots."""
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    plain = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_no_file_imports_a_test_of_another_folder() -> None:
    folders = {path.name for path in TESTS.iterdir()} - {"support", *PACKAGES}
    wrong = [
        f"{path.relative_to(TESTS)}: {name}"
        for path in MODULES
        for name in imports(path)
        if name.partition(".")[0] in folders - {path.parent.name} or ".test_" in f".{name}"
    ]

    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_of_a_package_are_those_of_its_sources(package: str) -> None:
    folders = {path.parent.relative_to(TESTS) for path in (TESTS / package).rglob("test_*.py")}

    assert sorted(str(folder) for folder in folders if not (SOURCE / folder).is_dir()) == []


def test_each_module_has_a_test_of_its_name_or_is_in_the_list() -> None:
    modules = [path.relative_to(SOURCE) for path in SOURCE.rglob("*.py")]
    unnamed = [
        str(path)
        for path in modules
        if path.stem != "__init__"
        and not (TESTS / path).with_name(f"test_{path.stem}.py").is_file()
        and not list((TESTS / path.parent).glob(f"test_{path.stem}_*.py"))
    ]
    named = [name for names in LISTED.values() for name in names.split()]

    assert set(unnamed) <= LISTED.keys() <= set(map(str, modules))
    assert list(LISTED) == sorted(LISTED)
    assert [name for name in named if not (TESTS.parent / name).is_file()] == []


def test_each_helper_is_in_the_index() -> None:
    helpers = [
        path.relative_to(SUPPORT) for path in MODULES if path.is_relative_to(SUPPORT) and not is_test(path)
    ]
    named = {f"`{path.name}`" if len(path.parts) == 1 else f"`{path.parts[0]}/" for path in helpers}

    assert sorted(name for name in named if name not in INDEX) == []
