"""The job store over a real Valkey: submission, leases, fences, ends, cancellation, commits."""

import time
from collections.abc import Callable
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.jobs.model import Attempt, Checkpoint, Job, LeaseLost, RecordKey, part_id
from kms_core.jobs.recovery.reaper import due, forget, reap_all
from kms_core.jobs.spec import JobSpec, WorkResult
from kms_core.jobs.store import reader
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.submission.submitter import SubmissionOptions, new_id
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import (
    DurabilityUnconfirmed,
    IdempotencyConflict,
    InvalidRequest,
    JobCancelled,
    JobCommitting,
    JobNotDead,
    RateLimited,
    UnknownJob,
)
from support.embedded_valkey import EmbeddedValkey
from support.job_options import job_options
from support.job_stores import (
    COMMIT,
    LASTING_LEASES,
    TENANT,
    accepted,
    alone,
    claimed,
    events,
    expire_leases,
    forge,
    next_attempt,
    record,
    state,
    store_of,
    take,
    with_jobs,
)
from support.waiting import until


def again(store: JobStore, claim: Attempt) -> Attempt:
    """The next attempt at a job."""
    return take(store, claim.accepted.job_id, "w2")


def unheard(core: Core) -> JobStore:
    """A store whose writes no replica acknowledges."""
    waiting = msgspec.structs.replace(LASTING_LEASES.redis, wait_replicas=1, wait_ms=20)
    return store_of(core, msgspec.structs.replace(LASTING_LEASES, redis=waiting))


# -- submitting ------------------------------------------------------------------------------------------


def test_accepted_job_is_what_a_worker_gets(store: JobStore) -> None:
    job = accepted(key_id="k", overwrite=True, new_context=(("a", "b"),))

    reading = store.submit(job)
    claim = store.claim(job.job_id, "w1")

    assert (reading.state, reading.attempt, reading.tenant) == ("queued", 0, TENANT)
    assert claim
    assert claim.accepted == store.accepted(job.job_id) == job
    assert (claim.fence, claim.attempt, claim.commit) == (1, 1, None)


def test_nothing_of_the_request_can_be_read_in_redis(store: JobStore, valkey: EmbeddedValkey) -> None:
    """In no key or value that the server was ever told."""
    word = uuid4().hex
    texts = {"labels": {word: word}, "metadata": {word: word}, "group": word, "scopes": (word,)}
    asked = accepted(source=f"file:///{word}", context=((word, word),), group_jobs=2, **texts)
    job = store.submit(asked, idempotency=f"key {word}")

    told = b"".join(path.read_bytes() for path in valkey.files.data_dir.rglob("*") if path.is_file())
    assert job.job_id.encode() in told
    assert word.encode() not in told


def test_one_idempotency_key_is_one_job(store: JobStore) -> None:
    """Also once it has ended."""
    first = store.submit(accepted(digest=b"same"), idempotency="scope key")
    same = store.submit(accepted(digest=b"same"), idempotency="scope key")
    other = store.submit(accepted(digest=b"same"), idempotency="scope other")

    assert same.job_id == first.job_id != other.job_id
    with pytest.raises(IdempotencyConflict):
        store.submit(accepted(digest=b"other"), idempotency="scope key")
    store.cancel(first.job_id, TENANT)
    assert store.submit(accepted(digest=b"same"), idempotency="scope key").state == "cancelled"


@pytest.mark.parametrize("other", ["digest", "tenant", "key", "no key", "expired", "forged", "none"])
def test_an_entry_of_an_idempotency_key_names_no_other_job(store: JobStore, other: str) -> None:
    """Its value is not signed: the sealed record of the job must be that of the same request."""
    changes: dict[str, dict[str, object]] = {
        "digest": {"digest": b"other"},
        "tenant": {"tenant": "theirs"},
        "expired": {"expires_at": time.time() - 61},
    }
    named = store.submit(
        accepted(**{"digest": b"same"} | changes.get(other, {})),
        idempotency={"key": "scope other", "no key": ""}.get(other, "scope key"),
    )
    job_id = new_id() if other == "none" else named.job_id
    entry = f"kms:idem:{store.record_key.digest(b'scope key').hex()}"
    store.redis.set(entry, f"{job_id} {b'same'.hex()}")
    if other == "forged":
        forge(store, job_id, sealed=RecordKey((b"k" * 32,)).seal(accepted(job_id=job_id, digest=b"same")))

    with pytest.raises(IdempotencyConflict) as refused:
        store.submit(accepted(digest=b"same"), idempotency="scope key")
    assert ("with another key" in str(refused.value)) == (other not in {"digest", "key", "no key"})


