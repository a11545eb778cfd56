"""docs/seed-parity.md answers every promise of the seed, each with a keeper that exists or a reason."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
ROWS: Final = re.findall(
    r"^\| (C?\d+) \| (.+?) \| (.+) \|$", (ROOT / "docs/seed-parity.md").read_text("utf-8"), re.MULTILINE
)
PROMISES: Final = [*map(str, range(1, 127)), *(f"C{number}" for number in range(1, 11))]
NAMED: Final = re.compile(r"`([^`\s]+)`")
REASON: Final = re.compile(r"\*\*(?:differs|not yet):\*\* \S")


@cache
def defined(path: str) -> frozenset[str]:
    """The tests that a file defines."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def is_there(keeper: str) -> bool:
    path, _, test = keeper.partition("::")
    return (ROOT / path).is_file() and (not test or test in defined(path))


def test_every_promise_is_answered_once_and_in_order() -> None:
    assert [number for number, _, _ in ROWS] == PROMISES


@pytest.mark.parametrize(("number", "does", "kept"), ROWS, ids=[number for number, _, _ in ROWS])
def test_an_answer_has_a_keeper_that_exists(number: str, does: str, kept: str) -> None:
    keepers = NAMED.findall(kept)

    assert keepers or REASON.search(f"{does} {kept}"), f"{number} has neither a keeper nor a reason"
    assert [keeper for keeper in keepers if not is_there(keeper)] == []
