"""Waits before a retry."""

import pytest

from kms_core.backoff import jittered_wait_s


@pytest.mark.parametrize(
    ("attempt", "bounds", "whole_s"),
    [
        (1, {}, 0.1),
        (4, {}, 0.8),
        (3, {"factor": 4.0}, 1.6),
        (1, {"at_least_s": 0.5}, 0.5),
        (30, {"at_most_s": 2.0}, 2.0),
        (10_000, {"at_most_s": 2.0}, 2.0),
        (1, {"at_least_s": 9.0, "at_most_s": 2.0}, 2.0),
    ],
)
def test_a_wait_is_the_upper_half_of_the_exponential(
    attempt: int, bounds: dict[str, float], whole_s: float
) -> None:
    waits = [jittered_wait_s(0.1, attempt, **bounds) for _ in range(200)]

    assert all(whole_s / 2 <= wait_s <= whole_s * (1 + 1e-9) for wait_s in waits)
    assert len(set(waits)) > 1
