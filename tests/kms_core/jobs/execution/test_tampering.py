"""Who has Redis can lose, delay or replay work, and cannot change whose it is or what it does."""

from contextlib import suppress
from functools import partial

import msgspec
import pytest
import redis

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.execution import results
from kms_core.jobs.execution.runner import run_job
from kms_core.jobs.model import RecordKey
from kms_core.jobs.store.activity import survey_queues
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol.context import Context
from kms_protocol.errors import JobsUnavailable, UnknownJob
from kms_protocol.wire import JobItem
from support.job_stores import (
    COMMIT,
    LONG,
    TENANT,
    accepted,
    claimed,
    connect,
    forge,
    record,
    spool_folder,
    store_of,
)


@pytest.fixture
def store(core: Core) -> JobStore:
    return store_of(core, LONG)


@pytest.fixture
def brief(core: Core) -> JobStore:
    return store_of(core, LONG)


def bulk(core: Core, context: str) -> str:
    terms = SubmissionOptions(Principal("local"), "encrypt", Context.parse(context))
    return core.submitter.items(terms, [JobItem(plaintext=b"x")]).job_id


def ended(store: JobStore, job_id: str) -> tuple[str, str, int]:
    found = store.get(job_id, TENANT)
    return found.state, found.error, found.attempt


def test_sealed_part_of_another_job_is_refused(core: Core) -> None:
    first, second = bulk(core, "a=1"), bulk(core, "a=2")
    forge(core.worker_context.store, second, sealed=record(core.worker_context.store, first)[b"sealed"])

    with pytest.raises(UnknownJob):
        run_job(second, core.worker_context, "w")
    with pytest.raises(UnknownJob):
        core.worker_context.store.accepted(second)
    assert ended(core.worker_context.store, second) == ("failed", "record_refused", 1)
    assert not list(spool_folder(core).glob(f"{second}/result*"))


@pytest.mark.parametrize("damage", [b"", b"\x01", b"junk" * 30], ids=["empty", "version-only", "junk"])
def test_sealed_part_that_is_no_record_is_refused(core: Core, damage: bytes) -> None:
    job_id = bulk(core, "a=1")
    forge(core.worker_context.store, job_id, sealed=damage)

    with pytest.raises(UnknownJob):
        run_job(job_id, core.worker_context, "w")
    assert ended(core.worker_context.store, job_id) == ("failed", "record_refused", 1)


def test_record_without_a_sealed_part_ends_at_once(core: Core) -> None:
    job_id = bulk(core, "a=1")
    core.worker_context.store.redis.hdel(f"kms:job:{job_id}", "sealed")

    with pytest.raises(UnknownJob):
        run_job(job_id, core.worker_context, "w")
    assert ended(core.worker_context.store, job_id) == ("failed", "record_refused", 1)


@pytest.mark.parametrize("field", ["created_at", "expires_at", "tenant", "kind", "queue", "priority"])
@pytest.mark.parametrize("junk", [None, "junk", b"\xff"], ids=["missing", "text", "no-text"])
def test_record_with_junk_in_it_ends(core: Core, field: str, junk: str | bytes | None) -> None:
    store, job_id = core.worker_context.store, bulk(core, "a=1")
    if junk is None:
        store.redis.hdel(f"kms:job:{job_id}", field)
    else:
        forge(store, job_id, **{field: junk})

    with suppress(UnknownJob):
        run_job(job_id, core.worker_context, "w")

    assert record(store, job_id)[b"state"] in {b"succeeded", b"failed"}
    assert store.redis.zscore("kms:open", job_id) is None


def test_job_whose_record_was_refused_is_a_dead_letter(core: Core) -> None:
    store, job_id = core.worker_context.store, bulk(core, "a=1")
    sealed = record(store, job_id)[b"sealed"]
    forge(store, job_id, sealed=b"junk")
    with pytest.raises(UnknownJob):
        run_job(job_id, core.worker_context, "w")

    assert [job.job_id for job in store.dead(TENANT, 10)] == [job_id]
    forge(store, job_id, sealed=sealed)  # it was a worker with another key, say
    store.retry(job_id, TENANT)
    run_job(job_id, core.worker_context, "w")

    assert store.get(job_id, TENANT).state == "succeeded"


