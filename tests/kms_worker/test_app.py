"""Jobs that a process of a worker takes one after another, and what ends that."""

import time
from types import SimpleNamespace
from typing import cast

import pytest

from kms_core.container import Core
from kms_core.jobs.execution import attendance
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.model import Following
from kms_core.jobs.spec import BULK, FILES, QUEUES
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
            following.claimed.append(("an attempt", [b"claimed"]))
        raise JobsUnavailable

    monkeypatch.setattr(app, "run_next", ends)

    if is_claimed:
        assert app._run_next(CONTEXT, following, woken=False)  # noqa: SLF001 -- one step of the loop
    else:
        with pytest.raises(JobsUnavailable):
            app._run_next(CONTEXT, following, woken=False)  # noqa: SLF001 -- as above


def test_queues_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of another queue waits half a second, and not until the first queue is empty."""
    now = [0.0]
    firsts: list[str] = []
    handed_on: list[list[str]] = []

    def runs(_: WorkerContext, following: Following, *, woken: bool) -> bool:
        assert woken == (not firsts)
        firsts.append(following.queues[0])
        now[0] += 0.3  # seconds of a job
        return True

    store = SimpleNamespace(wake=lambda queues: handed_on.append([*queues]))
    core = SimpleNamespace(
        install=SimpleNamespace(require=lambda: None), worker_context=SimpleNamespace(store=store)
    )
    monkeypatch.setattr(app, "run_next", runs)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(attendance, "is_wanted", lambda _: True)

    app._drain(lambda: cast("Core", core), "w/1", BULK, QUEUES)  # noqa: SLF001 -- the loop of a process

    assert firsts == [BULK, BULK, FILES, FILES]
    assert handed_on == [list(QUEUES)]
