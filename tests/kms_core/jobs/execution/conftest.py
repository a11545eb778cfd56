"""A core whose leases last, the root of its file jobs, and workers to which something happens at a step."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from kms_core.container import Core
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.model import Attempt, Checkpoint
from kms_core.jobs.spec import Fields, JobSpec
from support.failing_store import Killed, StumblingStore
from support.job_stores import LONG

Worker = Callable[..., WorkerContext]


@pytest.fixture
def core(core: Core) -> Core:
    """Its leases outlast a test on a slow machine, and three attempts are made."""
    core.worker_context.store.rules = LONG.jobs
    return core


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The root of file jobs of ``core``."""
    return tmp_path / "state" / "files"


class SteppingStore(StumblingStore):
    """A store at which something happens also before or after a step of a part, or a split."""

    def step(self, claim: Attempt, log: Checkpoint, counts: Fields) -> None:
        self.before("step")
        super().step(claim, log, counts)
        self.after("step")

    def split(self, claim: Attempt, parts: list[JobSpec]) -> None:  # type: ignore[override]  # as it is called
        self.before("split")
        super().split(claim, parts)
        self.after("split")


@pytest.fixture
def meeting() -> Worker:
    """``meeting(core, what, after=True)``: a worker that calls ``what`` with the name of each step."""

    def worker(core: Core, what: Callable[[str], None], *, after: bool) -> WorkerContext:
        found = core.worker_context.store
        store = SteppingStore(found.redis, found.record_key, lambda *_: None, LONG)
        setattr(store, "after" if after else "before", what)
        return replace(core.worker_context, store=store)

    return worker


@pytest.fixture
def dying(meeting: Worker) -> Worker:
    """``dying(core, 2, after=True)``: a worker that is killed, or meets ``error``, at its third step."""

    def worker(core: Core, at: int, *, after: bool, error: BaseException | None = None) -> WorkerContext:
        turns = count()

        def meet(_step: str) -> None:
            if next(turns) == at:
                raise error or Killed

        return meeting(core, meet, after=after)

    return worker
