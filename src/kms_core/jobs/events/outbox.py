"""The outbox: events of jobs that are still to be delivered, in Redis.

The script that moves a job adds the event to ``kms:webhooks:due:<endpoint>``, a sorted set by when to send,
if the job names an endpoint in ``callback``. So no killed process loses an event. An entry is one of two:

- the event as the script wrote it, until it is first sent. Its delivery is made of the job's verified record
  (``transitions.confirmed``), whose sealed part names the endpoint;
- a sealed ``Delivery``, after a failed attempt: later ones have the same body, and do not need the record.

An entry leaves the set once it was answered. If a process dies before that, another one sends it again under
the same id. That of an end is made of job, generation and state: it is the same if the job ends again after
Redis has gone back in time. Write access to Redis can repeat a delivery until it is stale, and announce other
states, but cannot forge ``succeeded``.

Also below ``kms:webhooks:``: ``endpoints`` (those named in entries), and ``given_up``, the newest deliveries
that were given up, sealed, by when that was.
"""

import time
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Final, cast

import msgspec
import structlog

from kms_core.backoff import jittered_wait_s
from kms_core.jobs.events import transitions, webhook
from kms_core.jobs.events.webhook import DeliveryOutcome, WebhookEndpoint, WebhookRequest
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_protocol import wire
from kms_protocol.errors import DurabilityUnconfirmed, UnknownJob

MOST_ATTEMPTS: Final = 20
GIVE_UP_S: Final = 24 * 3600.0
FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 15 * 60.0
_ENDPOINTS: Final = "kms:webhooks:endpoints"
_GIVEN_UP: Final = "kms:webhooks:given_up"
_GIVEN_UP_KEPT: Final = 1000
_EVENT: Final = b"["  # how an event in JSON begins, and no sealed delivery
_INFO: Final = b"kms-service/webhook-delivery/1"
EVERY_S: Final = 0.5
PER_ENDPOINT: Final = 4  # requests at a time: a slow receiver must not hold up the others
_MOST_THREADS: Final = 32
_LOCK_S: Final = 5.0
_log = structlog.get_logger(__name__)


class Delivery(WebhookRequest, frozen=True, kw_only=True):
    """An event to send, its endpoint and its failed attempts. Times are seconds since the epoch.

    ``entry`` is what stands for it in Redis.
    """

    endpoint: str
    tenant: str
    state: wire.JobState
    created_at: float
    attempts: int = 0
    entry: bytes = b""


def delay_s(attempts: int) -> float:
    """Seconds to wait after so many attempts: doubling from 1 s to 15 min, the upper half at random."""
    return jittered_wait_s(FIRST_DELAY_S, attempts, at_most_s=LONGEST_DELAY_S)


