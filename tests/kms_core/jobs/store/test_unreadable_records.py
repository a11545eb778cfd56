"""A record that cannot be read is an error of its own job: others are taken, listed and recovered."""

from typing import Final

import pytest
import redis

from kms_core.container import Core
from kms_core.jobs.model import Attempt
from kms_core.jobs.recovery.reaper import Reaper
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store import activity
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import RecordRefused, UnknownJob
from support.job_stores import LONG, TENANT, accepted, forge, lapse, store_of

FIELDS: Final = ("sealed", "fence", "attempt", "run_by", "expires_at", "needs")
JUNK: Final = (b"", b"junk", b"\xff\xfe")


def taken(store: JobStore) -> list[str]:
    """The jobs that a process is given until there is none."""
    found: list[str] = []
    while claim := store.next("w1/1", "kms.bulk", QUEUES, woken=False):
        if isinstance(claim, Attempt):
            found.append(claim.accepted.job_id)
    return found


@pytest.mark.parametrize("field", FIELDS)
def test_jobs_behind_it_are_taken_and_listed(core: Core, field: str) -> None:
    store = store_of(core, LONG, [])
    for value in JUNK:
        bad, good = store.submit(accepted()).job_id, store.submit(accepted()).job_id
        forge(store, bad, **{field: value})

        assert good in taken(store)
        listed, _ = store.page(TENANT, state=None, limit=100, before=None)
        assert good in {job.job_id for job in listed}


@pytest.mark.parametrize("field", FIELDS)
def test_the_reaper_takes_up_the_others(core: Core, field: str) -> None:
    store = store_of(core, LONG, [])
    jobs = [store.submit(accepted()).job_id for _ in range(len(JUNK) + 1)]
    assert sorted(taken(store)) == sorted(jobs)
    lapse(store)
    *bad, good = jobs
    for job_id, value in zip(bad, JUNK, strict=True):
        forge(store, job_id, **{field: value})

    Reaper(store, core.worker_context.spool, "me").reap()

    assert store.get(good, TENANT).state == "queued"


def test_a_key_of_another_type_is_no_job(core: Core) -> None:
    store = store_of(core, LONG, [])
    good, bad = store.submit(accepted()).job_id, store.submit(accepted()).job_id
    store.redis.delete(f"kms:job:{bad}")
    store.redis.set(f"kms:job:{bad}", "no record")

    assert taken(store) == [good]


@pytest.mark.parametrize("key", ["tally", "stuck"])
def test_a_count_that_is_no_number_is_refused(core: Core, key: str) -> None:
    store = store_of(core, LONG, [])
    store.redis.hset(f"kms:{key}", "operations encrypt ok", "many")

    with pytest.raises(RecordRefused):
        activity.shared_usage(store.redis) if key == "tally" else activity.survey_queues(store)


def test_a_field_of_another_form_is_no_job(core: Core) -> None:
    store = store_of(core, LONG, [])
    bad = store.submit(accepted()).job_id
    forge(store, bad, attempt="many")

    with pytest.raises(UnknownJob):
        store.get(bad, TENANT)


@pytest.mark.parametrize(
    "refusal", ["MISCONF Redis is configured to save RDB snapshots on @user_script:1", "BUSY Redis is busy"]
)
def test_a_redis_that_refuses_is_no_unreadable_record(core: Core, refusal: str) -> None:
    store = store_of(core, LONG, [])
    with pytest.raises(redis.ResponseError):
        store._reaped("id", redis.ResponseError(refusal))  # noqa: SLF001
