"""Workers that die, or meet something else, at one of the two last steps of a job."""

from collections.abc import Callable
from dataclasses import replace

from kms_core.container import Core
from kms_core.jobs.execution.lease import WorkerContext
from kms_core.jobs.model import Attempt, Commit
from kms_core.jobs.spec import Work
from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import JobState
from support.job_stores import LONG

MOMENTS = [(moment, step) for step in ("committing", "finish") for moment in ("before", "after")]


class Killed(BaseException):
    """As near to SIGKILL as an exception comes: nothing of ours handles it."""


class StumblingStore(JobStore):
    """A store at which something happens before or after one of the two last steps of a job."""

    before: Callable[[str], None] = staticmethod(lambda _step: None)
    after: Callable[[str], None] = staticmethod(lambda _step: None)

    def committing(self, claim: Attempt, commit: Commit) -> None:
        self.before("committing")
        super().committing(claim, commit)
        self.after("committing")

    def finish(self, claim: Attempt, state: JobState, code: str = "", work: Work | None = None) -> None:
        self.before("finish")
        super().finish(claim, state, code, work)
        self.after("finish")


def stumbling(core: Core, step: str, *, after: bool, error: BaseException | None = None) -> WorkerContext:
    """A worker that is killed, or meets the error, once it has come to this step."""

    def meet() -> None:
        raise error or Killed

    return interrupted(core, step, meet, after=after)


def interrupted(core: Core, step: str, what: Callable[[], object], *, after: bool) -> WorkerContext:
    """A worker before or after whose step something happens."""

    def meet(met: str) -> None:
        if met == step:
            what()

    found = core.worker_context.store
    store = StumblingStore(found.redis, found.record_key, lambda *_: None, LONG)
    setattr(store, "after" if after else "before", meet)
    return replace(core.worker_context, store=store)
