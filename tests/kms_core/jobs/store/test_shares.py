"""Shares of the store's memory and open jobs: one tenant leaves room for the others."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kms_core.container import Core
from kms_core.jobs.events.outbox import Outbox
from kms_core.jobs.events.webhook import WebhookEndpoint
from kms_core.jobs.execution.runner import run_claimed
from kms_core.jobs.model import part_id
from kms_core.jobs.recovery.reaper import forget
from kms_core.jobs.spec import AnyJob, JobSpec, SmallBlob, WorkResult
from kms_core.jobs.store.store import JobStore
from kms_core.settings.model import TenantSection
from kms_protocol.errors import RateLimited, SpoolQuota, TenantShare
from kms_protocol.wire import STATES
from support.embedded_valkey import EmbeddedValkey
from support.job_stores import TENANT, accepted, attempt, claimed, record, store_of, take, with_jobs
from support.service import Service, core_of
from support.webhooks import changed

MEMORY_BYTES = 10 * 1024**2
TEXT = "x" * 500
TEXTS = {f"name{number}": TEXT for number in range(16)}
DONE = WorkResult(items_done=1, result_digest=bytes(32))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Core]:
    """A core with a Redis of 10 MiB, whose hashes are as its defaults make them."""
    options = ("--maxmemory", str(MEMORY_BYTES), "--hash-max-listpack-value", "64")
    with EmbeddedValkey(tmp_path / "valkey", options=options) as valkey:
        yield core_of(Service(tmp_path / "install", redis=valkey.url))


@pytest.fixture
def shared(small: Core) -> JobStore:
    return store_of(small, with_jobs(), several_tenants=True)


def held(store: JobStore, tenant: str = TENANT) -> int:
    return int(store.redis.hget(f"kms:held:{tenant}", "sum") or 0)


def used(store: JobStore) -> int:
    """Bytes of memory, without those of the stream of events, which has a bound of its own."""
    store.redis.xtrim("kms:events", maxlen=0, approximate=False)
    return int(store.redis.info("memory")["used_memory"])


def one_item(store: JobStore, tenant: str = TENANT, blob: SmallBlob | None = None, **more: object) -> str:
    """Submit a job of one item."""
    job = accepted(source="items", tenant=tenant, items=1, starts=(0,), **more)
    return store.submit(job, f"key of {job.job_id}", (), blob).job_id


def parts_of(whole: JobSpec, count: int, **more: object) -> list[AnyJob]:
    names = [part_id(whole.job_id, number) for number in range(count)]
    fields = {"source": "items", "parent": whole.job_id, "items": 1, "starts": (0,), **more}
    return [accepted(job_id=name, **fields) for name in names]


def warmed(store: JobStore) -> None:
    """Run each script once: Redis keeps it."""
    one_item(store)
    claim = attempt(store)
    store.split(claim, parts_of(claim.accepted, 1))
    store.finish(attempt(store), "succeeded", "", DONE)


def flood(store: JobStore, tenant: str = "noisy") -> int:
    """The number of jobs of a tenant that are accepted before one is refused; memory is looked at once."""
    store.ping(write=True)
    for count in range(5000):
        try:
            one_item(store, tenant, metadata=TEXTS)
        except TenantShare:
            return count
    raise AssertionError("none is refused")


def labels_of(number: int) -> dict[str, str]:
    return {f"name{each}": f"{number}" for each in range(16)}


@pytest.mark.parametrize("labels", [0, 16])
@pytest.mark.parametrize("metadata", [{}, TEXTS], ids=["bare", "metadata"])
@pytest.mark.parametrize("blob_bytes", [500, 16_000])
def test_what_counts_for_a_tenant_is_what_its_jobs_take(
    small: Core, labels: int, metadata: dict[str, str], blob_bytes: int
) -> None:
    """Queued and ended, with an Idempotency-Key, labels that no other job has, input and result."""
    store, count = store_of(small, with_jobs()), 100
    warmed(store)
    before, counted = used(store), held(store)
    for number in range(count):
        own = labels_of(number) if labels else {}
        one_item(store, blob=("items", os.urandom(blob_bytes)), labels=own, metadata=metadata)

    assert used(store) - before < held(store) - counted < 2.5 * (used(store) - before)
    for _ in range(count):
        blob = ("result", os.urandom(blob_bytes))
        store.finish(attempt(store), "succeeded", "", msgspec.structs.replace(DONE, blob=blob))
    assert used(store) - before < held(store) - counted < 2 * (used(store) - before)


def test_a_tenant_that_floods_is_refused_and_no_other_is(shared: JobStore) -> None:
    count = flood(shared)
    for tenant in ("first", "second", "third"):
        shared.ping(write=True)
        for _ in range(count // 20):
            one_item(shared, tenant, metadata=TEXTS)

    assert used(shared) < 0.7 * MEMORY_BYTES
    with pytest.raises(TenantShare) as caught:
        one_item(shared, "noisy")
    assert caught.value.retry_after_s >= 60


def test_two_that_flood_leave_room_for_a_third(shared: JobStore) -> None:
    flood(shared)
    flood(shared, "as noisy")
    shared.ping(write=True)

    for _ in range(20):
        one_item(shared, "quiet", metadata=TEXTS)


def test_ended_jobs_count_until_they_are_forgotten_and_then_no_more(shared: JobStore) -> None:
    count, ended = flood(shared), list[str]()
    for _ in range(count):
        claim = attempt(shared)
        shared.finish(claim, "succeeded", "", DONE)
        ended.append(claim.accepted.job_id)
    counted = held(shared, "noisy")
    shared.ping(write=True)
    with pytest.raises(TenantShare):
        one_item(shared, "noisy", metadata=TEXTS)

    for rest, gone in ((1, ended[1:]), (0, ended[:1])):
        shared.redis.delete(*(f"kms:job:{job_id}" for job_id in gone))  # as Redis does when they expire
        shared.redis.zadd("kms:records", dict.fromkeys(gone, 1.0))
        forget(shared)
        assert held(shared, "noisy") == pytest.approx(rest * counted / count, rel=0.01)
    assert flood(shared) > count // 2


def test_the_only_tenant_has_all_memory(small: Core) -> None:
    store = store_of(small, with_jobs())
    for number in range(40):
        store.redis.set(f"kms:junk:{number}", bytes(MEMORY_BYTES // 64))
    for _ in range(100):
        one_item(store, metadata=TEXTS)
        store.ping(write=True)

    assert used(store) > 0.7 * MEMORY_BYTES
    store.has_several_tenants = lambda: True
    with pytest.raises(TenantShare):
        one_item(store)


def test_a_tenant_has_as_many_open_jobs_as_are_left_for_others(core: Core) -> None:
    store = store_of(core, with_jobs(open_jobs=10), several_tenants=True)
    for _ in range(5):
        store.submit(accepted(tenant="noisy"))

    with pytest.raises(TenantShare):
        store.submit(accepted(tenant="noisy"))
    for tenant in ("first", "second"):
        store.submit(accepted(tenant=tenant))


def test_what_is_over_counts_for_nothing_and_leaves_a_thousand_at_a_time(core: Core) -> None:
    """Jobs that expired while no worker ran, and events that none sent for a week: they leave in steps."""
    quota = {TENANT: TenantSection(open_jobs=2)}
    store = store_of(core, msgspec.structs.replace(with_jobs(), tenants=quota))
    over = {f"{number:036}": 1 for number in range(1_500)}
    for key in (f"kms:open:{TENANT}", "kms:webhooks:due:hook"):
        store.redis.zadd(key, over)
    left = []
    for _ in range(2):
        store.submit(accepted(callback="hook"))
        left += [store.redis.zcard(f"kms:open:{TENANT}"), store.redis.zcard("kms:webhooks:due:hook")]

    assert left == [501, 501, 2, 2]
    with pytest.raises(RateLimited):
        store.submit(accepted())


def test_a_tenant_without_a_quota_has_half_of_the_spool(core: Core) -> None:
    section = with_jobs(spool_max_bytes=100)
    store = store_of(core, section, several_tenants=True)
    store.submit(accepted(size_bytes=30))

    with pytest.raises(SpoolQuota):
        store.submit(accepted(size_bytes=30))
    store.submit(accepted(size_bytes=30, tenant="another"))
    store_of(core, section).submit(accepted(size_bytes=70))
    own = msgspec.structs.replace(section, tenants={TENANT: TenantSection(spool_bytes=1000)})
    store_of(core, own, several_tenants=True).submit(accepted(size_bytes=70))


def test_parts_count_for_the_tenant_of_the_whole_once(small: Core) -> None:
    store = store_of(small, with_jobs())
    warmed(store)
    claim = claimed(store, source="items", items=5000)
    parts = parts_of(claim.accepted, 50, context=tuple((f"{number}", TEXT) for number in range(10)))
    before, counted = used(store), held(store)
    store.split(claim, parts)
    for _ in parts:
        store.finish(attempt(store), "succeeded", "", DONE)

    assert used(store) - before < held(store) - counted < 1.6 * (used(store) - before)


@pytest.mark.parametrize(
    ("open_jobs", "items"), [(100_000, 50_000), (300, 5_000)], ids=["memory", "open jobs"]
)
def test_jobs_that_are_split_leave_room_for_others(small: Core, open_jobs: int, items: int) -> None:
    store = store_of(small, with_jobs(open_jobs=open_jobs), several_tenants=True)
    context, starts = replace(small.worker_context, store=store), tuple(range(0, items, 500))
    jobs = [store.submit(accepted(items=items, starts=starts)).job_id for _ in range(50)]
    store.ping(write=True)
    for job_id in jobs:
        run_claimed(take(store, job_id), context)
    store.ping(write=True)

    split = [job_id for job_id in jobs if b"split" in record(store, job_id)]
    assert 5 < len(split) < len(jobs)
    last = record(store, jobs[-1])
    assert (last[b"state"], last[b"attempt"], last[b"deferrals"]) == (b"queued", b"0", b"1")
    for _ in range(5):
        one_item(store, "quiet")


def test_a_job_that_begins_again_and_again_fills_no_outbox(
    core: Core, webhook_endpoint: WebhookEndpoint
) -> None:
    """What each job is once is an event however many wait, and so is its end."""
    store = store_of(core, with_jobs())
    outbox = Outbox(store, {"ci": changed(webhook_endpoint, events=STATES)})
    claim = claimed(store, callback="ci")
    for _ in range(600):
        store.defer(claim, 0)
        claim = take(store, claim.accepted.job_id)
    waiting = outbox.waiting().total()
    store.finish(claim, "failed", "x")
    store.finish(claimed(store, callback="ci"), "failed", "x")

    assert (waiting, outbox.waiting().total()) == (1000, 1004)


def test_deliveries_that_wait_count_for_the_tenant_of_their_job(
    small: Core, webhook_endpoint: WebhookEndpoint
) -> None:
    """Each of all three events of a job, sealed with its labels and metadata after an attempt that failed."""
    store = store_of(small, with_jobs())
    outbox = Outbox(store, {"ci": changed(webhook_endpoint, events=STATES)})
    warmed(store)
    before, counted = used(store), held(store)
    for _ in range(50):
        store.finish(claimed(store, callback="ci", metadata=TEXTS, labels=labels_of(1)), "failed", "x")
    for delivery in outbox.due("ci", 200):
        assert outbox.put_off(delivery)

    assert outbox.waiting().total() == 150
    assert used(store) - before < held(store) - counted


def test_earlier_attempts_count_for_the_tenant_of_their_job(small: Core) -> None:
    """From the second on: what the first adds to a record is within the bytes that each job counts."""
    store = store_of(small, with_jobs())
    warmed(store)
    claims = [claimed(store) for _ in range(100)]
    before, counted = 0, 0
    for number in range(10):
        for claim in claims:
            store.defer(claim, 0, f"cause_{number}")
        claims = [
            take(store, claim.accepted.job_id, "a-host-of-some-cluster.example:deadbeef/12345")
            for claim in claims
        ]
        if number == 0:
            before, counted = used(store), held(store)

    assert used(store) - before < held(store) - counted < 3 * (used(store) - before)
    for claim in claims:
        store.redis.delete(f"kms:job:{claim.accepted.job_id}")


@pytest.mark.parametrize("blob", [None, ("items", b"sealed")], ids=["spool", "redis"])
def test_a_job_that_was_taken_back_counts_no_more(core: Core, blob: SmallBlob | None) -> None:
    store = store_of(core, with_jobs())
    job_id = one_item(store, blob=blob)
    sealed = store.redis.hget(f"kms:job:{job_id}", "sealed")
    store.unconfirmed_error(None, [f"kms:job:{job_id}", f"kms:tenant:{TENANT}"], job_id, sealed)  # type: ignore[arg-type]  # sync client

    assert held(store) == 0


def test_a_result_that_is_released_counts_no_more(core: Core) -> None:
    store = store_of(core, with_jobs())
    claim = claimed(store, source="items", items=1, starts=(0,))
    before = held(store)
    store.finish(claim, "succeeded", "", msgspec.structs.replace(DONE, blob=("result", bytes(1000))))
    assert held(store) == before + 1000

    store.purged(claim.accepted.job_id)
    assert held(store) == before


def test_what_an_earlier_version_stored_makes_no_count_wrong(core: Core) -> None:
    """Its jobs count nothing, and take nothing away from those of this version."""
    store = store_of(core, with_jobs(result_ttl_s=0))
    one_item(store, expires_at=1.0, start_by=4e9, run_by=4e9)
    store.redis.delete(f"kms:held:{TENANT}")
    claim = attempt(store)
    one_item(store)
    counted = held(store)
    store.finish(claim, "succeeded", "", DONE)
    store.purged(claim.accepted.job_id)
    forget(store)

    assert store.redis.zcard(f"kms:tenant:{TENANT}") == 1
    assert held(store) == counted > 0