def test_job_of_another_tenant_is_not_retried(core: Core) -> None:
    """It would be sealed anew with a later expiry, and run as its submitter."""
    store, job_id = core.worker_context.store, bulk(core, "a=1")
    sealed = record(store, job_id)[b"sealed"]
    forge(store, job_id, tenant="mallory", state="failed", error="attempts_exhausted")

    with pytest.raises(UnknownJob):
        store.retry(job_id, "mallory")
    assert record(store, job_id)[b"sealed"] == sealed
    assert record(store, job_id)[b"state"] == b"failed"


def test_sealed_part_of_another_install_is_refused(core: Core, store: JobStore) -> None:
    job = accepted()
    store.submit(job)
    forge(store, job.job_id, sealed=RecordKey((b"k" * 32,)).seal(job))

    with pytest.raises(UnknownJob):
        run_job(job.job_id, core.worker_context, "w")


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
def test_plain_fields_do_not_say_what_to_do(core: Core, fields: dict[str, str]) -> None:
    job_id = bulk(core, "a=1")
    forge(core.worker_context.store, job_id, **fields)

    with suppress(UnknownJob):  # looking at the job afterwards may fail, for a forged tenant
        run_job(job_id, core.worker_context, "w")

    forge(core.worker_context.store, job_id, tenant=TENANT)
    assert core.worker_context.store.get(job_id, TENANT).state == "succeeded"
    assert core.worker_context.store.accepted(job_id).context == (("a", "1"),)


@pytest.mark.parametrize(
    "commit",
    [b"", msgspec.json.encode(COMMIT), bytes(32) + msgspec.json.encode(COMMIT)],
    ids=["none", "plain", "zeros"],
)
def test_commit_that_was_not_written_here_is_refused(brief: JobStore, commit: bytes) -> None:
    claim = claimed(brief)
    forge(brief, claim.accepted.job_id, state="committing", commit=commit, lease_until="0")

    again = brief.claim(claim.accepted.job_id, "w2")

    if commit:
        assert again is None
        assert ended(brief, claim.accepted.job_id) == ("failed", "record_refused", 1)
    else:
        assert again
        assert again.commit is None


def test_commit_of_another_job_is_refused(brief: JobStore) -> None:
    first, second = claimed(brief), claimed(brief)
    brief.committing(first, COMMIT)
    stolen = record(brief, first.accepted.job_id)[b"commit"]
    forge(brief, second.accepted.job_id, state="committing", commit=stolen, lease_until="0")

    assert brief.claim(second.accepted.job_id, "w2") is None
    assert ended(brief, second.accepted.job_id) == ("failed", "record_refused", 1)
    assert second.accepted.job_id not in brief.due()


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


def test_result_of_a_record_that_was_exchanged_since_it_was_looked_at_is_refused(core: Core) -> None:
    store = core.worker_context.store
    job_id = bulk(core, "a=1")
    run_job(job_id, core.worker_context, "w")
    seen = msgspec.structs.replace(store.get(job_id, TENANT), tenant="other")

    with pytest.raises(UnknownJob):
        results.of(seen, store, core.worker_context.spool)


def test_job_whose_plain_tenant_was_changed_is_retried_by_its_owner(store: JobStore) -> None:
    job = store.submit(accepted())
    forge(store, job.job_id, tenant="mallory", state="failed", error="attempts_exhausted")

    assert store.retry(job.job_id, TENANT).state == "queued"
    assert record(store, job.job_id)[b"tenant"] == TENANT.encode()


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


def test_redis_that_is_away_is_told_as_such(core: Core) -> None:
    away = JobStore(
        connect("unix:///nonexistent.sock"), core.worker_context.store.record_key, lambda *_: None, LONG
    )

    for call in (away.ping, away.workers, away.due, partial(survey_queues, away), away.expired):
        with pytest.raises(JobsUnavailable):
            call()
    with pytest.raises(JobsUnavailable):
        away.submit(accepted())
    assert isinstance(away.redis, redis.Redis)