def test_job_that_no_replica_has_is_taken_back_whole(core: Core) -> None:
    store, job = unheard(core), accepted(size_bytes=9)
    with pytest.raises(DurabilityUnconfirmed, match="was taken back"):
        store.submit(job, idempotency="scope key", blob=("upload", b"sealed"))

    entry = f"kms:idem:{store.record_key.digest(b'scope key').hex()}"
    left = [entry, f"kms:job:{job.job_id}", f"kms:blobs:{job.job_id}", "kms:open", f"kms:open:{TENANT}"]
    assert not store.redis.exists(*left, "kms:expiring", "kms:ended", "kms:records", "kms:lists")
    assert store.page(TENANT, state=None, limit=5, before=None) == ([], None)
    assert store.spooled_bytes(TENANT) == 0


def test_job_that_is_taken_back_leaves_its_group(core: Core) -> None:
    """Submitted again, it is the last job of the group, which ends with that."""
    with pytest.raises(DurabilityUnconfirmed, match="was taken back"):
        unheard(core).submit(accepted(group="night", group_jobs=1))

    store = store_of(core, LASTING_LEASES)
    assert store.group_counts(TENANT, "night") == (0, 0)
    claim = claimed(store, group="night", group_jobs=1)
    assert [each["type"] for each in events(store)].count("kms.group.ended") == 0
    store.finish(claim, "succeeded")
    assert store.group_counts(TENANT, "night") == (1, 0)
    assert [each["type"] for each in events(store)].count("kms.group.ended") == 1


def test_job_that_has_begun_is_not_taken_back(store: JobStore) -> None:
    """Also where it waits again: half a target may be there."""
    claim = claimed(store)
    job_id = claim.accepted.job_id
    store.defer(claim, 0)
    keys = [f"kms:job:{job_id}", f"kms:tenant:{TENANT}"]

    refused = store.unconfirmed_error(None, keys, job_id, record(store, job_id)[b"sealed"])

    assert "It may be lost" in str(refused)
    assert store.get(job_id, TENANT).state == "queued"


def test_so_many_jobs_may_be_open_and_no_more(core: Core) -> None:
    store = store_of(core, with_jobs(open_jobs=2))
    first, _ = (store.submit(accepted()) for _ in range(2))
    with pytest.raises(RateLimited, match="Too many jobs wait"):
        store.submit(accepted())

    store.cancel(first.job_id, TENANT)
    store.submit(accepted())


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "decrypt"},
        {"context": Context.parse("a=2")},
        {"key_id": "other"},
        {"priority": "low"},
        {"new_context": Context.parse("b=1")},
        {"new_context": Context()},
        {"ttl_s": 60},
        {"keep_for": 60},
        {"run_by": datetime(2999, 1, 1, tzinfo=UTC)},
        {"callback": "ci"},
        {"labels": {"a": "b"}},
        {"metadata": {"a": "b"}},
        {"release": "after_fetch"},
    ],
    ids="-".join,
)
def test_whatever_is_asked_for_tells_requests_apart(core: Core, change: dict[str, object]) -> None:
    asked = {"kind": "encrypt", "context": "a=1", "idempotency": "key"}

    one, same, other = (
        core.submitter.hasher(job_options(Principal("local"), **more)).digest()
        for more in (asked, asked, asked | change)
    )

    assert one == same != other


ITEM = wire.JobItem(plaintext=b"x")


def terms_of(name: str, key: str) -> SubmissionOptions:
    return job_options(Principal(name), "encrypt", Context.parse("a=1"), idempotency=key)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ada", "jobs nightly"), ("ada jobs", "nightly")),
        (("ada jobs", "jobs nightly"), ("ada jobs jobs", "nightly")),
        (("ada b", "nightly"), ("ada", "b jobs nightly")),
        (("a b\0c", "nightly"), ("c", "a b nightly")),
    ],
)
def test_callers_have_idempotency_keys_of_their_own(
    core: Core, one: tuple[str, str], other: tuple[str, str]
) -> None:
    """The subject of a JWT may hold spaces, and so may a key."""
    first, second = (core.submitter.items(terms_of(*caller), [ITEM]) for caller in (one, other))
    again = [core.submitter.items(terms_of(*caller), [ITEM]) for caller in (one, other)]

    assert first.job_id != second.job_id
    assert [job.job_id for job in again] == [first.job_id, second.job_id]


