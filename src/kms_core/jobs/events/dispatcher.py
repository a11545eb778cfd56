"""Webhook dispatcher: a thread of the worker's parent. A lock lets one process deliver at a time.

Requests run in a small pool and touch only the network. All else (Redis, metrics, logs) happens in the one
thread, round by round, and between forks.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Final

import structlog

from kms_core.jobs.events import webhook
from kms_core.jobs.events.outbox import Delivery, Outbox
from kms_core.jobs.events.webhook import DeliveryOutcome, WebhookEndpoint
from kms_core.observability import metrics
from kms_core.periodic import PeriodicThread
from kms_protocol.errors import DurabilityUnconfirmed

EVERY_S: Final = 0.5
PER_ENDPOINT: Final = 4  # requests at a time: a slow receiver must not hold up the others
_MOST_THREADS: Final = 32
_LOCK_S: Final = 5.0
_log = structlog.get_logger(__name__)


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
        wait(self._in_hand, webhook.TOTAL_S)  # without the fork lock: a receiver may be slow
        self.attempt(self.round)

    def round(self) -> None:
        """Settle what was answered; with the lock, send what is due."""
        for future in [future for future in self._in_hand if future.done()]:
            if not future.cancelled():
                self._settle(self._in_hand[future], _outcome(future))
            del self._in_hand[future]
        if self.stopping or not self._outbox.store.lock("courier", self._owner, _LOCK_S):
            return
        with suppress(DurabilityUnconfirmed):
            for name in self._outbox.endpoints():
                self._send_due(name)
        metrics.WEBHOOK_OUTBOX.set(self._outbox.size())

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
        if not endpoint.is_for(delivery.tenant):
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
