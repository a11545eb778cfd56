"""The outbox: which events of jobs are still to be delivered, in Redis; knows no HTTP and no thread.

Each transition of a job is one record of the stream ``kms:events``, written by the script that moves the job.
``take_in`` reads on from a cursor, and one script stores the deliveries and moves the cursor, if that still
stands where it was read. So whoever is killed, nothing is lost:

- before the script: the events are read again;
- after it: the delivery stays in the outbox until ``remove``, whoever sends it;
- between the answer and ``remove``: it is sent again, under the same id, which job, fence and state give.

Where the stream was cut behind the cursor (no courier ran while 100,000 events passed), the records of ended
jobs are looked through for what was missed. Which endpoint, and that there is one, the sealed record says; an
entry rests behind a MAC. An event that needs a proof (``ends.needs_proof``) is told as the signed end of the
job has it, as ``failed`` with ``record_refused`` where the record claims an end that is not proven, and not
at all while the job has not ended. So a writer to Redis can repeat a delivery until it is stale, and have
other states told, but cannot make up a ``succeeded``.

Keys below ``kms:webhooks:``: ``cursor``, ``entries`` (a hash by delivery id), ``due:<endpoint>`` (delivery
ids by when to send), ``endpoints`` (those named in entries), ``dead`` (the newest that were given up).
"""

import hmac
import random
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Annotated, Final, cast

import msgspec
import redis
import structlog
from msgspec import Meta

from kms_core.jobs.ends import needs_proof
from kms_core.jobs.events.webhook import WebhookEndpoint, WebhookRequest, event_body
from kms_core.jobs.model import REFUSED, Job, JobSpec
from kms_core.jobs.store.redis_keys import job_key, record_errors
from kms_core.jobs.store.store import JobStore
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
_STREAM_ID: Final = re.compile(rb"([0-9]{1,20})-([0-9]{1,20})")
_TAG_BYTES: Final = 32
_LABEL: Final = b"webhook-delivery"
_IDS: Final = uuid.UUID("0b3f4c1e-7f0e-5d51-9d0e-6b6d73686f6b")  # a namespace of our own (RFC 9562 §5.5)
_log = structlog.get_logger(__name__)

