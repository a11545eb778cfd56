"""The next job is claimed in the step that ends the one before: Redis syncs its file once for both."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import redis

from kms_core.container import Core
from kms_core.jobs.execution.runner import run_next
from kms_core.jobs.model import Following
from kms_core.jobs.recovery.reaper import reap_all
from kms_core.jobs.spec import BULK, QUEUES
from kms_core.jobs.store.replicas import ReplicaWait
from kms_core.settings.model import RedisSection
from kms_protocol.errors import JobsUnavailable
from support.core_jobs import end_of, now, submit_items
from support.job_stores import expire_leases, forge


def states(core: Core, *job_ids: str) -> list[str]:
    return [now(core, job_id).state for job_id in job_ids]


def following(is_wanted: Callable[[], bool] = lambda: True) -> Following:
    return Following("w/1", [BULK, *(each for each in QUEUES if each != BULK)], is_wanted)


class Counted:
    """A script that counts its calls by itself, outside a pipeline."""

    def __init__(self, script: Any) -> None:  # noqa: ANN401 -- redis-py has no public type
        self.script, self.sha, self.calls = script, script.sha, 0

    def __call__(self, keys: Sequence[str], args: Sequence[object]) -> list[bytes]:
        self.calls += 1
        return cast("list[bytes]", self.script(keys, args))


class Away(Counted):
    """A script whose calls outside a pipeline meet a Redis that is away."""

    def __call__(self, keys: Sequence[str], args: Sequence[object]) -> list[bytes]:
        del keys, args
        raise redis.ConnectionError


def test_next_job_is_claimed_with_the_end_of_the_one_before(core: Core) -> None:
    jobs = [submit_items(core) for _ in range(3)]
    after = following()

    assert run_next(core.worker_context, after, woken=False)
    assert states(core, *jobs) == ["succeeded", "running", "queued"]
    assert len(after.claimed) == 1

    while run_next(core.worker_context, after, woken=False):
        pass
    assert states(core, *jobs) == ["succeeded"] * 3
    assert [now(core, job_id).attempt for job_id in jobs] == [1, 1, 1]


def test_only_the_first_claim_is_a_request_of_its_own(core: Core) -> None:
    submit_items(core)
    while run_next(core.worker_context, following(), woken=False):
        pass  # Redis knows the scripts from now on
    jobs = [submit_items(core) for _ in range(4)]
    after = following()
    scripts = core.worker_context.store.scripts
    claims, ends = Counted(scripts["claim"]), Counted(scripts["finish"])
    scripts |= {"claim": claims, "finish": ends}

    while run_next(core.worker_context, after, woken=False):
        pass

    assert states(core, *jobs) == ["succeeded"] * 4
    assert (claims.calls, ends.calls) == (1, 0)


def test_nothing_is_claimed_for_a_process_that_is_to_stop(core: Core) -> None:
    first, second = submit_items(core), submit_items(core)
    after = following(lambda: False)

    assert run_next(core.worker_context, after, woken=False)

    assert states(core, first, second) == ["succeeded", "queued"]
    assert not after.claimed


def test_a_job_that_others_took_costs_the_next_one_nothing(core: Core) -> None:
    taken, second = submit_items(core), submit_items(core)
    store, after = core.worker_context.store, following()

    def others_take_it() -> bool:
        forge(store, taken, attempt_id="another", attempt="2")
        return True

    after.is_wanted = others_take_it
    assert run_next(core.worker_context, after, woken=False)
    assert now(core, taken).state == "running"
    after.is_wanted = lambda: False
    assert run_next(core.worker_context, after, woken=False)

    assert now(core, second).state == "succeeded"


def test_next_claim_that_cannot_be_read_is_no_error_of_the_job_that_ended(core: Core) -> None:
    """It ends as ``record_refused`` when its turn comes. If Redis is away then, it is left to its lease."""
    submit_items(core)
    while run_next(core.worker_context, following(), woken=False):
        pass  # Redis knows the scripts from now on
    first, spoiled, third = (submit_items(core) for _ in range(3))
    store, after = core.worker_context.store, following()
    forge(store, spoiled, sealed=b"not ours")
    scripts = store.scripts
    alone = scripts["finish"]
    scripts["finish"] = Away(alone)

    assert run_next(core.worker_context, after, woken=False)
    assert states(core, first, spoiled, third) == ["succeeded", "running", "queued"]
    with pytest.raises(JobsUnavailable):
        run_next(core.worker_context, after, woken=False)
    scripts["finish"] = alone
    expire_leases(store)
    assert reap_all(store, [spoiled]) == ["requeued"]
    while run_next(core.worker_context, after, woken=False):
        pass

    assert end_of(core, spoiled) == ("failed", "record_refused")
    assert end_of(core, third) == ("succeeded", "")


def test_scripts_that_redis_has_forgotten_are_sent_again(core: Core) -> None:
    """As after a restart of Redis, or a fail-over. A hash that it does not know stands for that."""
    jobs = [submit_items(core) for _ in range(4)]
    store, after = core.worker_context.store, following()
    scripts: list[Any] = [store.scripts["finish"], store.scripts["claim"]]

    for script in scripts:

        def forgotten(script: Any = script) -> bool:  # noqa: ANN401 -- redis-py has no public type
            script.sha = "0" * 40
            return True

        after.is_wanted = forgotten
        assert run_next(core.worker_context, after, woken=False)
    after.is_wanted = lambda: True
    while run_next(core.worker_context, after, woken=False):
        pass

    assert states(core, *jobs) == ["succeeded"] * 4


def test_end_of_a_job_waits_for_replicas_with_a_claim_behind_it(
    core: Core, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no replica here, so the end is not acknowledged: it stands, and that is told."""
    jobs = [submit_items(core) for _ in range(2)]
    store = core.worker_context.store
    waiting = RedisSection(url="", broker_url="", wait_replicas=1, wait_ms=50)
    store._waits = ReplicaWait(store.redis, waiting)  # noqa: SLF001 -- as settings would have it
    after = following()
    capsys.readouterr()

    assert run_next(core.worker_context, after, woken=False)

    assert "redis.unconfirmed" in capsys.readouterr().out
    assert states(core, *jobs) == ["succeeded", "running"]
