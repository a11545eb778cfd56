"""The outbox: what couriers that die or overlap, a cut stream and an intruder in Redis leave in it."""

import time
from pathlib import Path
from typing import cast

import msgspec
import pytest

from kms_core.container import Core
from kms_core.jobs.events.dispatcher import WebhookDispatcher
from kms_core.jobs.events.outbox import GIVE_UP_S, MOST_ATTEMPTS, Outbox
from kms_core.jobs.events.webhook import WebhookEndpoint
from kms_core.jobs.store.store import JobStore
from support.job_stores import LONG, accepted, claimed, forge, store_of
from support.waiting import until
from support.webhooks import ENTRIES, end, endpoint, every, receiving, taken_in


@pytest.fixture
def store(core: Core) -> JobStore:
    return store_of(core, LONG, [])


@pytest.fixture
def ci(tmp_path: Path) -> WebhookEndpoint:
    """Nothing is sent here."""
    return endpoint(tmp_path, "https://hooks.invalid/", None)


@pytest.mark.parametrize(
    "changes",
    [{"callback": ""}, {"callback": "ci", "source": "items", "parent": "whole"}],
    ids=["no-callback", "part"],
)
def test_other_jobs_are_not_told(store: JobStore, ci: WebhookEndpoint, changes: dict[str, str]) -> None:
    store.finish(claimed(store, **changes), "succeeded")
    outbox = Outbox(store, {"ci": ci})
    outbox.take_in()

    assert outbox.size() == 0


@pytest.mark.parametrize(
    "changes",
    [{"attempts": MOST_ATTEMPTS - 1}, {"created_at": time.time() - GIVE_UP_S - 1}],
    ids=["attempts", "age"],
)
def test_a_delivery_that_always_fails_ends_as_dead(
    store: JobStore, ci: WebhookEndpoint, changes: dict[str, float]
) -> None:
    end(store)
    outbox, delivery = taken_in(store, {"ci": ci})

    assert outbox.put_off(msgspec.structs.replace(delivery, **changes)) is None
    assert outbox.size() == 0
    assert [found.delivery_id for found in outbox.dead()] == [delivery.delivery_id]


def test_events_that_are_read_twice_make_one_delivery(store: JobStore, ci: WebhookEndpoint) -> None:
    end(store)
    outbox, delivery = taken_in(store, {"ci": ci})
    outbox.take_in()
    store.redis.delete("kms:webhooks:cursor")
    outbox.take_in()

    assert [found.delivery_id for found in every(outbox)] == [delivery.delivery_id]


def test_a_stream_that_was_cut_is_made_up_for(store: JobStore, ci: WebhookEndpoint) -> None:
    outbox = Outbox(store, {"ci": ci})
    old = end(store)
    time.sleep(0.002)
    end(store)  # of the same millisecond as the cursor: told again
    outbox.take_in()
    for delivery in every(outbox):
        outbox.remove(delivery)
    missed = [end(store), end(store, "failed", "decrypt_failed")]
    store.redis.xtrim("kms:events", maxlen=0)
    last = end(store)
    outbox.take_in()

    found = {delivery.job_id: delivery.state for delivery in every(outbox)}
    assert found.items() >= {missed[0]: "succeeded", missed[1]: "failed", last: "succeeded"}.items()
    assert old not in found


def test_whoever_settles_late_leaves_nothing_behind(store: JobStore, ci: WebhookEndpoint) -> None:
    end(store)
    outbox, delivery = taken_in(store, {"ci": ci})
    outbox.remove(delivery)
    outbox.put_off(delivery)

    assert outbox.size() == 0


# -- what an intruder in Redis can do --------------------------------------------------------------------