_TAKE_IN: Final = """
-- KEYS: cursor, entries, endpoints
-- ARGV: cursor as read, cursor as moved, then of each delivery: id, entry, due list, endpoint, when
if (redis.call('GET', KEYS[1]) or '0-0') ~= ARGV[1] then return end
for i = 3, #ARGV, 5 do
  if redis.call('HEXISTS', KEYS[2], ARGV[i]) == 0 then  -- the entry last: where a key is of a wrong type,
    redis.call('SADD', KEYS[3], ARGV[i + 3])            -- the delivery is taken in when that has gone
    redis.call('ZADD', ARGV[i + 2], ARGV[i + 4], ARGV[i])
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  end
end
redis.call('SET', KEYS[1], ARGV[2])
"""
_RESEND: Final = """
-- KEYS: dead, entries, due, endpoints   ARGV: the entry as it lies, delivery id, entry, endpoint, when
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[5], ARGV[2])
redis.call('SADD', KEYS[4], ARGV[4])
return 1
"""
_PUT_OFF: Final = """
-- KEYS: entries, due   ARGV: delivery id, entry, when
-- Only if nobody has settled it meanwhile: an entry that is not due would stay forever.
if redis.call('ZSCORE', KEYS[2], ARGV[1]) then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
end
"""


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a job, as the stream or the job's record tells it."""

    job_id: str
    state: wire.JobState
    fence: int
    attempt: int
    code: str
    at: Annotated[float, Meta(ge=0, lt=1e11)]

    @property
    def delivery_id(self) -> str:
        """A job reaches a state once under one fence, so this names the event, however often it is read."""
        return str(uuid.uuid5(_IDS, f"{self.job_id}/{self.fence}/{self.state}"))


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be sent where, and how often that failed. Times are seconds since the epoch."""

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
    longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** (attempts - 1))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 -- jitter, no secret


class Outbox:
    """Takes in events, tells what is due, settles what was answered.

    Everything here raises JobsUnavailable or redis.RedisError when Redis is gone.
    """

    def __init__(self, store: JobStore, endpoints: Mapping[str, WebhookEndpoint]) -> None:
        self.store = store
        self._redis = store.redis
        self._endpoints = endpoints
        self._wanted = wire.ENDED.union(*(endpoint.events for endpoint in endpoints.values()))
        self._take_in = store.redis.register_script(_TAKE_IN)
        self._put_off = store.redis.register_script(_PUT_OFF)
        self._resend = store.redis.register_script(_RESEND)

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
            self._put(cursor, batch[-1][0], [_of_event(fields) for _, fields in batch])
        return full

    def _cursor(self) -> bytes:
        """Where to read on; the start, if what stands there is no id of a stream."""
        cursor = cast("bytes | None", self._redis.get(_CURSOR))
        if cursor is not None and _place(cursor) is None:
            self._redis.delete(_CURSOR)
            _log.warning("webhook.cursor_refused")
            return _START
        return cursor or _START

    def _is_beyond(self, cursor: bytes) -> bool:
        """Whether all events come before it. Of an empty stream nobody knows."""
        last = cast("list[tuple[bytes, object]]", self._redis.xrevrange(_EVENTS, count=1))
        return bool(last) and (_place(cursor) or (0, 0)) > (_place(last[0][0]) or (0, 0))

    def mend(self) -> None:
        """Delete the keys whose values are of a type that nobody here wrote: all that use them would fail."""
        ours = self._redis
        self.store.drop_wrong(ours.get, _CURSOR)
        self.store.drop_wrong(ours.hlen, _ENTRIES)
        self.store.drop_wrong(ours.scard, _ENDPOINTS)
        self.store.drop_wrong(ours.llen, _DEAD)
        self.store.drop_wrong(ours.xlen, _EVENTS)
        self.store.drop_wrong(ours.zcard, _ENDED)
        for name in {*self._endpoints, *self.endpoints()}:
            self.store.drop_wrong(ours.zcard, _due(name))

    def _put(self, cursor: bytes, moved: bytes, seen: Iterable[Transition | None]) -> None:
        """Store what follows from these transitions and move the cursor, unless somebody else moved it."""
        found = (self._delivery(transition) for transition in seen if transition)
        flat = [
            argument
            for delivery in found
            if delivery
            for argument in (
                delivery.delivery_id,
                self._signed(delivery),
                _due(delivery.endpoint),
                delivery.endpoint,
                delivery.created_at,
            )
        ]
        self._take_in([_CURSOR, _ENTRIES, _ENDPOINTS], [cursor, moved, *flat])

    def _delivery(self, transition: Transition) -> Delivery | None:
        """What the sealed record asks to be sent; an endpoint that is not known here may be elsewhere."""
        if transition.state not in self._wanted:
            return None
        try:
            accepted = self.store.accepted(transition.job_id)
            events = self._events(accepted)
            if transition.state not in events and not (events and _is_claim(transition)):
                return None
            job = self.store.get(transition.job_id, accepted.tenant)
        except (UnknownJob, msgspec.ValidationError, UnicodeDecodeError) as exc:
            _log.info("webhook.event_without_record", job_id=transition.job_id, error=type(exc).__name__)
            return None
        seen = _verified(transition, job)
        if seen is None or seen.state not in events:
            return None
        return Delivery(
            delivery_id=seen.delivery_id,
            endpoint=accepted.callback,
            job_id=seen.job_id,
            tenant=accepted.tenant,
            state=seen.state,
            body=event_body(seen.delivery_id, _as_seen(job, seen), seen.at),
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
        """Jobs that ended after the event at the cursor; from the newest on, since old ones go meanwhile."""
        since = int(cursor.partition(b"-")[0]) / 1000
        start = 0
        while ids := cast("list[bytes]", self._redis.zrevrange(_ENDED, start, start + _BATCH - 1)):
            seen = [self._of_record(raw.decode(errors="replace")) for raw in ids]
            self._put(cursor, cursor, [found for found in seen if found and found.at >= since])
            start += len(ids)

    def _of_record(self, job_id: str) -> Transition | None:
        names = ("state", "fence", "attempt", "error", "ended_at")
        try:
            with record_errors():
                found = cast("list[bytes | None]", self._redis.hmget(job_key(job_id), *names))
        except UnknownJob:
            return None
        state, fence, attempt, code, at = [(value or b"").decode(errors="replace") for value in found]
        return _transition(
            job_id=job_id, state=state, fence=fence or "0", attempt=attempt or "0", code=code, at=at
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
        """It is delivered, or nobody wants it."""
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
        self._put_off(
            [_ENTRIES, _due(failed.endpoint)], [failed.delivery_id, self._signed(failed), now + delay]
        )
        return delay

    def is_stale(self, delivery: Delivery) -> bool:
        """Whether all attempts, and an outage as long as records are kept, are over: others put it back."""
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
        found = self._resend(
            [_DEAD, _ENTRIES, _due(delivery.endpoint), _ENDPOINTS],
            [self._signed(delivery), delivery.delivery_id, self._signed(again), delivery.endpoint, now],
        )
        return bool(found)

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


def _place(raw: bytes) -> tuple[int, int] | None:
    """An id of a stream, to be compared; None for what is none."""
    found = _STREAM_ID.fullmatch(raw)
    if not found or max(place := (int(found[1]), int(found[2]))) >= 2**64:
        return None
    return place


def _due(endpoint: str) -> str:
    return f"kms:webhooks:due:{endpoint}"


def _of_event(fields: Mapping[bytes, bytes]) -> Transition | None:
    """A record of the stream; None, and a line in the log, if a script of ours did not write it."""
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    job_id = text.get("subject", "")
    return _transition(
        job_id=job_id,
        state=text.get("type", "").removeprefix("kms.job."),
        fence=text.get("id", "").removeprefix(f"{job_id}.").partition(".")[0],
        attempt=text.get("attempt", ""),
        code=text.get("code", ""),
        at=text.get("time", ""),
    )


def _transition(**fields: str) -> Transition | None:
    try:
        return msgspec.convert(fields, Transition, strict=False)
    except msgspec.ValidationError:
        _log.warning("webhook.event_unreadable", job_id=fields["job_id"])
        return None


def _is_claim(transition: Transition) -> bool:
    return needs_proof(transition.state, transition.code)


def _verified(transition: Transition, job: Job) -> Transition | None:
    """An event as it is told; None for an end that the record of the job does not have."""
    if not _is_claim(transition):
        return transition
    refused = job.ended and job.error == REFUSED
    if not refused and (job.state, job.error) != (transition.state, transition.code):
        _log.warning("webhook.event_refused", job_id=transition.job_id, state=transition.state)
        return None
    return msgspec.structs.replace(
        transition, state=job.state, code=job.error, fence=job.fence, attempt=job.attempt
    )


def _as_seen(job: Job, transition: Transition) -> Job:
    """The job as it was at the transition; it may have moved on. Other codes than an end's are no errors."""
    code = transition.code if transition.state in wire.ENDED else ""
    return msgspec.structs.replace(job, state=transition.state, attempt=transition.attempt, error=code)
