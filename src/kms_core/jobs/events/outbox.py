"""The outbox: events of jobs that are still to be delivered, in Redis.

Each transition of a job is one record of the stream ``kms:events``, written by the script that moves the job.
``take_in`` reads on from a cursor, and one script stores the deliveries and moves the cursor, if that still
stands where it was read. So no killed process loses an event:

- before the script: the events are read again;
- after it: the delivery stays in the outbox until ``remove``, and any process sends it;
- between the answer and ``remove``: it is sent again, under the same id. That of an end is made of
  job, generation and state, so it is the same if the job ends again after Redis has gone back in time.

If the stream was cut behind the cursor (no dispatcher ran for 100,000 events), missed events are taken from
the records of ended jobs. The sealed record names the endpoint; entries carry a MAC. An event that needs a
proof (``ends.needs_proof``) has the state of the signed end: ``failed`` with ``record_refused`` if the record
claims an unproven end, no event before the job has ended. Write access to Redis can repeat a delivery until
it is stale and announce other states, but cannot forge ``succeeded``.

Keys below ``kms:webhooks:``: ``cursor``, ``entries`` (a hash by delivery id), ``due:<endpoint>`` (delivery
ids by when to send), ``endpoints`` (those named in entries), ``dead`` (the newest that were given up).
"""

import hmac
import time
from collections.abc import Iterable, Mapping
from typing import Final, cast

import msgspec
import redis
import structlog

from kms_core.jobs.events import groups, transitions
from kms_core.jobs.events.transitions import Transition
from kms_core.jobs.events.webhook import WebhookEndpoint, WebhookRequest, event_body
from kms_core.jobs.spec import AnyJob, JobSpec
from kms_core.jobs.store.redis_keys import job_key
from kms_core.jobs.store.store import JobStore
from kms_core.retries import jittered_wait_s
from kms_protocol import wire
from kms_protocol.errors import UnknownJob

MOST_ATTEMPTS: Final = 20
GIVE_UP_S: Final = 24 * 3600.0
FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 15 * 60.0
_EVENTS: Final = "kms:events"
_ENDED: Final = "kms:ended"
_CURSOR: Final = "kms:webhooks:cursor"
_ENTRIES: Final = "kms:webhooks:entries"
_ENDPOINTS: Final = "kms:webhooks:endpoints"
_DEAD: Final = "kms:webhooks:dead"
_DEAD_KEPT: Final = 1000
_BATCH: Final = 500
_START: Final = b"0-0"
_TAG_BYTES: Final = 32
_LABEL: Final = b"webhook-delivery"
_log = structlog.get_logger(__name__)


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """An event to send, its endpoint and its failed attempts. Times are seconds since the epoch."""

    delivery_id: str
    endpoint: str
    job_id: str
    state: wire.JobState
    body: bytes
    created_at: float
    attempts: int = 0
    tenant: str = ""  # of an entry that an earlier version wrote

    @property
    def message(self) -> WebhookRequest:
        return WebhookRequest(self.delivery_id, self.job_id, self.body)


def delay_s(attempts: int) -> float:
    """Seconds to wait after so many attempts: doubling from 1 s to 15 min, the upper half at random."""
    return jittered_wait_s(FIRST_DELAY_S, attempts, at_most_s=LONGEST_DELAY_S)


