#!/usr/bin/env python3
"""Prints the size of ``src`` and checks its structure; exits 1 if a bound of ``[tool.structure]`` is broken.

The bounds stand in pyproject.toml. Modules are files that hold code; code lines are lines without blanks,
comments and docstrings. A class name must mean one thing in the whole project. Docstrings and comments use
none of ``words``, and no docstring begins with an indirect question. Nor does the text that users and
operators read use them: ``pages``.
"""

import ast
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
SOURCE: Final = ROOT / "src"
_DOCUMENTED: Final = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_QUESTION: Final = re.compile(r"\s*(?:What|Who|Whom|Whose|How|Where|Which|When|Why)\b")
_NO_CODE: Final = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
        tokenize.ENCODING,
    }
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One module: its dotted name, its syntax tree, and its prose as pairs of line number and text."""

    name: str
    path: Path
    tree: ast.Module
    code_lines: int
    prose: tuple[tuple[int, str], ...]


def read(path: Path, below: Path = SOURCE) -> SourceFile:
    """Parse one module, whose dotted name begins below a folder."""
    parts = path.relative_to(below).with_suffix("").parts
    tree = ast.parse(path.read_text("utf-8"))
    docstrings = dict(_docstrings(tree))
    documented = {line for start, (end, _) in docstrings.items() for line in range(start, end + 1)}
    code: set[int] = set()
    comments: list[tuple[int, str]] = []
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                comments.append((token.start[0], token.string))
            elif token.type not in _NO_CODE:
                code.update(range(token.start[0], token.end[0] + 1))
    prose = (*((start, text) for start, (_, text) in docstrings.items()), *comments)
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return SourceFile(name, path, tree, len(code - documented), prose)


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, tuple[int, str]]]:
    """First line, last line and text of each docstring, and of each text that stands below a constant."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.lineno, (node.end_lineno or node.lineno, node.value.value)


def problems(files: list[SourceFile], bounds: dict[str, Any]) -> Iterator[str]:
    """Every broken bound, as a line for a person."""
    modules = [file for file in files if file.code_lines]
    code = sum(file.code_lines for file in files)
    if code > bounds["code_lines"]:
        yield f"{code} code lines, at most {bounds['code_lines']}: remove as you add"
    yield from (
        f"{file.name}: {length} lines, at most {bounds['module_lines']}"
        for file in modules
        if (length := len(file.path.read_text("utf-8").splitlines())) > bounds["module_lines"]
    )
    yield from _shared_class_names(files)
    unwanted = re.compile(rf"\b(?:{'|'.join(bounds['words'])})\b", re.IGNORECASE)
    for file in files:
        for line, text in file.prose:
            if not text.startswith("#") and _QUESTION.match(text):
                yield f"{file.path.relative_to(ROOT)}:{line}: a docstring begins with a verb or a noun"
            yield from _words(file.path, line, text, unwanted)
    for pattern in bounds["pages"]:
        for path in sorted(ROOT.glob(pattern)):
            prose = read(path, ROOT).prose if path.suffix == ".py" else ((1, path.read_text("utf-8")),)
            for line, text in prose:
                yield from _words(path, line, text, unwanted)


def _shared_class_names(files: list[SourceFile]) -> Iterator[str]:
    names = Counter(
        node.name for file in files for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)
    )
    yield from (f"class {name}: {count} classes have this name" for name, count in names.items() if count > 1)


def _words(path: Path, line: int, text: str, unwanted: re.Pattern[str]) -> Iterator[str]:
    for found in unwanted.finditer(text):
        at = line + text.count("\n", 0, found.start())
        yield f"{path.relative_to(ROOT)}:{at}: {found[0]!r} is no word of this project"


def main() -> int:
    """Print the figures and the problems. Returns the exit code."""
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["structure"]
    files = [read(path) for path in sorted(SOURCE.rglob("*.py"))]
    found = list(problems(files, bounds))
    modules = sum(1 for file in files if file.code_lines)
    code = sum(file.code_lines for file in files)
    title = f"src: {modules} modules, {code} code lines, {len(found)} problems"
    sys.stdout.write("\n".join((title, *found, "")))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
