"""Workers that die, or meet something else, at one of the last steps of a job or of a part."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from kms_core.container import Core
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.model import Attempt, Checkpoint, Commit
from kms_core.jobs.spec import Fields, JobSpec, WorkResult
from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import JobState
from support.core_jobs import run_job
from support.job_stores import LASTING_LEASES

CRASH_POINTS = [(moment, step) for step in ("committing", "finish") for moment in ("before", "after")]


class Killed(BaseException):
    """As near to SIGKILL as an exception comes: nothing of ours handles it."""


class HookedStore(JobStore):
    """A store at which something happens before or after a step: of a job, of a part, or a split."""

    before: Callable[[str], None] = staticmethod(lambda _step: None)
    after: Callable[[str], None] = staticmethod(lambda _step: None)

    def committing(self, claim: Attempt, commit: Commit | None) -> None:
        self.before("committing")
        super().committing(claim, commit)
        self.after("committing")

    def finish(
        self, claim: Attempt, state: JobState, code: str = "", result: WorkResult | None = None
    ) -> None:
        self.before("finish")
        super().finish(claim, state, code, result)
        self.after("finish")

    def step(self, claim: Attempt, log: Checkpoint, counts: Fields) -> None:
        self.before("step")
        super().step(claim, log, counts)
        self.after("step")

    def split(self, claim: Attempt, parts: list[JobSpec]) -> None:  # type: ignore[override]  # as it is called
        self.before("split")
        super().split(claim, parts)
        self.after("split")


def run_until_killed(
    core: Core, job_id: str, step: str | int, *, after: bool, error: type[BaseException] = Killed
) -> None:
    """Have a worker run the job and be killed, or meet the error, at a step: its name, or number from 0."""
    numbers = count()

    def meet(met: str) -> None:
        if step in {met, next(numbers)}:
            raise error

    with pytest.raises(error):
        run_job(job_id, worker_calling_at_each_step(core, meet, after=after), "w/1")


def worker_calling_at(core: Core, step: str, what: Callable[[], object], *, after: bool) -> WorkerContext:
    """A worker before or after whose step something happens."""

    def meet(met: str) -> None:
        if met == step:
            what()

    return worker_calling_at_each_step(core, meet, after=after)


def worker_calling_at_each_step(core: Core, what: Callable[[str], None], *, after: bool) -> WorkerContext:
    """A worker that calls ``what`` with the name of each step, before or after it."""
    found = core.worker_context.store
    store = HookedStore(found.redis, found.record_key, lambda *_: None, LASTING_LEASES)
    setattr(store, "after" if after else "before", what)
    return replace(core.worker_context, store=store)