def test_routes_have_idempotency_keys_of_their_own() -> None:
    for name in ("ada", "ada jobs"):
        terms = terms_of(name, "key")
        assert terms.idempotency_scope("jobs") != terms.idempotency_scope("files/encrypt")


def test_job_of_another_tenant_is_unknown(store: JobStore) -> None:
    job = store.submit(accepted(tenant="theirs"))

    for act in (store.get, store.cancel, store.retry):
        with pytest.raises(UnknownJob):
            act(job.job_id, TENANT)
    assert store.page(TENANT, state=None, limit=10, before=None) == ([], None)
    assert store.get(job.job_id, "theirs").state == "queued"


@pytest.mark.parametrize("tenant", [TENANT, "theirs"])
def test_a_record_is_not_written_over(store: JobStore, tenant: str) -> None:
    """Redis is asked in the same step in which it would write."""
    before = accepted()
    store.submit(before)
    other = msgspec.structs.replace(before, tenant=tenant, principal="eve", kind="decrypt")

    if tenant == TENANT:
        assert store.submit(other).kind == "encrypt"
    else:
        with pytest.raises(UnknownJob):
            store.submit(other)
    assert store.accepted(before.job_id) == before
    assert store.redis.zcard("kms:open") == 1


class IdTakenMeanwhile(JobStore):
    """Of which every look is followed at once by another tenant's taking the id."""

    def seen(self, job_id: str, tenant: str) -> tuple[Job, bytes]:
        found = super().seen(job_id, tenant)
        theirs = accepted(job_id=job_id, tenant="theirs")
        forge(self, job_id, tenant="theirs", sealed=self.record_key.seal(theirs))
        return found


@pytest.mark.parametrize("error", ["", "attempts_exhausted"])
def test_job_that_changes_hands_after_the_look_stays_as_it_is(store: JobStore, error: str) -> None:
    job = store.submit(accepted())
    if error:
        forge(store, job.job_id, state="failed", error=error)
    late = copy(store)
    late.__class__ = IdTakenMeanwhile
    mine = record(store, job.job_id)
    for act in (late.cancel, late.retry):
        forge(store, job.job_id, tenant=TENANT, sealed=mine[b"sealed"])
        with pytest.raises(UnknownJob):
            act(job.job_id, TENANT)
        after = record(store, job.job_id)
        assert after == mine | {name: after[name] for name in (b"tenant", b"sealed")}
        assert after[b"tenant"] == b"theirs"


def pages(
    store: JobStore, limit: int, between: Callable[[list[str]], object] = len, kind: str | None = None
) -> list[str]:
    """The ids of the jobs of all pages; ``between`` is given those so far after each page but the last."""
    seen: list[str] = []
    cursor: str | None = None
    while True:
        jobs, cursor = store.page(TENANT, state=None, limit=limit, before=cursor, kind=kind)
        seen += [job.job_id for job in jobs]
        if cursor is None:
            return seen
        between(seen)


def test_pages_are_newest_first_and_complete(store: JobStore) -> None:
    now = time.time()
    ids = [store.submit(accepted(created_at=now + number)).job_id for number in range(25)]
    for job_id in ids[::5]:
        store.cancel(job_id, TENANT)

    cancelled, _ = store.page(TENANT, state="cancelled", limit=100, before=None)

    assert pages(store, 7) == ids[::-1]
    assert [job.job_id for job in cancelled] == ids[::5][::-1]
    counts = {name: count for name, count in store.states(TENANT).items() if count}
    assert counts == {"queued": 20, "cancelled": 5}


def test_pages_stay_complete_when_records_expire_and_others_come_in_between(store: JobStore) -> None:
    now = time.time()
    ids = [store.submit(accepted(created_at=now + number)).job_id for number in range(12)]
    same = [store.submit(accepted(created_at=now - 1)).job_id for _ in range(5)]

    def change(seen: list[str]) -> None:
        store.redis.delete(f"kms:job:{seen[-1]}")  # expired
        store.submit(accepted(created_at=now + 100 + len(seen)))

    assert pages(store, 3, change) == ids[::-1] + sorted(same, reverse=True)