@pytest.mark.parametrize("late_s", [-60, 60])
def test_a_delivery_that_is_put_back_after_its_time_is_not_sent(
    store: JobStore, tmp_path: Path, late_s: float
) -> None:
    """Its time ends when all attempts are over, and what an outage of the courier may take."""
    end(store)
    with receiving(None) as receiver:
        ci = endpoint(tmp_path, receiver.url(scheme="http"), None)
        outbox, delivery = taken_in(store, {"ci": ci})
        outbox.remove(delivery)
        signed_at = time.time() - 24 * 3600 - LONG.keep_record_s - late_s
        body = msgspec.msgpack.encode(msgspec.structs.replace(delivery, created_at=signed_at))
        entry = store.record_key.digest(b"webhook-delivery", body) + body
        store.redis.hset(ENTRIES, delivery.delivery_id, entry)
        store.redis.zadd("kms:webhooks:due:ci", {delivery.delivery_id: 0})
        courier = WebhookDispatcher(outbox, {"ci": ci}, "me")

        def settled() -> bool:
            courier.round()
            return outbox.size() == 0

        until(settled, "the delivery is sent or given up")

    dead = [found.delivery_id for found in outbox.dead()]
    assert (len(receiver.requests), dead) == ((0, [delivery.delivery_id]) if late_s > 0 else (1, []))


def test_an_event_of_a_record_that_was_put_back_after_its_time_is_not_told(
    store: JobStore, ci: WebhookEndpoint
) -> None:
    job_id, kept = end(store, "failed", "decrypt_failed"), end(store, "failed", "decrypt_failed")
    long_ago = time.time() - LONG.keep_record_s - 61
    old = accepted(job_id=job_id, callback="ci", expires_at=long_ago)
    forge(store, job_id, sealed=store.record_key.seal(old))
    outbox = Outbox(store, {"ci": ci})
    outbox.take_in()

    assert [delivery.job_id for delivery in every(outbox)] == [kept]


@pytest.mark.parametrize("forged", ["other endpoint", "own entry", "other id"])
def test_an_entry_that_the_service_did_not_write_is_not_sent(
    store: JobStore, ci: WebhookEndpoint, forged: str
) -> None:
    end(store)
    outbox, delivery = taken_in(store, {"ci": ci, "other": ci})
    entry = store.redis.hget(ENTRIES, delivery.delivery_id)
    name, delivery_id = "ci", delivery.delivery_id
    if forged == "own entry":
        changed = msgspec.structs.replace(delivery, body=b"{}")
        store.redis.hset(ENTRIES, delivery_id, bytes(32) + msgspec.msgpack.encode(changed))
    elif forged == "other id":
        delivery_id = "7b0e1c9a-0000-5000-8000-000000000001"
        store.redis.hset(ENTRIES, delivery_id, entry)
        store.redis.delete("kms:webhooks:due:ci")
    else:
        name = "other"
    store.redis.zadd(f"kms:webhooks:due:{name}", {delivery_id: 0})

    assert outbox.due(name, 10) == []
    assert not store.redis.zscore(f"kms:webhooks:due:{name}", delivery_id)


def test_a_record_cannot_be_given_a_callback(store: JobStore, ci: WebhookEndpoint) -> None:
    job_id = end(store, callback="")
    forge(store, job_id, callback="ci", sealed=store.record_key.seal(accepted(callback="ci")))
    outbox = Outbox(store, {"ci": ci})
    outbox.take_in()

    assert outbox.size() == 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"type": "kms.job.done"},
        {"time": "nan"},
        {"time": "1e300"},
        {"attempt": "x"},
        {"id": b"\xff"},
        {"subject": "gone"},
    ],
    ids=["empty", "state", "nan", "late", "attempt", "bytes", "gone"],
)
def test_an_event_that_no_script_wrote_is_passed_over(
    store: JobStore, ci: WebhookEndpoint, fields: dict[str, str | bytes]
) -> None:
    first = end(store)
    event = {
        "type": "kms.job.succeeded",
        "subject": first,
        "id": f"{first}.7.x",
        "time": "1",
        "attempt": "1",
        "code": "",
    }
    store.redis.xadd("kms:events", event | fields if fields else {"a": "b"})  # type: ignore[arg-type]
    last = end(store)
    outbox = Outbox(store, {"ci": ci})
    outbox.take_in()

    assert {delivery.job_id for delivery in every(outbox)} == {first, last}
    assert outbox.size() == 2


