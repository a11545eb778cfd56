"""Who has Redis can lose, delay or replay work, and cannot change whose it is or what it does."""

from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec
import pytest
import redis

from kms_core.container import Core
from kms_core.jobs.execution import results
from kms_core.jobs.model import RecordKey
from kms_core.jobs.recovery.reaper import due
from kms_core.jobs.recovery.spool_cleanup import expired
from kms_core.jobs.store.gauges import survey_queues
from kms_core.jobs.store.heartbeats import live_workers
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import JobsUnavailable, UnknownJob
from support.core_jobs import run_job, submit_items
from support.job_stores import (
    COMMIT,
    LASTING_LEASES,
    TENANT,
    accepted,
    claimed,
    connect,
    forge,
    record,
    spool_folder,
)


def ended(store: JobStore, job_id: str) -> tuple[str, str, int]:
    found = store.get(job_id, TENANT)
    return found.state, found.error, found.attempt


SEALED: Final[dict[str, Callable[[JobStore, str, str], bytes]]] = {
    "another job's": lambda store, _, other: record(store, other)[b"sealed"],
    "another install's": lambda store, job_id, _: RecordKey((b"k" * 32,)).seal(store.accepted(job_id)),
    "empty": lambda *_: b"",
    "version only": lambda *_: b"\x01",
    "junk": lambda *_: b"junk" * 30,
}


@pytest.mark.parametrize("sealed", [*SEALED, "missing"])
def test_record_whose_sealed_part_is_not_its_own_is_refused(core: Core, store: JobStore, sealed: str) -> None:
    job_id, other = submit_items(core), submit_items(core)
    if sealed == "missing":
        store.redis.hdel(f"kms:job:{job_id}", "sealed")
    else:
        forge(store, job_id, sealed=SEALED[sealed](store, job_id, other))

    with pytest.raises(UnknownJob):
        run_job(job_id, core.worker_context, "w")
    with pytest.raises(UnknownJob):
        store.accepted(job_id)
    assert ended(store, job_id) == ("failed", "record_refused", 1)
    assert not list(spool_folder(core).glob(f"{job_id}/result*"))


@pytest.mark.parametrize("field", ["created_at", "expires_at", "tenant", "kind", "queue", "priority"])
@pytest.mark.parametrize("junk", [None, "junk", b"\xff"], ids=["missing", "text", "no-text"])
def test_record_with_junk_in_it_ends(
    core: Core, store: JobStore, field: str, junk: str | bytes | None
) -> None:
    job_id = submit_items(core)
    if junk is None:
        store.redis.hdel(f"kms:job:{job_id}", field)
    else:
        forge(store, job_id, **{field: junk})

    with suppress(UnknownJob):
        run_job(job_id, core.worker_context, "w")

    assert record(store, job_id)[b"state"] in {b"succeeded", b"failed"}
    assert store.redis.zscore("kms:open", job_id) is None


def test_job_whose_record_was_refused_is_a_dead_letter(core: Core, store: JobStore) -> None:
    job_id = submit_items(core)
    sealed = record(store, job_id)[b"sealed"]
    forge(store, job_id, sealed=b"junk")
    with pytest.raises(UnknownJob):
        run_job(job_id, core.worker_context, "w")

    assert [job.job_id for job in store.dead(TENANT, 10)] == [job_id]
    forge(store, job_id, sealed=sealed)  # it was a worker with another key, say
    store.retry(job_id, TENANT)
    run_job(job_id, core.worker_context, "w")

    assert store.get(job_id, TENANT).state == "succeeded"


def test_job_is_retried_by_its_owner_whatever_its_plain_tenant_is(core: Core, store: JobStore) -> None:
    """By another it would be sealed anew with a later expiry, and run as its submitter."""
    job_id = submit_items(core)
    forge(store, job_id, tenant="mallory", state="failed", error="attempts_exhausted")
    before = record(store, job_id)

    with pytest.raises(UnknownJob):
        store.retry(job_id, "mallory")
    assert record(store, job_id) == before
    assert store.retry(job_id, TENANT).state == "queued"
    assert record(store, job_id)[b"tenant"] == TENANT.encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"tenant": "theirs"},
        {"kind": "decrypt"},
        {"items": "0"},
        {"items": "7"},
        {"queue": "kms.files"},
        {"bytes": "1"},
    ],
    ids=str,
)
def test_plain_fields_do_not_say_what_to_do(core: Core, store: JobStore, fields: dict[str, str]) -> None:
    job_id = submit_items(core)
    forge(store, job_id, **fields)

    with suppress(UnknownJob):  # looking at the job afterwards may fail, for a forged tenant
        run_job(job_id, core.worker_context, "w")

    forge(store, job_id, tenant=TENANT)
    assert store.get(job_id, TENANT).state == "succeeded"
    assert store.accepted(job_id).context == (("env", "test"),)


