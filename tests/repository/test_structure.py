"""``scripts/structure.py``: each bound is broken once in a small tree, and found."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
BOUNDS: Final[dict[str, Any]] = {
    "code_lines": 99,
    "module_lines": 40,
    "words": ["anew", "nudges?"],
    "pages": [],
}
IN_A_FUNCTION: Final = "def f():\n    from p import b\n"
FOR_TYPES: Final = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import b\n"


@pytest.fixture
def structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, over an empty tree."""
    spec = importlib.util.spec_from_file_location("structure", ROOT / "scripts/structure.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "structure", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "SOURCE", tmp_path)
    return module


def found(structure: ModuleType, files: dict[str, str], **bounds: object) -> list[str]:
    for name, text in files.items():
        path = structure.SOURCE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    read = [structure.read(path) for path in sorted(structure.SOURCE.rglob("*.py"))]
    return list(structure.problems(read, BOUNDS | bounds))


@pytest.mark.parametrize(
    "files",
    [
        {"a": '"""Reads files."""\n\nX = 1\n', "p/__init__": '"""Empty."""\n'},
        {"a": 'X = "anew, What?"\n'},
        {"p/__init__": "", "p/a": FOR_TYPES, "p/b": "from p import a\n"},
        {"p/__init__": "", "p/a": "from p import b\n", "p/b": "from typing import a\n"},
        {"a": "def f() -> int: ...\n_X = 1\nY = f()\nZ = [Y]\nA = (f | None)\n"},
    ],
    ids=[
        "plain",
        "a text that is no docstring",
        "an import for type checkers",
        "a name of another package",
        "late constants of what is above",
    ],
)
def test_a_good_tree_has_no_problem(structure: ModuleType, files: dict[str, str]) -> None:
    assert found(structure, files) == []


def test_code_lines_are_those_without_blanks_comments_and_docstrings(structure: ModuleType) -> None:
    path = structure.SOURCE / "a.py"
    path.write_text('"""One.\n\nTwo."""\n\n# three\nX = [\n    1,\n]\nY = """\n-- in SQL\n"""\n"""Of Y."""\n')

    assert structure.read(path).code_lines == 6


@pytest.mark.parametrize(
    ("files", "bounds", "problem"),
    [
        ({"a": "X = 1\nY = 2\n"}, {"code_lines": 1}, "2 code lines, at most 1"),
        ({"a": "\n" * 41 + "X = 1\n"}, {}, "a: 42 lines, at most 40"),
        ({"a": "class A: ...\n", "b": "class A: ...\n"}, {}, "class A: 2 classes have this name"),
        ({"a": '"""Made anew."""\nX = 1\n'}, {}, "a.py:1: 'anew' is no word of this project"),
        ({"a": 'def f():\n    """One.\n\n    Two nudges."""\n'}, {}, "a.py:4: 'nudges' is no word"),
        ({"a": "X = 1  # anew\n"}, {}, "a.py:1: 'anew' is no word"),
        ({"a": 'def f():\n    """What it does."""\n'}, {}, "a.py:2: a docstring begins with"),
        ({"p/a": "from p import b\n", "p/b": "import p.a\n"}, {}, "modules import each other: p."),
        ({"p/a": IN_A_FUNCTION, "p/b": "from p.a import f\n"}, {}, "modules import each other: p."),
        ({"a": "import b\n", "b": "import c\n", "c": "import a\n"}, {}, "modules import each other: "),
        ({"a": "class A: ...\nX = 1\n"}, {}, "a:2: X stands above"),
        ({"a": "def f(): ...\nX: int = 1\n_Y = {name: 1 for name in X}\n"}, {}, "a:2: X stands above"),
        ({"a": 'def f(): ...\n_T = TypeVar("_T")\n'}, {}, "a:2: _T stands above"),
        ({"a": "def f(): ...\n_log = structlog.get_logger(__name__)\n"}, {}, "a:2: _log stands above"),
    ],
    ids=str,
)  # fmt: skip
def test_each_bound_is_held(
    structure: ModuleType, files: dict[str, str], bounds: dict[str, object], problem: str
) -> None:
    [only] = found(structure, files, **bounds)
    assert only.startswith(problem)
