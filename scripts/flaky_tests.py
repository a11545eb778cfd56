"""Prints what is wrong with tests/flaky.toml. Never fails: a flaky test holds up no change."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
MOST: Final = 5


def notes() -> Iterator[str]:
    listed = tomllib.loads((ROOT / "tests/flaky.toml").read_text("utf-8")).get("test", [])
    if len(listed) > MOST:
        yield f"{len(listed)} flaky tests: mend their causes or move them to the second tier"
    for each in listed:
        path, _, name = each["id"].partition("::")
        function = name.partition("[")[0].rpartition("::")[2]
        if not (ROOT / path).is_file() or f"def {function}(" not in (ROOT / path).read_text("utf-8"):
            yield f"{each['id']} does not exist"


if __name__ == "__main__":
    for note in notes():
        print(f"tests/flaky.toml: {note}")  # noqa: T201 -- a program
