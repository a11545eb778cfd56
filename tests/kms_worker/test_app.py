"""Jobs that a process of a worker takes one after another, and what ends that."""

from typing import cast

import pytest

from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.model import Attempt, Following
from kms_core.jobs.spec import BULK
from kms_protocol.errors import JobsUnavailable
from kms_worker import app

CONTEXT = cast("WorkerContext", None)


@pytest.mark.parametrize("is_claimed", [True, False])
def test_a_claimed_job_is_not_left_because_redis_went_away_after_the_one_before(
    monkeypatch: pytest.MonkeyPatch, *, is_claimed: bool
) -> None:
    """Its lease runs already: without this it would wait until that ends, and lose an attempt."""
    following = Following("w/1", [BULK], lambda: True)

    def ends(_: WorkerContext, following: Following, *, woken: bool) -> bool:
        assert not woken
        if is_claimed:
            following.claimed.append(cast("Attempt", object()))
        raise JobsUnavailable

    monkeypatch.setattr(app, "run_next", ends)

    if is_claimed:
        assert app._run_next(CONTEXT, following, woken=False)  # noqa: SLF001 -- one step of the loop
    else:
        with pytest.raises(JobsUnavailable):
            app._run_next(CONTEXT, following, woken=False)  # noqa: SLF001 -- as above
