#!/usr/bin/env python3
"""Prints the size of ``src`` and checks its structure; exits 1 if a bound of ``[tool.structure]`` is broken.

The bounds stand in pyproject.toml. Modules are files that hold code; code lines are lines without blanks,
comments and docstrings. A class name must mean one thing in the whole project. Docstrings and comments use
none of ``words``, and no docstring begins with an indirect question. Nor does the text that users and
operators read use them: ``pages``. No two modules import one another, directly or by way of others: imports
inside functions count, those for type checkers do not. Loggers, type variables and public constants stand
above the first class or function of a module, unless they are made of names that are defined above them.
"""

import ast
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
SOURCE: Final = ROOT / "src"
_DOCUMENTED: Final = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_QUESTION: Final = re.compile(r"\s*(?:What|Who|Whom|Whose|How|Where|Which|When|Why)\b")
_MAKER: Final = re.compile(r"= (?:\w+\.)*(?:TypeVar|ParamSpec|get_logger|getLogger)\(")
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


def read(path: Path, below: Path | None = None) -> SourceFile:
    """Parse one module, whose dotted name begins below a folder (``src``)."""
    parts = path.relative_to(below or SOURCE).with_suffix("").parts
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
    yield from _circles(files)
    yield from (
        f"{file.name}:{line}: {names} stands above classes and functions"
        for file in files
        for line, names in _late_constants(file)
    )
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


def _circles(files: list[SourceFile]) -> Iterator[str]:
    """One circle of imports, if there is one."""
    names = {file.name for file in files}
    graph = {file.name: set(_imported(file, names)) - {file.name} for file in files}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        yield f"modules import each other: {' <- '.join(exc.args[1])}"


def _imported(file: SourceFile, names: set[str]) -> Iterator[str]:
    """The modules of these names that a module imports, in functions too, but not for type checkers."""
    waiting: list[ast.AST] = [file.tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from names.intersection(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            modules = names.intersection(f"{parent}.{alias.name}" for alias in node.names)
            yield from modules
            if parent in names and len(modules) < len(node.names):
                yield parent


def _late_constants(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Line and names of loggers, type variables and public constants below the first class or function.

    Those that are made of such a class or function may stand there.
    """
    above: set[str] = set()
    for node in file.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            above.add(node.name)
        elif above and isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            made = [each.id for each in targets if isinstance(each, ast.Name)]
            if not above.isdisjoint(each.id for each in ast.walk(node) if isinstance(each, ast.Name)):
                above.update(made)
            elif _MAKER.search(ast.unparse(node)) or not all(name.startswith("_") for name in made):
                yield node.lineno, ", ".join(made)


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
