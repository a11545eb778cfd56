"""Chooses the tests of a tier, and notes which test each process runs: a pytest plugin.

The second tier is what lies in the folders of ``PARTS`` and what ``tests/second_tier.txt`` names. The first
tier is everything else: it needs Python and the lock files alone.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parents[1]
PARTS: Final = ("chaos", "deploy", "e2e", "monitoring", "peers")
LISTED: Final = TESTS / "second_tier.txt"
UNDER_WAY: Final = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", help="1, or a part of the second tier: a folder of tests, or others")
    parser.addoption("--under-way", type=Path, help="the folder for notes of which tests run")


@cache
def listed() -> frozenset[str]:
    """What the list names, as pytest's ids: files, functions and single cases."""
    lines = LISTED.read_text("utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def is_second(test: str) -> bool:
    """Whether the second tier has the test of this id."""
    name = test.partition("[")[0]
    return test.split("/")[1] in PARTS or not listed().isdisjoint({test, name, name.partition("::")[0]})


def part_of(test: str) -> str:
    """The part of the second tier that has the test of this id: its folder, or ``others``."""
    folder = test.split("/")[1]
    return folder if folder in {*PARTS, "fuzz", "speed"} else "others"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file of which nothing would run."""
    tier = config.getoption("--tier")
    if not tier or not collection_path.match("test_*.py") or not collection_path.is_relative_to(TESTS):
        return None
    name = f"tests/{collection_path.relative_to(TESTS)}"
    if is_second(name):
        return part_of(name) != tier or None
    return (tier != "1" and not any(each.startswith(f"{name}::") for each in listed())) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = config.getoption("--tier")
    if tier:
        tiers = [(each, part_of(each.nodeid) if is_second(each.nodeid) else "1") for each in items]
        config.hook.pytest_deselected(items=[each for each, its in tiers if its != tier])
        items[:] = [each for each, its in tiers if its == tier]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note the test, so that a run that hangs can say where."""
    folder = item.config.getoption("--under-way")
    if folder is None:
        return (yield)
    note = folder / f"under-way-{getattr(item.config, 'workerinput', {}).get('workerid', 'main')}"
    note.write_text(item.nodeid, "utf-8")
    try:
        return (yield)
    finally:
        note.unlink()
