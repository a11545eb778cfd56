"""A class name means one thing in the whole project."""

import ast
from collections import Counter
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).parents[2] / "src"


def test_no_two_classes_share_a_name() -> None:
    names = Counter(
        node.name
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )

    assert len(names) > 500
    assert [name for name, count in names.items() if count > 1] == []
