"""Every claim of docs/security.md is numbered, referred to by its number, and held by tests that exist."""

import ast
import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "docs/security.md").read_text("utf-8")
CLAIMS: Final = dict(
    re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z|^## )", TEXT.partition("## Claims")[2], re.MULTILINE | re.DOTALL)
)
_TEST: Final = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def defined(path: str) -> set[str]:
    """The tests that a file defines."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_claims_are_numbered_without_gaps() -> None:
    assert list(map(int, CLAIMS)) == list(range(1, len(CLAIMS) + 1))
    assert len(CLAIMS) >= 29


@pytest.mark.parametrize("number", CLAIMS)
def test_each_claim_is_held_by_tests_that_exist(number: str) -> None:
    held = _TEST.findall(CLAIMS[number])

    assert held, f"claim {number} names no test"
    assert not [f"{path}::{name}" for path, name in held if name not in defined(path)]


def test_the_table_of_attackers_refers_to_claims_that_exist() -> None:
    table = TEXT.partition("## What an attacker can do")[2].partition("## Claims")[0]
    numbers = {number for group in re.findall(r"\((\d+(?:, \d+)*)\)", table) for number in group.split(", ")}

    assert numbers <= CLAIMS.keys()
    assert len(numbers) > 20