class Outbox:
    """Sends what is due, and settles what was answered.

    Everything here raises JobsUnavailable or redis.RedisError when Redis is gone.
    """

    def __init__(self, store: JobStore, endpoints: Mapping[str, WebhookEndpoint]) -> None:
        self.store = store
        self._redis = store.redis
        self._endpoints = endpoints

    def endpoints(self) -> list[str]:
        """Names that entries have borne, with or without a section in the settings."""
        names = cast("set[bytes]", self._redis.smembers(_ENDPOINTS))
        return sorted(raw.decode(errors="replace") for raw in names)

    def due(self, endpoint: str, limit: int, under_way: Collection[bytes] = ()) -> list[Delivery]:
        """The first deliveries to this endpoint whose time has come, without entries that are under way.

        What is not to be sent is removed. Raises DurabilityUnconfirmed while a fail-over may take one back.
        """
        key, now = _due(endpoint), self.store.ask_clock()
        seen, found = set(under_way), list[Delivery]()
        while free := limit - len(found):
            first = self._redis.zrangebyscore(key, 0, now, start=0, num=len(seen) + free)
            entries = [entry for entry in cast("list[bytes]", first) if entry not in seen][:free]
            if not entries:
                break
            read = [self.delivery(endpoint, entry) for entry in entries]
            if refused := [entry for entry, each in zip(entries, read, strict=True) if each is None]:
                self._redis.zrem(key, *refused)
            found += filter(None, read)
            seen.update(entries)
        if found:
            self.store.confirm()
        return found

    def delivery(self, name: str, entry: bytes) -> Delivery | None:
        """The delivery of an entry to the endpoint of this name; None if nothing is to be sent."""
        is_event = entry.startswith(_EVENT)
        found = self._of_event(name, entry) if is_event else self._opened(entry)
        if found and found.endpoint == name:
            return found
        if not is_event:
            _log.warning("webhook.entry_refused", endpoint=name)
        return None

    def _of_event(self, name: str, entry: bytes) -> Delivery | None:
        """The delivery of an event, to the endpoint that the sealed record names; None for other states."""
        wanted = self._endpoints[name].section.events if name in self._endpoints else wire.ENDED
        seen = transitions.of_entry(entry)
        if seen is None or not (seen.is_group or seen.is_claim or seen.state in wanted):
            return None
        try:
            event = transitions.confirmed(self.store, seen)
        except UnknownJob:
            _log.info("webhook.event_without_record", job_id=seen.job_id)
            return None
        if event is None or not (seen.is_group or event.state in wanted):
            return None
        accepted = event.job.accepted
        if accepted is None or not self.store.is_kept(accepted):  # it was put back after its time
            return None
        return Delivery(
            delivery_id=event.event_id,
            endpoint=accepted.group_callback if seen.is_group else accepted.callback,
            job_id=seen.job_id,
            tenant=accepted.tenant,
            state=event.state,
            body=event.body,
            created_at=time.time(),
            entry=entry,
        )

    def remove(self, delivery: Delivery) -> None:
        """Remove a delivery that succeeded or is no longer wanted."""
        self._redis.zrem(_due(delivery.endpoint), delivery.entry)

    def put_off(self, delivery: Delivery) -> float | None:
        """Count a failed attempt: seconds until the next one, or None if that was the last.

        It is the last after 20 attempts, or 24 hours; the delivery is then one of ``dead``.
        """
        now, due = self.store.now(), _due(delivery.endpoint)
        failed = msgspec.structs.replace(delivery, attempts=delivery.attempts + 1)
        if failed.attempts >= MOST_ATTEMPTS or time.time() - failed.created_at >= GIVE_UP_S:
            self._move(failed, due, _GIVEN_UP, now)
            self._redis.zremrangebyrank(_GIVEN_UP, 0, -_GIVEN_UP_KEPT - 1)
            return None
        delay = delay_s(failed.attempts)
        self._move(failed, due, due, now + delay)
        return delay

    def is_stale(self, delivery: Delivery) -> bool:
        """True if all attempts, and an outage as long as records are kept, are over: others put it back."""
        return time.time() > delivery.created_at + GIVE_UP_S + self.store.rules.result_ttl_s

    def waiting(self) -> Counter[str]:
        """The number of deliveries that wait, for each of ``endpoints``."""
        pipeline, names = self._redis.pipeline(transaction=False), self.endpoints()
        for name in names:
            pipeline.zcard(_due(name))
        return Counter(dict(zip(names, pipeline.execute(), strict=True)))

    def dead(self) -> list[Delivery]:
        """Deliveries that were given up, newest first."""
        entries = cast("list[bytes]", self._redis.zrevrange(_GIVEN_UP, 0, -1))
        return list(filter(None, map(self._opened, entries)))

    def resend(self, delivery: Delivery) -> bool:
        """Send one that was given up again, under the same id and with all its attempts; False if it is gone.

        ``delivery`` is one of ``dead``.
        """
        again = msgspec.structs.replace(delivery, attempts=0, created_at=time.time())
        return self._move(again, _GIVEN_UP, _due(delivery.endpoint), self.store.now())

    def _move(self, delivery: Delivery, source: str, target: str, at: float) -> bool:
        """Put a delivery as it is now in the place of its entry; False if that was settled before."""
        plain = msgspec.msgpack.encode(msgspec.structs.replace(delivery, entry=b""))
        sealed = self.store.record_key.seal_as(_INFO, b"", plain)
        moved = self.store.scripts["move_delivery"]([source, target], [delivery.entry, sealed, at])
        return moved == [b"moved"]

    def _opened(self, entry: bytes) -> Delivery | None:
        plain = self.store.record_key.open_as(_INFO, b"", entry)
        if plain is None:
            return None
        return msgspec.structs.replace(msgspec.msgpack.decode(plain, type=Delivery), entry=entry)


