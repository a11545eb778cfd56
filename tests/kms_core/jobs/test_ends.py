"""How a job ended counts only with a worker's MAC: whoever has Redis can lose an end, not make one up."""

import time
from pathlib import Path

import msgspec
import pytest

from kms_core.container import Core
from kms_core.jobs.events.outbox import Outbox
from kms_core.jobs.events.webhook import WebhookEndpoint
from kms_core.jobs.spec import WorkResult
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import JobNotDead
from kms_protocol.wire import JobState
from support.core_jobs import done
from support.job_stores import TENANT, accepted, claimed, forge, record, take
from support.webhooks import DUE, ended_job, event_entry

REFUSED = ("failed", "record_refused")
CLAIMS = [("succeeded", ""), ("failed", "items_failed")]


def ended(store: JobStore, state: JobState = "succeeded", code: str = "", **changes: object) -> str:
    """A job that a worker has brought to this end; its id."""
    claim = claimed(store, "w1", **changes)
    work = WorkResult(items_done=2, items_failed=1, bytes_done=5, result_digest=b"d" * 32)
    store.finish(claim, state, code, work)
    return claim.accepted.job_id


def told(store: JobStore, job_id: str) -> tuple[str, str]:
    """State and code, on which a look at the job and the list must agree."""
    job = store.get(job_id, TENANT)
    listed, _ = store.page(TENANT, state=None, limit=100, before=None)
    assert [one for one in listed if one.job_id == job_id] == [job]
    return job.state, job.error


def fields(store: JobStore, job_id: str, *names: str) -> dict[str, bytes]:
    found = record(store, job_id)
    return {name: found[name.encode()] for name in names}


# -- what a worker signs -----------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "code"), CLAIMS)
def test_end_of_a_worker_is_proven(store: JobStore, state: JobState, code: str) -> None:
    job_id = ended(store, state, code)
    job = store.get(job_id, TENANT)

    assert told(store, job_id) == (state, code)
    assert job.end
    assert (job.end.fence, job.end.attempt, job.end.items_done, job.end.items_failed) == (1, 1, 2, 1)
    assert job.end.result_digest == b"d" * 32


def test_file_job_signs_what_it_wrote(core: Core, files: Path) -> None:
    (files / "in").write_bytes(b"salary")
    job = done(core, "encrypt", files / "in", files / "out")
    found = (files / "out").stat()

    assert job.end
    assert job.end.target
    assert (files / "out").as_uri().encode() not in record(core.worker_context.store, job.job_id)[b"end"]
    assert (job.end.target.inode, job.end.target.size_bytes) == (found.st_ino, found.st_size)
    assert job.end.target.mtime_ns == found.st_mtime_ns


# -- what others write -------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["queued", "running", "committing", "failed", "cancelled"])
@pytest.mark.parametrize(("state", "code"), CLAIMS)
def test_end_that_nobody_signed_is_refused(store: JobStore, before: str, state: str, code: str) -> None:
    """Other states are told as Redis has them."""
    job_id = store.submit(accepted()).job_id
    error = "decrypt_failed" if before == "failed" else ""
    forge(store, job_id, state=before, error=error)
    assert told(store, job_id) == (before, error)

    forge(store, job_id, state=state, error=code)

    assert told(store, job_id) == REFUSED
    assert store.get(job_id, TENANT).end is None
    assert store.page(TENANT, state="succeeded", limit=10, before=None) == ([], None)


@pytest.mark.parametrize("damage", ["deleted", "empty", "cut", "flipped", "zeros"])
def test_damaged_end_is_refused(store: JobStore, damage: str) -> None:
    job_id = ended(store)
    signed = record(store, job_id)[b"end"]
    flipped = signed[:-1] + bytes([signed[-1] ^ 1])
    damaged = {"empty": b"", "cut": signed[:40], "flipped": flipped, "zeros": bytes(32) + signed[32:]}
    store.redis.hdel(f"kms:job:{job_id}", "end")
    if damage in damaged:
        forge(store, job_id, end=damaged[damage])

    assert told(store, job_id) == REFUSED


@pytest.mark.parametrize(
    "fields", [{"state": "failed", "error": "items_failed"}, {"error": "items_failed"}], ids=str
)
def test_other_end_than_the_signed_one_is_refused(store: JobStore, fields: dict[str, str]) -> None:
    job_id = ended(store)
    forge(store, job_id, **fields)

    assert told(store, job_id) == REFUSED


def test_counts_are_told_as_they_were_signed(store: JobStore) -> None:
    job_id = ended(store, "failed", "items_failed", items=2, size_bytes=7)
    before = store.get(job_id, TENANT)
    numbers = ("items", "items_done", "items_failed", "bytes", "bytes_done", "fence", "attempt", "parts")
    forge(store, job_id, **dict.fromkeys(numbers, "9"), **{"tally:changed": "9"})

    assert store.get(job_id, TENANT) == before
    assert (before.items, before.items_failed, before.bytes, before.bytes_done) == (2, 1, 7, 5)


def test_end_of_another_job_is_refused(store: JobStore) -> None:
    first, second = ended(store), store.submit(accepted()).job_id

    forge(store, second, state="succeeded", **fields(store, first, "end"))
    assert told(store, second) == REFUSED

    forge(store, second, **fields(store, first, "sealed"))
    assert told(store, second) == REFUSED


