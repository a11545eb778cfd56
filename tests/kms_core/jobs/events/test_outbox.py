"""The outbox: what workers that die or overlap, and an intruder in Redis, leave in it."""

import time
from pathlib import Path
from typing import cast

import msgspec
import pytest

from kms_core.jobs.events.outbox import GIVE_UP_S, MOST_ATTEMPTS, Outbox, WebhookDispatcher
from kms_core.jobs.events.webhook import WebhookEndpoint
from kms_core.jobs.store.store import JobStore
from kms_protocol.errors import DurabilityUnconfirmed
from support.job_stores import (
    LASTING_LEASES,
    accepted,
    alone,
    claimed,
    commands,
    forge,
    round_trips,
)
from support.waiting import until
from support.webhooks import DUE, ended_job, endpoint, event_entry, every, hasten, receiving, waiting

GIVEN_UP = "kms:webhooks:given_up"


@pytest.mark.parametrize(
    "changes",
    [{"callback": ""}, {"callback": "ci", "source": "items", "parent": "whole"}],
    ids=["no-callback", "part"],
)
def test_other_jobs_are_not_told(
    store: JobStore, webhook_endpoint: WebhookEndpoint, changes: dict[str, str]
) -> None:
    store.finish(claimed(store, **changes), "succeeded")
    outbox = Outbox(store, {"ci": webhook_endpoint})

    assert outbox.due("ci", 10) == []
    assert outbox.waiting().total() == 0


@pytest.mark.parametrize(
    "changes",
    [{"attempts": MOST_ATTEMPTS - 1}, {"created_at": time.time() - GIVE_UP_S - 1}],
    ids=["attempts", "age"],
)
def test_a_delivery_that_always_fails_ends_as_dead(
    store: JobStore, webhook_endpoint: WebhookEndpoint, changes: dict[str, float]
) -> None:
    ended_job(store)
    outbox, delivery = waiting(store, {"ci": webhook_endpoint})

    assert outbox.put_off(msgspec.structs.replace(delivery, **changes)) is None
    assert outbox.waiting().total() == 0
    assert [found.delivery_id for found in outbox.dead()] == [delivery.delivery_id]


def test_each_failed_attempt_waits_longer_up_to_a_quarter_of_an_hour(
    store: JobStore, webhook_endpoint: WebhookEndpoint
) -> None:
    """Twice as long each time, of which a half is random."""
    ended_job(store)
    outbox, delivery = waiting(store, {"ci": webhook_endpoint})
    for failed, longest_s in ((0, 1), (1, 2), (9, 512), (10, 900), (18, 900)):
        wait_s = outbox.put_off(msgspec.structs.replace(delivery, attempts=failed))
        assert wait_s is not None
        assert longest_s / 2 <= wait_s <= longest_s


def test_other_states_are_passed_over_and_leave(store: JobStore, webhook_endpoint: WebhookEndpoint) -> None:
    """Also where more of them come first than may be sent at a time."""
    for _ in range(5):
        claimed(store, callback="ci")
    ended = [ended_job(store) for _ in range(3)]
    outbox = Outbox(store, {"ci": webhook_endpoint})
    first = outbox.due("ci", 2)
    rest = outbox.due("ci", 2, [found.entry for found in first])

    assert [found.job_id for found in (*first, *rest)] == ended
    assert outbox.waiting().total() == 3


def test_the_stream_that_others_read_is_not_needed(
    store: JobStore, webhook_endpoint: WebhookEndpoint
) -> None:
    job_id = ended_job(store)
    store.redis.delete("kms:events")

    assert waiting(store, {"ci": webhook_endpoint})[1].job_id == job_id