def test_a_record_that_does_not_decode_stops_nobody(store: JobStore, ci: WebhookEndpoint) -> None:
    broken, good = end(store), end(store)
    forge(store, broken, attempt="many")
    outbox = Outbox(store, {"ci": ci})
    outbox.take_in()

    assert [delivery.job_id for delivery in every(outbox)] == [good]


def test_without_events_there_is_nothing_to_do(store: JobStore, ci: WebhookEndpoint) -> None:
    outbox = Outbox(store, {"ci": ci})

    assert (outbox.take_in(), outbox.endpoints(), outbox.size()) == (False, [], 0)


def test_the_newest_thousand_of_dead_deliveries_are_kept(store: JobStore, ci: WebhookEndpoint) -> None:
    end(store)
    outbox, delivery = taken_in(store, {"ci": ci})
    outbox.put_off(msgspec.structs.replace(delivery, delivery_id="first", attempts=MOST_ATTEMPTS))
    store.redis.lpush("kms:webhooks:dead", *(f"entry {number}" for number in range(999)))
    assert [found.delivery_id for found in outbox.dead()] == ["first"]

    outbox.put_off(msgspec.structs.replace(delivery, delivery_id="last", attempts=MOST_ATTEMPTS))

    assert [found.delivery_id for found in outbox.dead()] == ["last"]
    assert store.redis.llen("kms:webhooks:dead") == 1000


def test_events_that_nobody_reads_are_bounded(store: JobStore) -> None:
    """Redis cuts whole nodes of the stream, of 100 events by default: ``MAXLEN ~``."""
    with store.redis.pipeline(transaction=False) as pipe:
        for number in range(100_500):
            pipe.xadd("kms:events", {"a": "b"}, id=f"{number + 1}-0")
        pipe.execute()
    end(store)

    assert 100_000 <= store.redis.xlen("kms:events") < 100_200
    newest = cast("list[tuple[bytes, dict[bytes, bytes]]]", store.redis.xrevrange("kms:events", count=1))
    assert newest[0][1][b"type"] == b"kms.job.succeeded"


@pytest.mark.parametrize(
    "cursor",
    [b"junk", b"\xff", b"", b"1-", b"99999999999999-0", b"18446744073709551615-0", b"9" * 400 + b"-0"],
    ids=["junk", "bytes", "empty", "half", "later", "last", "huge"],
)
def test_a_cursor_that_no_courier_wrote_is_the_start(
    store: JobStore, ci: WebhookEndpoint, cursor: bytes
) -> None:
    told, waits = end(store), end(store)
    outbox = Outbox(store, {"ci": ci})
    outbox.take_in()
    before = {delivery.job_id: delivery.delivery_id for delivery in every(outbox)}
    [first] = [delivery for delivery in every(outbox) if delivery.job_id == told]
    outbox.remove(first)
    store.redis.set("kms:webhooks:cursor", cursor)
    last = end(store)
    for _ in range(2):
        outbox.take_in()

    found = every(outbox)
    assert sorted(delivery.job_id for delivery in found) == sorted((told, waits, last))
    assert before.items() <= {delivery.job_id: delivery.delivery_id for delivery in found}.items(), (
        "what is told again is told under the same id"
    )
    assert store.redis.get("kms:webhooks:cursor") != cursor


def test_a_cursor_at_the_end_or_of_a_stream_that_has_gone_stays(store: JobStore, ci: WebhookEndpoint) -> None:
    end(store)
    outbox = Outbox(store, {"ci": ci})
    outbox.take_in()
    for delivery in every(outbox):
        outbox.remove(delivery)
    cursor = store.redis.get("kms:webhooks:cursor")
    store.redis.xtrim("kms:events", maxlen=0)
    assert not outbox.take_in()
    store.redis.delete("kms:events")
    assert not outbox.take_in()

    assert store.redis.get("kms:webhooks:cursor") == cursor
    assert outbox.size() == 0
