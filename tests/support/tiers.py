"""Chooses the tests of a tier, and notes which test each process runs: a pytest plugin.

The second tier is what lies in the folders of ``PARTS`` and what ``tests/second_tier.txt`` names. The first
tier is everything else: it needs Python and the lock files alone.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parents[1]
PARTS: Final = ("chaos", "deploy", "e2e", "monitoring", "peers")
LISTED: Final = TESTS / "second_tier.txt"
LONGEST: Final = (
    "peers/test_replicas.py",
    "peers/test_rolling_update.py",
    "peers/test_versions.py",
    "e2e/test_admission.py",
    "chaos/test_poison.py",
    "chaos/test_many_hosts.py",
    "deploy/test_image_run.py",
    "deploy/test_fresh_install.py",
    "peers/test_rabbitmq.py",
    "e2e/test_hosts.py",
    "monitoring/test_live.py",
    "chaos/test_restarts.py",
    "e2e/test_audit_anchors.py",
    "e2e/test_key_documents.py",
    "chaos/test_no_room.py",
    "e2e/test_auth_revocation.py",
    "e2e/test_schemathesis.py",
    "chaos/test_wake_ups.py",
    "contract/test_faults.py",
    "chaos/test_kills.py",
    "chaos/test_storm.py",
    "kms_cli/test_transcripts.py",
)
"""Files of the second tier that take a minute or more: they begin first, since each is run by one process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", help="1, or parts of the second tier: folders of tests, and others")
    parser.addoption("--under-way", type=Path, help="the folder for notes of which tests run")


def _wanted(config: pytest.Config) -> Sequence[str]:
    asked: str | None = config.getoption("--tier")
    return asked.split(",") if asked else ()


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
    wanted = _wanted(config)
    if not wanted or not collection_path.match("test_*.py") or not collection_path.is_relative_to(TESTS):
        return None
    name = f"tests/{collection_path.relative_to(TESTS)}"
    if is_second(name):
        return part_of(name) not in wanted or None
    return ("1" not in wanted and not any(each.startswith(f"{name}::") for each in listed())) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = _wanted(config)
    if wanted:
        tiers = [(each, part_of(each.nodeid) if is_second(each.nodeid) else "1") for each in items]
        config.hook.pytest_deselected(items=[each for each, its in tiers if its not in wanted])
        items[:] = [each for each, its in tiers if its in wanted]
    if wanted and "1" not in wanted:
        rank = {name: at for at, name in enumerate(f"tests/{each}" for each in LONGEST)}
        items.sort(key=lambda each: rank.get(each.nodeid.partition("::")[0], len(rank)))


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