def test_an_end_that_redis_did_not_confirm_waits(
    store: JobStore, webhook_endpoint: WebhookEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unconfirmed() -> None:
        raise DurabilityUnconfirmed

    job_id = ended_job(store)
    with monkeypatch.context() as patch:
        patch.setattr(store, "confirm", unconfirmed)
        with pytest.raises(DurabilityUnconfirmed):
            waiting(store, {"ci": webhook_endpoint})

    assert waiting(store, {"ci": webhook_endpoint})[1].job_id == job_id


def test_settling_late_leaves_nothing_behind(store: JobStore, webhook_endpoint: WebhookEndpoint) -> None:
    ended_job(store)
    outbox, delivery = waiting(store, {"ci": webhook_endpoint})
    outbox.remove(delivery)
    outbox.put_off(delivery)
    outbox.put_off(msgspec.structs.replace(delivery, attempts=MOST_ATTEMPTS))

    assert (outbox.waiting().total(), outbox.dead()) == (0, [])


def test_a_delivery_that_failed_outlives_the_record(
    store: JobStore, webhook_endpoint: WebhookEndpoint
) -> None:
    """Records may be kept for a shorter time than attempts are made."""
    job_id = ended_job(store)
    outbox, first = waiting(store, {"ci": webhook_endpoint})
    outbox.put_off(first)
    store.redis.delete(f"kms:job:{job_id}")
    hasten(store)

    [second] = outbox.due("ci", 10)
    assert (second.delivery_id, second.body, second.attempts) == (first.delivery_id, first.body, 1)


def test_entries_that_no_worker_sends_are_bounded(store: JobStore) -> None:
    store.redis.zadd(DUE, {"old": time.time() - 7 * 86400 - 60, "young": time.time() - 7 * 86400 + 60})
    ended_job(store)

    entries = cast("list[bytes]", store.redis.zrange(DUE, 0, -1))
    assert b"young" in entries
    assert b"old" not in entries


# -- what an intruder in Redis can do --------------------------------------------------------------------


@pytest.mark.parametrize("late_s", [-60, 60])
def test_a_delivery_that_is_put_back_after_its_time_is_not_sent(
    store: JobStore, tmp_path: Path, late_s: float
) -> None:
    """Its time ends when all attempts are over, and what an outage of the workers may take."""
    ended_job(store)
    with receiving(None) as receiver:
        webhook_endpoint = endpoint(tmp_path, receiver.url(scheme="http"), None)
        outbox, delivery = waiting(store, {"ci": webhook_endpoint})
        outbox.remove(delivery)
        made_at = time.time() - 24 * 3600 - LASTING_LEASES.jobs.result_ttl_s - late_s
        plain = msgspec.msgpack.encode(msgspec.structs.replace(delivery, created_at=made_at, entry=b""))
        store.redis.zadd(DUE, {store.record_key.seal_as(b"kms-service/webhook-delivery/1", b"", plain): 0})
        dispatcher = WebhookDispatcher(outbox, {"ci": webhook_endpoint}, "me")

        def settled() -> bool:
            dispatcher.round()
            return outbox.waiting().total() == 0

        until(settled, "the delivery is sent or given up")

    dead = [found.delivery_id for found in outbox.dead()]
    assert (len(receiver.requests), dead) == ((0, [delivery.delivery_id]) if late_s > 0 else (1, []))


def test_an_event_of_a_record_that_was_put_back_after_its_time_is_not_told(
    store: JobStore, webhook_endpoint: WebhookEndpoint
) -> None:
    job_id, kept = ended_job(store, "failed", "decrypt_failed"), ended_job(store, "failed", "decrypt_failed")
    long_ago = time.time() - LASTING_LEASES.jobs.result_ttl_s - 61
    old = accepted(job_id=job_id, callback="ci", expires_at=long_ago)
    forge(store, job_id, sealed=store.record_key.seal(old))

    assert waiting(store, {"ci": webhook_endpoint})[1].job_id == kept


@pytest.mark.parametrize("is_sealed", [False, True], ids=["event", "sealed"])
def test_an_entry_of_another_endpoint_is_not_sent(
    store: JobStore, webhook_endpoint: WebhookEndpoint, *, is_sealed: bool
) -> None:
    """The sealed part of a record, or the sealed delivery, names the endpoint."""
    ended_job(store)
    outbox, delivery = waiting(store, {"ci": webhook_endpoint, "other": webhook_endpoint})
    if is_sealed:
        outbox.put_off(delivery)
    for entry in cast("list[bytes]", store.redis.zrange(DUE, 0, -1)):
        store.redis.zadd("kms:webhooks:due:other", {entry: 0})

    assert outbox.due("other", 10) == []
    assert not store.redis.exists("kms:webhooks:due:other")


def test_a_delivery_that_the_service_did_not_seal_is_not_sent(
    store: JobStore, webhook_endpoint: WebhookEndpoint
) -> None:
    ended_job(store)
    outbox, delivery = waiting(store, {"ci": webhook_endpoint})
    outbox.remove(delivery)
    outbox_entry = b"\x01" + msgspec.msgpack.encode(delivery)
    store.redis.zadd(DUE, {outbox_entry: 0, b"junk": 0, b"": 0})
    store.redis.zadd(GIVEN_UP, {outbox_entry: 0, b"junk": 0, b"": 0})

    assert outbox.due("ci", 10) == outbox.dead() == []
    assert outbox.waiting().total() == 0


def test_a_record_cannot_be_given_a_callback(store: JobStore, webhook_endpoint: WebhookEndpoint) -> None:
    claim = claimed(store)
    forge(store, claim.accepted.job_id, callback="ci", group_callback="ci")
    store.finish(claim, "succeeded")
    outbox = Outbox(store, {"ci": webhook_endpoint})

    assert outbox.endpoints() == ["ci"]
    assert outbox.due("ci", 10) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "kms.job.done"},
        {"time": "nan"},
        {"time": "1e300"},
        {"attempt": "x"},
        {"id": "x" * 300},
        {"subject": "gone"},
        {"tenant": "theirs"},
        {"type": "kms.group.ended"},
    ],
    ids=["state", "nan", "late", "attempt", "id", "gone", "tenant", "group"],
)
def test_an_event_that_no_script_wrote_is_passed_over(
    store: JobStore, webhook_endpoint: WebhookEndpoint, changes: dict[str, str]
) -> None:
    first = ended_job(store)
    junk = (event_entry(first, **changes), b"[1]", b'["a"]', b"[\xff")
    store.redis.zadd(DUE, dict.fromkeys(junk, time.time()))
    last = ended_job(store)
    outbox = Outbox(store, {"ci": webhook_endpoint})

    assert [delivery.job_id for delivery in outbox.due("ci", 10)] == [first, last]
    assert outbox.waiting().total() == 2