@pytest.mark.parametrize("commit", ["none", "plain", "zeros", "another job's"])
def test_commit_that_was_not_written_for_this_job_is_refused(store: JobStore, commit: str) -> None:
    claim, other = claimed(store), claimed(store)
    job_id, plain = claim.accepted.job_id, msgspec.json.encode(COMMIT)
    store.committing(other, COMMIT)
    stolen = record(store, other.accepted.job_id)[b"commit"]
    forged = {"plain": plain, "zeros": bytes(32) + plain, "another job's": stolen}.get(commit, b"")
    forge(store, job_id, state="committing", commit=forged, lease_until="0")

    again = store.claim(job_id, "w2")

    if forged:
        assert again is None
        assert ended(store, job_id) == ("failed", "record_refused", 1)
        assert job_id not in due(store)
    else:
        assert again
        assert again.commit is None


@pytest.mark.parametrize("names", [("state",), ("tenant", "sealed")], ids="-".join)
def test_record_without_its_fields_is_unknown(store: JobStore, names: tuple[str, ...]) -> None:
    job = store.submit(accepted())
    store.redis.hdel(f"kms:job:{job.job_id}", *names)

    with pytest.raises(UnknownJob):
        store.get(job.job_id, TENANT)


@pytest.mark.parametrize("parent", ["", "whole"])
def test_job_is_seen_and_cancelled_by_the_tenant_of_its_sealed_record(store: JobStore, parent: str) -> None:
    """A writer to Redis who has a token of another tenant neither sees nor ends it; its owner still does."""
    job = store.submit(accepted(source="items", parent=parent))
    forge(store, job.job_id, tenant="mallory")
    for tenant in (TENANT, "mallory"):
        for key in (f"kms:tenant:{tenant}", f"kms:dead:{tenant}"):
            store.redis.zadd(key, {job.job_id: 1})
    seen_by = "" if parent else TENANT

    for tenant in (TENANT, "mallory"):
        listed, _ = store.page(tenant, state=None, limit=10, before=None)
        assert [one.job_id for one in (*listed, *store.dead(tenant, 10))] == [job.job_id] * 2 * (
            tenant == seen_by
        )
        if tenant != seen_by:
            for act in (store.get, store.cancel):
                with pytest.raises(UnknownJob):
                    act(job.job_id, tenant)
    assert record(store, job.job_id)[b"state"] == b"queued"
    if not parent:
        assert store.cancel(job.job_id, TENANT).state == "cancelled"


def test_result_of_a_record_that_was_exchanged_since_it_was_looked_at_is_refused(
    core: Core, store: JobStore
) -> None:
    job_id = submit_items(core)
    run_job(job_id, core.worker_context, "w")
    seen = msgspec.structs.replace(store.get(job_id, TENANT), tenant="other")

    with pytest.raises(UnknownJob):
        results.of(seen, store, core.worker_context.spool)


@pytest.mark.parametrize("is_ended", [False, True])
def test_what_was_accepted_is_told_as_it_was_sealed(store: JobStore, *, is_ended: bool) -> None:
    claim = claimed(store, source="items", items=3, size_bytes=7, priority="low")
    job_id = claim.accepted.job_id
    if is_ended:
        store.finish(claim, "succeeded")
    before = store.get(job_id, TENANT)
    junk = ("tenant", "kind", "queue", "priority", "items", "bytes", "created_at", "expires_at", "parent")
    forge(store, job_id, **dict.fromkeys(junk, "5"), campaign="wet")

    assert store.get(job_id, TENANT) == before
    assert (before.kind, before.queue, before.priority, before.items, before.bytes, before.campaign) == (
        *("encrypt", "kms.bulk", "low", 3, 7),
        "",
    )


def test_record_that_is_not_ours_is_shown_to_its_plain_tenant(store: JobStore) -> None:
    """Its owner, mostly: the sealed part was damaged. What it says is no more than Redis says."""
    job = store.submit(accepted())
    forge(store, job.job_id, sealed=b"junk")

    assert store.get(job.job_id, TENANT).state == "queued"
    with pytest.raises(UnknownJob):
        store.get(job.job_id, "theirs")


def test_redis_that_is_away_is_told_as_such(store: JobStore) -> None:
    away = JobStore(connect("unix:///nonexistent.sock"), store.record_key, lambda *_: None, LASTING_LEASES)

    for call in (JobStore.ping, live_workers, due, survey_queues, expired):
        with pytest.raises(JobsUnavailable):
            call(away)
    with pytest.raises(JobsUnavailable):
        away.submit(accepted())
    assert isinstance(away.redis, redis.Redis)
