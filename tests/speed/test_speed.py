"""Hot paths cost what their budgets say, in counted work, and ten times as much costs ten times as much.

No test knows seconds: a busy machine counts the same, and processor time stands beside processor time alone.
"""

from typing import Any, Final

import pytest

from support.speed import budgets
from support.speed.growth import GROWTH_FACTOR

BUDGETS: Final = budgets.read()
LINEAR: Final = 1.03
LINEAR_SECONDS: Final = 3.0  # caches are as large as they are; a square would be 10


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    return budgets.measured()


@pytest.mark.parametrize("name", BUDGETS["counts"])
def test_work_is_within_its_budget(measured: dict[str, dict[str, Any]], name: str) -> None:
    found = list(budgets.complaints(name, measured["counts"][name], BUDGETS["counts"][name]))

    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", BUDGETS["ratios"])
def test_c_stays_near_its_primitives(measured: dict[str, dict[str, Any]], name: str) -> None:
    assert measured["ratios"][name] <= BUDGETS["ratios"][name] * budgets.RATIO


def test_ten_times_as_much_costs_ten_times_as_much(measured: dict[str, dict[str, Any]]) -> None:
    steep = {
        name: found
        for name, found in measured["growth"].items()
        if found["calls"][1] > found["calls"][0] * GROWTH_FACTOR * LINEAR
        or found["seconds"][1] > found["seconds"][0] * GROWTH_FACTOR * LINEAR_SECONDS
    }

    assert not steep


def test_every_path_has_a_budget(measured: dict[str, dict[str, Any]]) -> None:
    for section, of in BUDGETS.items():
        assert measured[section].keys() == of.keys(), "run scripts/budgets"