def test_a_record_that_does_not_decode_stops_no_other(
    store: JobStore, webhook_endpoint: WebhookEndpoint
) -> None:
    broken, good = ended_job(store), ended_job(store)
    forge(store, broken, attempt="many")

    assert waiting(store, {"ci": webhook_endpoint})[1].job_id == good


def test_the_newest_thousand_of_dead_deliveries_are_kept(
    store: JobStore, webhook_endpoint: WebhookEndpoint
) -> None:
    ended_job(store)
    ended_job(store)
    outbox = Outbox(store, {"ci": webhook_endpoint})
    first, last = (msgspec.structs.replace(each, attempts=MOST_ATTEMPTS) for each in outbox.due("ci", 10))
    outbox.put_off(first)
    store.redis.zadd(GIVEN_UP, {f"entry {number}": time.time() for number in range(999)})
    assert [found.delivery_id for found in outbox.dead()] == [first.delivery_id]

    outbox.put_off(last)

    assert [found.delivery_id for found in outbox.dead()] == [last.delivery_id]
    assert store.redis.zcard(GIVEN_UP) == 1000


def test_events_that_nobody_reads_are_bounded(store: JobStore) -> None:
    """Redis cuts whole nodes of the stream, of 100 events by default: ``MAXLEN ~``."""
    with store.redis.pipeline(transaction=False) as pipe:
        for number in range(100_500):
            pipe.xadd("kms:events", {"a": "b"}, id=f"{number + 1}-0")
        pipe.execute()
    ended_job(store)

    assert 100_000 <= store.redis.xlen("kms:events") < 100_200
    newest = cast("list[tuple[bytes, dict[bytes, bytes]]]", store.redis.xrevrange("kms:events", count=1))
    assert newest[0][1][b"type"] == b"kms.job.succeeded"


def test_every_waiting_delivery_is_counted(store: JobStore, webhook_endpoint: WebhookEndpoint) -> None:
    outbox = Outbox(store, {"ci": webhook_endpoint})
    assert (outbox.endpoints(), outbox.waiting().total(), every(outbox)) == ([], 0, [])
    ended_job(store)
    ended_job(store, callback="other")
    for name in ("ci", "other"):
        outbox.due(name, 10)

    assert (outbox.endpoints(), outbox.waiting().total()) == (["ci", "other"], 2)


def test_an_endpoint_for_which_nothing_waits_costs_one_command_and_no_round_trip(
    store: JobStore, tmp_path: Path
) -> None:
    with alone(store, tmp_path / "own") as own:
        dispatcher, taken = WebhookDispatcher(Outbox(own, {}), {}, "w1"), []
        for names in (["first"], ["second"], [f"endpoint-{number}" for number in range(20)]):
            own.redis.sadd("kms:webhooks:endpoints", *names)
            before, trips = commands(own), round_trips(own)
            dispatcher.round()
            taken.append((commands(own) - before, round_trips(own) - trips))

    (_, (two, trips), (many, same)) = taken  # the first round loads the scripts
    assert (many - two, same - trips) == (20, 0)
