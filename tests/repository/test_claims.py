"""What docs/security.md and docs/seed-parity.md claim is numbered, and held by tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "docs/security.md").read_text("utf-8")
CLAIMS: Final = dict(
    re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z|^## )", TEXT.partition("## Claims")[2], re.MULTILINE | re.DOTALL)
)
ROWS: Final = re.findall(
    r"^\| (C?\d+) \| (.+?) \| (.+) \|$", (ROOT / "docs/seed-parity.md").read_text("utf-8"), re.MULTILINE
)
PROMISES: Final = [*map(str, range(1, 127)), *(f"C{number}" for number in range(1, 11))]
TEST: Final = re.compile(r"`(tests/[\w/]+\.py::test_\w+)`")
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


# -- docs/security.md ------------------------------------------------------------------------------------


def test_claims_are_numbered_without_gaps() -> None:
    assert list(map(int, CLAIMS)) == list(range(1, len(CLAIMS) + 1))
    assert len(CLAIMS) >= 29


@pytest.mark.parametrize("number", CLAIMS)
def test_each_claim_is_held_by_tests_that_exist(number: str) -> None:
    held = TEST.findall(CLAIMS[number])

    assert held, f"claim {number} names no test"
    assert [keeper for keeper in held if not is_there(keeper)] == []


def test_the_table_of_attackers_refers_to_claims_that_exist() -> None:
    table = TEXT.partition("## What an attacker can do")[2].partition("## Claims")[0]
    numbers = {number for group in re.findall(r"\((\d+(?:, \d+)*)\)", table) for number in group.split(", ")}

    assert numbers <= CLAIMS.keys()
    assert len(numbers) > 20


# -- docs/seed-parity.md: each promise of the seed, with a keeper ----------------------------------------


def test_every_promise_is_answered_once_and_in_order() -> None:
    assert [number for number, _, _ in ROWS] == PROMISES


@pytest.mark.parametrize(("number", "does", "kept"), ROWS, ids=[number for number, _, _ in ROWS])
def test_an_answer_has_a_keeper_that_exists(number: str, does: str, kept: str) -> None:
    keepers = NAMED.findall(kept)

    assert keepers or REASON.search(f"{does} {kept}"), f"{number} has neither a keeper nor a reason"
    assert [keeper for keeper in keepers if not is_there(keeper)] == []
