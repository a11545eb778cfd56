"""Waits before a retry."""

import math
import random


def jittered_wait_s(
    first_s: float, attempt: int, *, factor: float = 2.0, at_least_s: float = 0.0, at_most_s: float = math.inf
) -> float:
    """Seconds to wait after failed attempt number ``attempt`` (from 1).

    ``first_s`` after the first attempt, ``factor`` times as long after each further one, within the two
    bounds; of that a random part between a half and the whole, so that callers do not retry in step.
    """
    grown_s = first_s * factor ** min(attempt - 1, 64)  # so that a float has room for it
    wait_s = min(max(grown_s, at_least_s), at_most_s)
    return wait_s * random.uniform(0.5, 1.0)  # noqa: S311 -- jitter, no secret
