"""Entries of lists whose records are gone: they hold up no job."""

from typing import Final

import pytest

from kms_core.container import Core
from kms_core.jobs.model import Attempt
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.store import JobStore
from support.job_stores import LONG, TENANT, accepted, store_of

QUEUE: Final = "kms.bulk"
ROOT: Final = "root:data"


def junk(store: JobStore, key: str, end: float, *names: str) -> None:
    store.redis.zadd(f"kms:{key}", dict.fromkeys(names, end))


def taken(store: JobStore) -> Attempt | None:
    found = store.next("w1/1", QUEUE, QUEUES, woken=False)
    return found if isinstance(found, Attempt) else None


@pytest.mark.parametrize("tenant", [TENANT, "nobody"])
def test_jobs_behind_one_that_does_not_exist_are_taken(core: Core, tenant: str) -> None:
    store = store_of(core, LONG, [])
    for queue in QUEUES:
        store.redis.sadd(f"kms:sizes:{queue}:{tenant}", f"small {ROOT}")
        junk(store, f"ready:{queue}:{tenant}:small {ROOT}", 1.0, "junk")
        junk(store, f"active:{queue}", -1.0, tenant)
    store.submit(accepted())

    assert taken(store)


def test_jobs_that_do_not_exist_want_no_hand(core: Core) -> None:
    store = store_of(core, LONG, [])
    junk(store, "chores", 1.0, *(f"junk{number}" for number in range(100)))
    store.submit(accepted())

    assert taken(store)


def test_a_tenant_without_jobs_is_taken_out_of_the_choice(core: Core) -> None:
    """Or the watchdog of each idle worker would take it for one that hears nothing."""
    woken: list[str] = []
    store = store_of(core, LONG, woken)
    store.worker_seen("w1", 1, QUEUES)
    junk(store, f"active:{QUEUE}", 1.0, "nobody")

    Reaper(store, core.worker_context.spool, "me").reap()
    assert woken == [QUEUE]
    assert taken(store) is None
    assert not store.has_ready(*QUEUES)