class Outbox:
    """Takes in events, tells what is due, settles what was answered.

    Everything here raises JobsUnavailable or redis.RedisError when Redis is gone.
    """

    def __init__(self, store: JobStore, endpoints: Mapping[str, WebhookEndpoint]) -> None:
        self.store = store
        self._redis = store.redis
        self._endpoints = endpoints
        self._wanted = wire.ENDED.union(*(endpoint.events for endpoint in endpoints.values()))

    # -- in ------------------------------------------------------------------------------------------

    def take_in(self) -> bool:
        """Store the deliveries that follow from the next events; whether more events may wait."""
        cursor = self._cursor()
        batch = cast(
            "list[tuple[bytes, dict[bytes, bytes]]]",
            self._redis.xrange(_EVENTS, min=cursor.decode(), count=_BATCH),
        )
        if not batch and self._is_beyond(cursor):
            self._redis.delete(_CURSOR)
            _log.warning("webhook.cursor_refused")
            return True
        full = len(batch) == _BATCH
        if batch and batch[0][0] == cursor:
            del batch[0]
        elif batch:
            self._look_through(cursor)
        if batch:
            self._put(cursor, batch[-1][0], [transitions.of_event(fields) for _, fields in batch])
        return full

    def _cursor(self) -> bytes:
        """The stream id to read on from; the start, if the stored value is not a stream id."""
        cursor = cast("bytes | None", self._redis.get(_CURSOR))
        if cursor is not None and transitions.place(cursor) is None:
            self._redis.delete(_CURSOR)
            _log.warning("webhook.cursor_refused")
            return _START
        return cursor or _START

    def _is_beyond(self, cursor: bytes) -> bool:
        """Return whether all events come before it. False for an empty stream, which cannot tell."""
        last = cast("list[tuple[bytes, object]]", self._redis.xrevrange(_EVENTS, count=1))
        return bool(last) and (transitions.place(cursor) or (0, 0)) > (
            transitions.place(last[0][0]) or (0, 0)
        )

    def _put(self, cursor: bytes, moved: bytes, seen: Iterable[Transition | None]) -> None:
        """Store what follows from these transitions and move the cursor, unless another process moved it."""
        flat = [
            argument
            for delivery in map(self._delivery, filter(None, seen))
            if delivery
            for argument in (
                delivery.delivery_id,
                self._signed(delivery),
                delivery.endpoint,
                delivery.created_at,
            )
        ]
        self.store.confirm()  # an event that a fail-over may take back waits
        self.store.script("take_in")([_CURSOR, _ENTRIES, _ENDPOINTS], [cursor, moved, *flat])

    def _delivery(self, transition: Transition) -> Delivery | None:
        """The delivery of the sealed record; an endpoint unknown here may be known to another host."""
        if not transition.is_group and transition.state not in self._wanted:
            return None
        try:
            accepted = self.store.accepted(transition.job_id)
            if transition.is_group:
                return self._group_delivery(accepted, transition)
            events = self._events(accepted)
            if transition.state not in events and not (events and transitions.is_claim(transition)):
                return None
            job = self.store.get(transition.job_id, accepted.tenant)
        except (UnknownJob, msgspec.ValidationError, UnicodeDecodeError) as exc:
            _log.info("webhook.event_without_record", job_id=transition.job_id, error=type(exc).__name__)
            return None
        seen = transitions.verified(transition, job)
        if seen is None or seen.state not in events:
            return None
        return Delivery(
            delivery_id=seen.delivery_id,
            endpoint=accepted.callback,
            job_id=seen.job_id,
            tenant=accepted.tenant,
            state=seen.state,
            body=event_body(seen.delivery_id, transitions.as_seen(job, seen), seen.at),
            created_at=time.time(),
        )

    def _group_delivery(self, accepted: AnyJob, transition: Transition) -> Delivery | None:
        """The delivery of the end of a group, to the endpoint that its last job names for that."""
        endpoint = self._endpoints.get(accepted.group_callback)
        if not accepted.group_callback or (endpoint and not endpoint.is_for(accepted.tenant)):
            return None
        found = groups.ended(self.store, accepted, transition)
        if found is None:
            return None
        event_id, group, body = found
        return Delivery(
            delivery_id=event_id,
            endpoint=accepted.group_callback,
            job_id=transition.job_id,
            tenant=accepted.tenant,
            state="failed" if group.failed else "succeeded",
            body=body,
            created_at=time.time(),
        )

    def _events(self, accepted: JobSpec) -> frozenset[str]:
        """The states that the job's endpoint is told; none without an endpoint that its tenant may use.

        Nor of a record that was put back into Redis after its time.
        """
        if not accepted.callback or accepted.parent or not self.store.is_kept(accepted):
            return frozenset()
        endpoint = self._endpoints.get(accepted.callback)
        if endpoint is None:
            return wire.ENDED
        return endpoint.events if endpoint.is_for(accepted.tenant) else frozenset()

    def _look_through(self, cursor: bytes) -> None:
        """Jobs that ended after the event at the cursor, newest first, since old ones may expire."""
        since = int(cursor.partition(b"-")[0]) / 1000
        start = 0
        while ids := cast("list[bytes]", self._redis.zrevrange(_ENDED, start, start + _BATCH - 1)):
            seen = [self._of_record(raw.decode(errors="replace")) for raw in ids]
            self._put(cursor, cursor, [found for found in seen if found and found.at >= since])
            start += len(ids)

    def _of_record(self, job_id: str) -> Transition | None:
        names = ("state", "generation", "fence", "attempt", "error", "ended_at")
        found = cast("list[bytes | None]", self._redis.hmget(job_key(job_id), *names))
        state, generation, fence, attempt, code, at = [
            (value or b"").decode(errors="replace") for value in found
        ]
        return transitions.read(
            job_id=job_id,
            state=state,
            generation=f"g{generation}" if generation else fence or "0",
            attempt=attempt or "0",
            code=code,
            at=at,
        )

    # -- out -----------------------------------------------------------------------------------------

    def endpoints(self) -> list[str]:
        """Names that deliveries have borne, with or without a section in the settings."""
        return sorted(
            raw.decode(errors="replace") for raw in cast("set[bytes]", self._redis.smembers(_ENDPOINTS))
        )

    def due(self, endpoint: str, limit: int) -> list[Delivery]:
        """The first deliveries to this endpoint whose time has come. What is not ours is removed."""
        ids = cast(
            "list[bytes]",
            self._redis.zrangebyscore(_due(endpoint), 0, time.time(), start=0, num=limit),
        )
        entries = cast("list[bytes | None]", self._redis.hmget(_ENTRIES, ids)) if ids else []
        found: list[Delivery] = []
        for delivery_id, entry in zip(ids, entries, strict=True):
            delivery = self._opened(entry or b"")
            if delivery and (delivery.delivery_id.encode(), delivery.endpoint) == (delivery_id, endpoint):
                found.append(delivery)
            else:
                self._forget(endpoint, delivery_id)
                _log.warning("webhook.entry_refused", endpoint=endpoint)
        return found

    def remove(self, delivery: Delivery) -> None:
        """Remove a delivery that succeeded or is no longer wanted."""
        self._forget(delivery.endpoint, delivery.delivery_id.encode())

    def put_off(self, delivery: Delivery) -> float | None:
        """Count a failed attempt: seconds until the next one, or None if that was the last.

        It is the last after 20 attempts, or 24 hours; the delivery then moves to the dead list.
        """
        now = time.time()
        failed = msgspec.structs.replace(delivery, attempts=delivery.attempts + 1)
        if failed.attempts >= MOST_ATTEMPTS or now - failed.created_at >= GIVE_UP_S:
            with self._redis.pipeline() as pipe:
                pipe.lpush(_DEAD, self._signed(failed))
                pipe.ltrim(_DEAD, 0, _DEAD_KEPT - 1)
                self._forget(failed.endpoint, failed.delivery_id.encode(), pipe)
            return None
        delay = delay_s(failed.attempts)
        self.store.script("put_off")(
            [_ENTRIES, _due(failed.endpoint)], [failed.delivery_id, self._signed(failed), now + delay]
        )
        return delay

    def is_stale(self, delivery: Delivery) -> bool:
        """True if all attempts, and an outage as long as records are kept, are over: others put it back."""
        return time.time() > delivery.created_at + GIVE_UP_S + self.store.rules.keep_record_s

    def size(self) -> int:
        """Deliveries that wait."""
        return int(self._redis.hlen(_ENTRIES))

    def dead(self) -> list[Delivery]:
        """Deliveries that were given up, newest first."""
        raw = cast("list[bytes]", self._redis.lrange(_DEAD, 0, -1))
        return [delivery for delivery in map(self._opened, raw) if delivery]

    def resend(self, delivery: Delivery) -> bool:
        """Send one that was given up again, under the same id and with all its attempts; False if it is gone.

        ``delivery`` is one of ``dead``.
        """
        now = time.time()
        again = msgspec.structs.replace(delivery, attempts=0, created_at=now)
        found = self.store.script("resend")(
            [_DEAD, _ENTRIES, _due(delivery.endpoint), _ENDPOINTS],
            [self._signed(delivery), delivery.delivery_id, self._signed(again), delivery.endpoint, now],
        )
        return found == [b"sent"]

    def _forget(self, endpoint: str, delivery_id: bytes, pipe: "redis.client.Pipeline | None" = None) -> None:
        with pipe or self._redis.pipeline() as changes:
            changes.hdel(_ENTRIES, delivery_id)
            changes.zrem(_due(endpoint), delivery_id)
            changes.execute()

    def _signed(self, delivery: Delivery) -> bytes:
        body = msgspec.msgpack.encode(delivery)
        return self.store.record_key.digest(_LABEL, body) + body

    def _opened(self, entry: bytes) -> Delivery | None:
        tag, body = entry[:_TAG_BYTES], entry[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self.store.record_key.digest(_LABEL, body)):
            return None
        return msgspec.msgpack.decode(body, type=Delivery)


def _due(endpoint: str) -> str:
    return f"kms:webhooks:due:{endpoint}"