def test_end_of_an_earlier_life_of_the_id_is_refused(store: JobStore) -> None:
    """Its submitter chose the id, and chose it again after the record had gone."""
    job_id = ended(store)
    earlier, job = fields(store, job_id, "end", "fence", "attempt", "state"), store.accepted(job_id)
    store.redis.delete(f"kms:job:{job_id}")
    store.submit(job)

    forge(store, job_id, **earlier)

    assert told(store, job_id) == REFUSED


def test_record_that_is_there_longer_than_it_is_kept_is_refused(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = ended(store)
    until = store.accepted(job_id).expires_at + store.rules.result_ttl_s
    store.redis.persist(f"kms:job:{job_id}")

    monkeypatch.setattr(time, "time", lambda: until + 59)
    assert told(store, job_id) == ("succeeded", "")
    monkeypatch.setattr(time, "time", lambda: until + 61)
    assert told(store, job_id) == REFUSED


# -- retries -----------------------------------------------------------------------------------------


def dead(store: JobStore) -> str:
    job_id = store.submit(accepted()).job_id
    forge(store, job_id, state="failed", error="attempts_exhausted")
    return job_id


def test_retry_seals_the_record_anew_with_its_new_expiry(store: JobStore) -> None:
    job_id = dead(store)
    before, sealed = store.accepted(job_id), fields(store, job_id, "sealed")
    store.retry(job_id, TENANT)
    after = store.accepted(job_id)

    assert fields(store, job_id, "sealed") != sealed
    assert after.expires_at == pytest.approx(time.time() + store.retry_within_s, abs=60)
    assert (after.start_by, after.run_by) == (after.expires_at, after.expires_at)
    times = {name: getattr(before, name) for name in ("expires_at", "start_by", "run_by")}
    assert (before.generation, after.generation) == (0, 1)
    assert msgspec.structs.replace(after, **times, generation=0) == before


def test_end_of_the_generation_before_a_retry_is_refused(store: JobStore) -> None:
    job_id = ended(store)
    earlier = fields(store, job_id, "end", "state", "error")
    forge(store, job_id, state="failed", error="attempts_exhausted")
    store.retry(job_id, TENANT)
    assert b"end" not in record(store, job_id)

    forge(store, job_id, **earlier)

    assert told(store, job_id) == REFUSED


def test_job_with_an_unproven_end_can_be_retried(store: JobStore) -> None:
    job_id = store.submit(accepted()).job_id
    forge(store, job_id, state="succeeded")
    store.retry(job_id, TENANT)
    store.finish(take(store, job_id), "succeeded")

    assert told(store, job_id) == ("succeeded", "")
    with pytest.raises(JobNotDead):
        store.retry(job_id, TENANT)


@pytest.mark.parametrize("why", ["forged", "old"])
def test_record_that_must_not_run_again_is_not_retried(store: JobStore, why: str) -> None:
    job_id = dead(store)
    long_ago = time.time() - store.rules.result_ttl_s - 120
    old = store.record_key.seal(accepted(job_id=job_id, expires_at=long_ago))
    forge(store, job_id, sealed=b"junk" if why == "forged" else old)

    with pytest.raises(JobNotDead):
        store.retry(job_id, TENANT)
    assert told(store, job_id) == ("failed", "attempts_exhausted")


# -- events and webhooks -----------------------------------------------------------------------------


def deliveries(store: JobStore, webhook_endpoint: WebhookEndpoint) -> list[tuple[str, str, str | None]]:
    """Type, id and code of the events that would be sent."""
    bodies = [
        msgspec.json.decode(delivery.body)
        for delivery in Outbox(store, {"ci": webhook_endpoint}).due("ci", 10)
    ]
    return [(body["type"], body["id"], (body["data"]["error"] or {}).get("code")) for body in bodies]


def forge_event(
    store: JobStore, job_id: str, state: str = "succeeded", code: str = "", generation: int = 0
) -> None:
    event_id = f"{job_id}.{generation}.{state}"
    store.redis.zadd(DUE, {event_entry(job_id, state, id=event_id, code=code): time.time()})


@pytest.mark.parametrize(("state", "code"), CLAIMS)
@pytest.mark.parametrize("before", ["queued", "running", ""], ids=["queued", "running", "of a forged end"])
def test_forged_event_is_told_as_refused_at_most(
    store: JobStore, webhook_endpoint: WebhookEndpoint, before: str, state: str, code: str
) -> None:
    job_id = store.submit(accepted(callback="ci")).job_id
    forge(store, job_id, state=before or state, error="" if before else code)
    forge_event(store, job_id, state, code)

    sent = [(kind, told_code) for kind, _, told_code in deliveries(store, webhook_endpoint)]
    assert sent == ([] if before else [("kms.job.failed", "record_refused")])


def test_forged_success_of_a_failed_job_is_not_told(
    store: JobStore, webhook_endpoint: WebhookEndpoint
) -> None:
    job_id = ended_job(store, "failed", "decrypt_failed")
    forge_event(store, job_id)

    assert [(kind, code) for kind, _, code in deliveries(store, webhook_endpoint)] == [
        ("kms.job.failed", "decrypt_failed")
    ]


def test_repeated_event_has_the_id_of_the_first(store: JobStore, webhook_endpoint: WebhookEndpoint) -> None:
    job_id = ended_job(store)
    for generation in (2, 3):
        forge_event(store, job_id, generation=generation)

    assert len(set(deliveries(store, webhook_endpoint))) == 1
