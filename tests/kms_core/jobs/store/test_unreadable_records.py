"""A record that cannot be read or is gone is an error of its own job: others are taken, listed, recovered."""

from typing import Final

import pytest
import redis

from kms_core.container import Core
from kms_core.jobs.model import Attempt
from kms_core.jobs.recovery import reaper
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import UnknownJob
from support.job_stores import LASTING_LEASES, TENANT, accepted, expire_leases, forge, store_of

FIELDS: Final = ("sealed", "fence", "attempt", "run_by", "expires_at", "needs")
JUNK: Final = (b"", b"junk", b"\xff\xfe")


def taken(store: JobStore) -> list[str]:
    """The jobs that a process is given until there is none."""
    found: list[str] = []
    while claim := store.next("w1/1", QUEUES, woken=False):
        if isinstance(claim, Attempt):
            found.append(claim.accepted.job_id)
    return found


@pytest.mark.parametrize("field", FIELDS)
def test_jobs_behind_it_are_taken_and_listed(store: JobStore, field: str) -> None:
    for value in JUNK:
        bad, good = store.submit(accepted()).job_id, store.submit(accepted()).job_id
        forge(store, bad, **{field: value})

        assert good in taken(store)
        listed, _ = store.page(TENANT, state=None, limit=100, before=None)
        assert good in {job.job_id for job in listed}


@pytest.mark.parametrize("field", FIELDS)
def test_the_reaper_takes_up_the_others(store: JobStore, field: str) -> None:
    jobs = [store.submit(accepted()).job_id for _ in range(len(JUNK) + 1)]
    assert sorted(taken(store)) == sorted(jobs)
    expire_leases(store)
    *bad, good = jobs
    for job_id, value in zip(bad, JUNK, strict=True):
        forge(store, job_id, **{field: value})

    Reaper(store, "me").step()

    assert store.get(good, TENANT).state == "queued"


def test_a_field_of_another_form_is_no_job(store: JobStore) -> None:
    bad = store.submit(accepted()).job_id
    forge(store, bad, attempt="many")

    with pytest.raises(UnknownJob):
        store.get(bad, TENANT)


@pytest.mark.parametrize(
    "refusal", ["MISCONF Redis is configured to save RDB snapshots on @user_script:1", "BUSY Redis is busy"]
)
def test_a_redis_that_refuses_is_no_unreadable_record(store: JobStore, refusal: str) -> None:
    with pytest.raises(redis.ResponseError):
        reaper._reaped(store, "id", redis.ResponseError(refusal))  # noqa: SLF001


# -- entries of lists whose records are gone -------------------------------------------------------------


def entries(store: JobStore, key: str, end: float, *names: str) -> None:
    store.redis.zadd(f"kms:{key}", dict.fromkeys(names, end))


@pytest.mark.parametrize("tenant", [TENANT, "nobody"])
def test_jobs_behind_one_that_does_not_exist_are_taken(store: JobStore, tenant: str) -> None:
    for queue in QUEUES:
        store.redis.sadd(f"kms:sizes:{queue}:{tenant}", "small root:data")
        entries(store, f"ready:{queue}:{tenant}:small root:data", 1.0, "junk")
        entries(store, f"active:{queue}", -1.0, tenant)
    good = store.submit(accepted()).job_id

    assert taken(store) == [good]


def test_jobs_that_do_not_exist_want_no_hand(store: JobStore) -> None:
    entries(store, "chores", 1.0, *(f"junk{number}" for number in range(100)))
    store.submit(accepted())

    assert isinstance(store.next("w1/1", QUEUES, woken=False), Attempt)


def test_a_tenant_without_jobs_is_taken_out_of_the_choice(core: Core) -> None:
    """Or the watchdog of each idle worker would take it for one that hears nothing."""
    woken: list[str] = []
    store = store_of(core, LASTING_LEASES, woken=woken)
    entries(store, "active:kms.bulk", 1.0, "nobody")

    Reaper(store, "me").step()
    assert woken == ["kms.bulk"]
    assert taken(store) == []
    assert not store.has_ready(*QUEUES)
