"""The reaper over a real Valkey and spool: what it takes up, and what it leaves alone."""

from typing import Final

import pytest
from structlog.testing import capture_logs

from kms_core.container import Core
from kms_core.jobs.model import LeaseLost
from kms_core.jobs.recovery import reaper
from kms_core.jobs.recovery.reaper import Reaper, reap_all
from kms_core.jobs.spec import BULK, FILES
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.store.tenants import tenants
from kms_protocol.errors import JobsUnavailable, WrongInstall
from support.job_stores import TENANT, claimed, expire_leases, reap, state, store_of, take, with_jobs


def test_reaper_requeues_what_a_dead_worker_held_and_leaves_live_leases_alone(
    core: Core, store: JobStore
) -> None:
    claim = claimed(store)
    reap(store, core.worker_context.spool)
    assert state(store, claim) == "running"

    expire_leases(store)
    reap(store, core.worker_context.spool)

    assert state(store, claim) == "queued"
    with pytest.raises(LeaseLost):
        store.finish(claim, "succeeded")


def test_job_that_ends_while_the_reaper_looks_at_it_stays_ended(store: JobStore) -> None:
    claim = claimed(store)
    job_id = claim.accepted.job_id

    store.finish(claim, "succeeded")  # after it was seen as due

    assert reap_all(store, [job_id]) == ["succeeded"]
    assert store.redis.zscore("kms:open", job_id) is None


def test_cancelled_job_that_had_an_attempt_is_tidied_by_a_worker(store: JobStore) -> None:
    job_id = claimed(store).accepted.job_id
    expire_leases(store)
    reap_all(store, [job_id])

    store.cancel(job_id, TENANT)

    assert store.next("w/1", (FILES, BULK), woken=False) == job_id


def test_expired_job_that_had_attempts_is_tidied_by_a_worker(store: JobStore) -> None:
    once, twice = (claimed(store).accepted.job_id for _ in range(2))
    expire_leases(store)
    store.finish(take(store, twice), "succeeded")

    store.purged(once)
    store.purged(twice)

    assert store.redis.zrange("kms:chores", 0, -1) == [twice.encode()]


LISTS: Final = ("tenant:default", "state:default:failed", "dead", "dead:default")


def lists_with(store: JobStore, job_id: str) -> list[str]:
    """The lists of jobs that have this one, those of labels too."""
    names = [*LISTS, *(f"label:{digest}" for digest in store.label_digests(TENANT, {"run": "7"}))]
    return [name for name in names if store.redis.zscore(f"kms:{name}", job_id) is not None]


def dead(store: JobStore, *, is_forgotten: bool = False) -> str:
    """A dead letter with a label; its record may be gone, and is due to leave the lists."""
    claim = claimed(store, labels={"run": "7"})
    job_id = claim.accepted.job_id
    store.finish(claim, "failed", "attempts_exhausted")
    if is_forgotten:
        assert len(lists_with(store, job_id)) == 5
        store.redis.delete(f"kms:job:{job_id}")
        store.redis.zadd("kms:records", {job_id: 1})
    return job_id


def test_the_ids_of_expired_records_leave_all_lists(core: Core, store: JobStore) -> None:
    gone, kept = dead(store, is_forgotten=True), dead(store)

    reap(store, core.worker_context.spool)

    assert lists_with(store, gone) == []
    assert len(lists_with(store, kept)) == 5
    assert store.redis.zrange("kms:records", 0, -1) == store.redis.hkeys("kms:lists") == [kept.encode()]
    assert tenants(store) == [TENANT]


def test_a_tenant_without_records_is_forgotten(core: Core, store: JobStore) -> None:
    dead(store, is_forgotten=True)

    reap(store, core.worker_context.spool)

    assert tenants(store) == []


def test_the_lists_keep_a_job_for_as_long_as_its_record_is_kept(store: JobStore) -> None:
    job_id = dead(store)

    forgotten_at = store.redis.zscore("kms:records", job_id)
    assert forgotten_at is not None
    assert forgotten_at == pytest.approx(store.now() + store.redis.ttl(f"kms:job:{job_id}"), abs=5)


def test_a_job_that_was_retried_stays_in_its_lists(core: Core, store: JobStore) -> None:
    job_id = dead(store)
    assert store.retry(job_id, TENANT).state == "queued"
    store.redis.zadd("kms:records", {job_id: 1})

    reap(store, core.worker_context.spool)

    assert [job.job_id for job in store.page(TENANT, state="queued", limit=5, before=None)[0]] == [job_id]
    assert lists_with(store, job_id)[0] == "tenant:default"
    assert not store.redis.exists("kms:records")


def test_a_reaper_whose_spool_is_of_another_install_touches_nothing(store: JobStore) -> None:
    def refuse() -> None:
        raise WrongInstall

    claim = claimed(store)
    expire_leases(store)

    with pytest.raises(WrongInstall):
        Reaper(store, "r1", refuse).round()
    assert state(store, claim) == "running"


def test_a_killed_reaper_holds_up_the_next_no_longer_than_a_lease(core: Core) -> None:
    store = store_of(core, with_jobs(lease_s=2))
    Reaper(store, "r1").round()

    assert 0 < store.redis.pttl("kms:lock:caretaker") <= 2000


def test_one_reaper_at_a_time(store: JobStore) -> None:
    assert store.lock("caretaker", "c1", 10)
    assert store.lock("caretaker", "c1", 10)
    assert not store.lock("caretaker", "c2", 10)


# -- what others wrote stops nothing ---------------------------------------------------------------------


def failing(_store: JobStore) -> list[str]:
    raise JobsUnavailable


def test_a_step_that_fails_again_after_a_good_round_is_told_again(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Reaper(store, "r")
    with capture_logs() as logs:
        for _ in range(2):
            with monkeypatch.context() as patched:
                patched.setattr(reaper, "due", failing)
                steps.step()
            steps.step()

    assert [line["step"] for line in logs if line["event"] == "caretaker.step_failed"] == ["take_up_due"] * 2


def test_the_room_in_redis_is_looked_at_every_ten_rounds(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers learn it with their next claim: small blobs rest in Redis while half of it is free."""
    looks: list[None] = []
    monkeypatch.setattr(store, "condition", lambda: looks.append(None))
    reaper = Reaper(store, "r")
    for _ in range(11):
        reaper.step()

    assert len(looks) == 2


def test_sums_of_operations_are_noted_once_a_minute(store: JobStore) -> None:
    """A round is a second. Those of a full Redis are gaps."""
    reaper, points = Reaper(store, "r"), []
    for _ in range(61):
        reaper.step()
        points.append(store.redis.xlen("kms:operations"))

    assert points == [1] * 60 + [2]