def test_pages_by_kind_are_complete_and_each_looks_at_a_bounded_number_of_jobs(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    kinds = ("decrypt", *["encrypt"] * 20, "decrypt")
    ids = [store.submit(accepted(created_at=now + at, kind=kind)).job_id for at, kind in enumerate(kinds)]
    found, _ = store.page(TENANT, state=None, limit=5, before=None, kind="decrypt")
    assert [each.job_id for each in found] == [ids[-1], ids[0]]
    monkeypatch.setattr(reader, "MOST_SEEN", 10)

    found, _ = store.page(TENANT, state=None, limit=5, before=None, kind="decrypt")
    assert [each.job_id for each in found] == [ids[-1]]
    assert pages(store, 5, kind="decrypt") == [ids[-1], ids[0]]


@pytest.mark.parametrize("cursor", ["3", "1-", "-1", "x", "1764010.5-", "nan-" + "0" * 36, "1-" + "G" * 36])
def test_cursor_that_no_page_gave_is_refused(store: JobStore, cursor: str) -> None:
    with pytest.raises(InvalidRequest):
        store.page(TENANT, state=None, limit=3, before=cursor)


# -- leases ----------------------------------------------------------------------------------------------


def test_leased_job_is_nobody_else_s(store: JobStore) -> None:
    """Also if its lease has run out and nobody took it."""
    claim = claimed(store)

    assert store.claim(claim.accepted.job_id, "w2") is None
    expire_leases(store)
    store.renew(claim, {"bytes_done": 7})
    assert store.get(claim.accepted.job_id, TENANT).bytes_done == 7
    assert store.claim(claim.accepted.job_id, "w2") is None


def test_lapsed_lease_is_taken_over_and_the_old_fence_is_powerless(store: JobStore) -> None:
    old = claimed(store)
    store.renew(old, {"bytes_done": 7, "items_done": 2, "items_failed": 1})
    expire_leases(store)
    new = again(store, old)
    powerless: list[Callable[[], None]] = [
        lambda: store.renew(old, {"bytes_done": 99}),
        lambda: store.committing(old, COMMIT),
        lambda: store.committing(old, None),
        lambda: store.finish(old, "succeeded"),
        lambda: store.defer(old, 1),
        lambda: store.split(old, []),
    ]

    assert (new.fence, new.attempt) == (2, 2)
    for effect in powerless:
        with pytest.raises(LeaseLost):
            effect()
    found = store.get(old.accepted.job_id, TENANT)
    assert (found.state, found.fence, found.bytes_done) == ("running", 2, 0)
    assert (found.items_done, found.items_failed) == (0, 0)
    store.finish(new, "succeeded")
    assert state(store, new) == "succeeded"


# -- ends --------------------------------------------------------------------------------------------------


def test_job_ends_once(store: JobStore) -> None:
    claim = claimed(store)
    store.finish(claim, "failed", "decrypt_failed", WorkResult(bytes_done=5))

    with pytest.raises(LeaseLost):
        store.finish(claim, "succeeded")
    with pytest.raises(LeaseLost):
        store.renew(claim, {})
    found = store.get(claim.accepted.job_id, TENANT)
    assert (found.state, found.error, found.bytes_done) == ("failed", "decrypt_failed", 5)
    assert store.claim(claim.accepted.job_id, "w2") is None
    assert due(store) == []


def test_attempts_are_counted_and_end(store: JobStore) -> None:
    claim = claimed(store)
    fences = [claim.fence]
    for _ in range(LASTING_LEASES.jobs.attempts - 1):
        expire_leases(store)
        fences.append(again(store, claim).fence)
    expire_leases(store)

    assert store.claim(claim.accepted.job_id, "w") is None
    found = store.get(claim.accepted.job_id, TENANT)
    assert (found.state, found.error, found.attempt) == (
        "failed",
        "attempts_exhausted",
        LASTING_LEASES.jobs.attempts,
    )
    assert [*fences, found.fence] == [1, 2, 3, 4]


def test_deferral_costs_time_and_no_attempt(store: JobStore) -> None:
    claim = claimed(store)
    job_id = claim.accepted.job_id
    for number in range(3):
        store.defer(claim, 0)
        claim = again(store, claim)
        assert (claim.attempt, claim.deferrals) == (1, number + 1)

    store.defer(claim, 600)
    assert store.claim(job_id, "w") is None
    assert job_id not in due(store)
    found = store.get(job_id, TENANT)
    assert found.state == "queued"
    assert found.not_before > time.time() + 500


def test_each_return_to_the_queue_is_told_with_its_reason(store: JobStore) -> None:
    claim = claimed(store)
    job_id = claim.accepted.job_id
    store.defer(claim, 0)
    again(store, claim)
    expire_leases(store)
    reap_all(store, [job_id])
    store.stalled(again(store, claim))
    store.finish(again(store, claim), "failed", "attempts_exhausted")
    store.retry(job_id, TENANT)

    assert [(event["type"].removeprefix("kms.job."), event["code"]) for event in events(store)] == [
        ("queued", ""),
        ("running", ""),
        ("queued", "deferred"),
        ("running", ""),
        ("queued", "lease_lost"),
        ("running", ""),
        ("queued", "stalled"),
        ("running", ""),
        ("failed", "attempts_exhausted"),
        ("queued", "retried"),
    ]


def parts_of(claim: Attempt, count: int) -> list[JobSpec]:
    whole = claim.accepted.job_id
    made = [part_id(whole, number) for number in range(count)]
    return [msgspec.structs.replace(claim.accepted, job_id=part, parent=whole) for part in made]


def test_job_that_is_split_twice_is_split_once(store: JobStore) -> None:
    claim = claimed(store, source="items", items=2)
    parts = parts_of(claim, 2)
    store.split(claim, parts)
    held = take(store, parts[0].job_id)

    store.split(claim, parts)  # the answer to the first was lost, and the client asked again

    store.renew(held, {})
    store.finish(held, "succeeded")


def test_expired_records_are_forgotten_some_hundred_at_a_time(store: JobStore, tmp_path: Path) -> None:
    with alone(store, tmp_path / "own") as own:
        counts = []
        for expired in (1, 450):
            own.redis.zadd("kms:records", {str(uuid4()): 1 for _ in range(expired)})
            forget(own)
            counts.append(own.redis.info("commandstats")["cmdstat_evalsha"]["calls"])

        assert counts[1] - counts[0] == 3
        assert not own.redis.exists("kms:records")


def test_result_that_outlives_its_record_counts_for_no_quota(core: Core) -> None:
    """As where no worker deletes results before records expire."""
    store = store_of(core, with_jobs(result_ttl_s=0))
    claim = claimed(store, size_bytes=9, expires_at=1.0, start_by=4e9, run_by=4e9)
    assert store.spooled_bytes(TENANT) == 9
    store.finish(claim, "succeeded")
    assert record(store, claim.accepted.job_id) == {}

    forget(store)

    assert store.spooled_bytes(TENANT) == 0


def test_job_that_is_to_be_cancelled_is_not_split(store: JobStore) -> None:
    claim = claimed(store, source="items", items=1)
    store.cancel(claim.accepted.job_id, TENANT)

    with pytest.raises(JobCancelled):
        store.split(claim, parts_of(claim, 1))
    assert store.get(claim.accepted.job_id, TENANT).parts == 0


def test_renewal_that_comes_late_does_not_put_a_lease_on_a_job_in_parts(store: JobStore) -> None:
    claim = claimed(store, source="items", items=1)
    store.split(claim, parts_of(claim, 1))
    before = record(store, claim.accepted.job_id)

    store.renew(claim, {"items_done": 7})

    assert record(store, claim.accepted.job_id) == before


# -- cancelling -------------------------------------------------------------------------------------------


def test_queued_job_is_cancelled_at_once(store: JobStore) -> None:
    job = store.submit(accepted())

    assert store.cancel(job.job_id, TENANT).state == "cancelled"
    assert store.claim(job.job_id, "w") is None
    assert store.cancel(job.job_id, TENANT).state == "cancelled"


@pytest.mark.parametrize("is_dead", [False, True], ids=["worker lives", "worker is dead"])
def test_running_job_is_asked_to_stop(store: JobStore, *, is_dead: bool) -> None:
    claim = claimed(store)

    assert store.cancel(claim.accepted.job_id, TENANT).state == "running"
    with pytest.raises(JobCancelled):
        store.renew(claim, {})
    with pytest.raises(JobCancelled):
        store.committing(claim, COMMIT)
    if is_dead:
        expire_leases(store)
        assert store.claim(claim.accepted.job_id, "w2") is None
    else:
        store.finish(claim, "cancelled", "cancelled")
    assert state(store, claim) == "cancelled"


def test_committing_job_cannot_be_cancelled(store: JobStore) -> None:
    claim = claimed(store)
    store.committing(claim, COMMIT)

    with pytest.raises(JobCommitting):
        store.cancel(claim.accepted.job_id, TENANT)
    store.renew(claim, {})
    store.finish(claim, "succeeded")


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_ended_job_stays_as_it_ended(store: JobStore, end: wire.JobState) -> None:
    claim = claimed(store)
    store.finish(claim, end, "" if end == "succeeded" else "some_code")

    assert store.cancel(claim.accepted.job_id, TENANT).state == end
    with pytest.raises(JobNotDead):
        store.retry(claim.accepted.job_id, TENANT)


# -- committing -------------------------------------------------------------------------------------------


def test_commit_said_twice_is_said_once(store: JobStore) -> None:
    claim = claimed(store)

    store.committing(claim, COMMIT)
    store.committing(claim, COMMIT)

    with pytest.raises(LeaseLost):
        store.committing(claim, msgspec.structs.replace(COMMIT, inode=3))
    assert state(store, claim) == "committing"


def test_commit_of_one_file_of_many_waits_for_replicas_and_other_steps_do_not(
    core: Core, store: JobStore
) -> None:
    claim = claimed(store)
    waiting = unheard(core)
    waiting.step(claim, Checkpoint(words=("",), outcomes=(0,)), {})

    with pytest.raises(DurabilityUnconfirmed):
        waiting.step(claim, Checkpoint(words=("",), outcomes=(0,), pending=COMMIT), {})


def test_commit_is_handed_to_whoever_comes_next(store: JobStore) -> None:
    claim = claimed(store)
    store.committing(claim, COMMIT)
    for number in range(2, 2 + 2 * LASTING_LEASES.jobs.attempts):  # a commit has no limit of attempts
        expire_leases(store)
        assert reap_all(store, [claim.accepted.job_id]) == ["committing"]
        found = again(store, claim)
        assert (found.commit, found.attempt, found.fence) == (COMMIT, 1, number)


@pytest.mark.parametrize("delay_s", [0, 0.3], ids=["at once", "once replicas may have it"])
def test_commit_of_an_attempt_that_is_handed_back_is_for_any_worker(store: JobStore, delay_s: float) -> None:
    """Of a worker that stops between recording its commit and putting the target in place."""
    claim = claimed(store)
    store.committing(claim, COMMIT)

    store.defer(claim, delay_s, away=bool(delay_s))
    with pytest.raises(LeaseLost):
        store.renew(claim, {})  # of a thread that has not heard
    if delay_s:
        assert next_attempt(store, "w2", claim.accepted.queue) is None
        until(lambda: reap_all(store, [claim.accepted.job_id]) == ["committing"], "its time has come")
    found = next_attempt(store, "w2", claim.accepted.queue)

    assert found
    assert (found.commit, found.attempt, found.deferrals) == (COMMIT, 1, int(delay_s > 0))


def test_a_job_that_is_retried_counts_and_expires_as_a_new_one(store: JobStore) -> None:
    claim = claimed(store)
    job_id = claim.accepted.job_id
    store.finish(claim, "failed", "attempts_exhausted")
    store.purged(job_id)

    run_by = store.retry(job_id, TENANT).run_by

    assert store.redis.zscore("kms:open", job_id), "of all open jobs"
    for key in (f"kms:open:{TENANT}", "kms:expiring"):
        assert store.redis.zscore(key, job_id) == pytest.approx(run_by, abs=1)
    assert record(store, job_id).keys().isdisjoint({b"started_at", b"ended_at", b"purged"})


def test_a_dead_job_whose_result_was_released_is_not_retried(store: JobStore) -> None:
    """Its input may be gone."""
    claim = claimed(store)
    job_id = claim.accepted.job_id
    store.finish(claim, "failed", "attempts_exhausted")
    store.release(store.get(job_id, TENANT))

    with pytest.raises(JobNotDead):
        store.retry(job_id, TENANT)