def _due(endpoint: str) -> str:
    return f"kms:webhooks:due:{endpoint}"


# Webhook dispatcher: a thread of the maintenance process. A lock lets one process deliver at a time.
#
# Requests run in a small pool and touch only the network. All else (Redis, metrics, logs) happens in the
# one thread, round by round.


class WebhookDispatcher(PeriodicThread):
    """One round every half second, and whenever an answer has come."""

    def __init__(self, outbox: Outbox, endpoints: Mapping[str, WebhookEndpoint], name: str) -> None:
        super().__init__("webhooks", EVERY_S, failed="courier.round_failed")
        self._outbox = outbox
        self._endpoints = endpoints
        self._owner = name
        threads = min(_MOST_THREADS, PER_ENDPOINT * (len(endpoints) + 1))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="webhook")
        self._in_hand: dict[Future[DeliveryOutcome], Delivery] = {}

    def run(self) -> None:
        super().run()
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait(self._in_hand, webhook.TOTAL_S)
        self.attempt(self.round)

    def round(self) -> None:
        """Settle what was answered; with the lock, send what is due."""
        for future in [future for future in self._in_hand if future.done()]:
            if not future.cancelled():
                self._settle(self._in_hand[future], _outcome(future))
            del self._in_hand[future]
        if self.stopping or not self._outbox.store.lock("courier", self._owner, _LOCK_S):
            return
        waiting = self._outbox.waiting()
        metrics.WEBHOOK_OUTBOX.set(waiting.total())
        with suppress(DurabilityUnconfirmed):
            for name in +waiting:  # those with a count above 0
                self._send_due(name)

    def _send_due(self, name: str) -> None:
        under_way = {held.entry for held in self._in_hand.values() if held.endpoint == name}
        for delivery in self._outbox.due(name, PER_ENDPOINT - len(under_way), under_way):
            future = self._pool.submit(self._send, delivery)
            self._in_hand[future] = delivery
            future.add_done_callback(lambda _: self.wake())

    def _send(self, delivery: Delivery) -> DeliveryOutcome:
        """In a thread of the pool. An endpoint without a section may get one: until then it has failed."""
        if self._outbox.is_stale(delivery):
            return DeliveryOutcome("failed", "expired")
        endpoint = self._endpoints.get(delivery.endpoint)
        if endpoint is None:
            return DeliveryOutcome("failed", "unknown_endpoint")
        if not endpoint.section.is_for(delivery.tenant):
            return DeliveryOutcome("gone", "tenant_refused")
        return webhook.post(endpoint, delivery)

    def _settle(self, delivery: Delivery, outcome: DeliveryOutcome) -> None:
        log = _log.bind(
            endpoint=delivery.endpoint,
            delivery_id=delivery.delivery_id,
            job_id=delivery.job_id,
            state=delivery.state,
            attempt=delivery.attempts + 1,
        )
        result: str = outcome.result
        if outcome.result == "failed":
            delay = self._outbox.put_off(delivery)
            result = "dead" if delay is None else "retried"
            log.warning(
                "webhook.failed", result=result, reason=outcome.reason, delay_s=round(delay or 0.0, 1)
            )
        else:
            self._outbox.remove(delivery)
            log.info("webhook.settled", result=result, reason=outcome.reason)
        label = delivery.endpoint if delivery.endpoint in self._endpoints else "unknown"
        metrics.WEBHOOK_DELIVERIES.labels(label, result).inc()


def _outcome(future: Future[DeliveryOutcome]) -> DeliveryOutcome:
    failed = future.exception()
    return DeliveryOutcome("failed", type(failed).__name__) if failed else future.result()
