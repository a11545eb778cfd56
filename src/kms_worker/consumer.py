"""Celery's consumer, which hands over checked messages only; all others are acknowledged and dropped.

Celery 5.7 as it is ends on a message whose body is JSON and not a task, and puts it back before: each restart
ends the same way.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import structlog
from celery.worker import consumer as celery_consumer
from celery.worker import state
from kombu import compression
from kombu.exceptions import OperationalError
from kombu.transport import redis
from kombu.transport.pyamqp import amqp  # type: ignore[attr-defined]  # the one that kombu uses

from kms_core.jobs.execution import attendance
from kms_core.jobs.store.wake_up import TASK as RUN
from kms_worker import messages
from kms_worker.messages import Malformed, Reason
from kms_worker.refusals import LogBound, Refusals
from kms_worker.rotation import TASK as KEYS
from kms_worker.submit import QUEUE as SUBMIT_QUEUE
from kms_worker.submit import TASK as SUBMIT


class AcknowledgingQoS(redis.QoS):
    """kombu's record of messages in hand, which acknowledges only those that Redis has a note of.

    Redis has none of wake-ups. The message of a connection that was lost is given out again: kombu raises
    AttributeError when it is acknowledged, which ends a worker.
    """

    def ack(self, delivery_tag: str) -> None:
        if self._is_noted(delivery_tag):
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]  # kombu ships no types

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if self._is_noted(delivery_tag):
            super().reject(delivery_tag, requeue)  # type: ignore[no-untyped-call]  # as above

    def _is_noted(self, tag: str) -> bool:
        return tag in self._delivered and self.channel.connection is not None


def install() -> None:
    """Have kombu, in this process, acknowledge so, and fail at every message that is marked as compressed."""
    redis.Channel.QoS = AcknowledgingQoS
    registry: Any = compression  # kombu ships no types
    for name in registry.encoders():
        registry.register(registry.get_encoder(name)[0], _no_decoder, name)


def _no_decoder(_body: object) -> bytes:
    raise Malformed("compressed")


Handler = Callable[[Any], object]
_DIFFERS_S: Final = 5.0
_SHOWN_CHARS: Final = 200
_CALLS: Final = frozenset({amqp.spec.Exchange.Declare, amqp.spec.Queue.Declare, amqp.spec.Basic.Consume})
"""By which the worker begins with a queue."""
_log = structlog.get_logger(__name__)


class CheckedConsumer(celery_consumer.Consumer):  # type: ignore[misc]  # Celery ships no types
    """The consumer of a worker."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 -- Celery's own
        refusals: Refusals,
        submit_bytes: int,
        **options: Any,  # noqa: ANN401 -- as above
    ) -> None:
        """``submit_bytes`` bounds the argument of kms.submit."""
        self._refusals, self._submit_bytes = refusals, submit_bytes
        self._bound = LogBound()
        super().__init__(*args, **options)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Log a queue or exchange that is not as it should be, and wait: Celery tries again at once."""
        super().on_connection_error_after_connected(exc)
        if isinstance(exc, amqp.exceptions.AMQPError) and exc.method_sig in _CALLS:
            _log.error(
                "broker.queue_differs",
                error=str(exc.reply_text)[:_SHOWN_CHARS],
                hint="delete the queue or exchange, or set broker_queue_type (docs/celery.md)",
            )
            time.sleep(_DIFFERS_S)

    def create_task_handler(self, *args: Any, **options: Any) -> Handler:  # noqa: ANN401 -- as above
        """Return the function that Celery calls with each message."""
        handle: Handler = super().create_task_handler(*args, **options)

        def checked(message: Any) -> None:  # noqa: ANN401 -- as above
            try:
                accepted = self._accepted(message)
            except Malformed as exc:
                self._drop(message, exc.reason)
                return
            if accepted:
                self._hand_over(message, handle)

        return checked

    def on_decode_error(self, message: Any, exc: Exception) -> None:  # noqa: ANN401 -- as above
        """Drop what kombu could not make a message of, or was asked to decompress."""
        del exc
        headers = getattr(message, "headers", None)
        compressed = isinstance(headers, Mapping) and bool(headers.get("compression"))
        self._drop(message, "compressed" if compressed else "content_type")

    def _accepted(self, message: Any) -> bool:  # noqa: ANN401 -- as above
        """True if to hand ``message`` over, of which only the checked part is left. Raises Malformed."""
        queue = _queue(message)
        if len(message.body or b"") > messages.most_bytes(queue, self._submit_bytes):
            raise Malformed("too_large")
        redelivered = bool((message.delivery_info or {}).get("redelivered"))
        content = (message.content_type, message.content_encoding)
        found = messages.read(queue, message.headers, content, message.body, redelivered=redelivered)
        if found.task == SUBMIT:
            messages.check_sealed(found)
        if found.task == RUN and self._is_sated():
            if not found.resends:
                with suppress(OperationalError, *self.connection_errors, *self.channel_errors):
                    self._send_copy(message, queue, found.headers() | {"resends": 1})
            return False
        message.headers, message.body = found.headers(), found.body()
        message.properties = {"priority": (message.properties or {}).get("priority")}
        if found.task != RUN:
            attendance.want()
        if redelivered and found.task in {SUBMIT, KEYS}:
            return self._came_back(message, found)
        return True

    def _is_sated(self) -> bool:
        """Return whether a wake-up waits for each process; a further one is dropped.

        One for each does, as each drains all queues of the worker; another worker may have an idle one, so
        the first that is sated sends a copy. Nothing is acknowledged, so the broker would send any number
        into memory.
        """
        held = sum(request.name == RUN for request in state.reserved_requests)
        return bool(held >= self.pool.num_processes)

    def _came_back(self, message: Any, found: messages.CeleryMessage) -> bool:  # noqa: ANN401 -- as above
        """Send a copy that counts one more; of ``kms.keys`` another comes within a minute."""
        if found.resends >= messages.MOST_RESENDS or found.task == KEYS:
            raise Malformed("worker_died")
        if count := self._bound.passes():
            _log.warning("message.came_back", queue=SUBMIT_QUEUE, resends=found.resends, count=count)
        self._send_copy(message, SUBMIT_QUEUE, message.headers)
        message.ack()
        return False

    def _send_copy(self, message: Any, queue: str, headers: Mapping[str, object]) -> None:  # noqa: ANN401 -- as above
        with self.app.producer_or_acquire() as producer:
            producer.publish(
                message.body,
                exchange="",
                routing_key=queue,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                headers=headers,
            )

    def _hand_over(self, message: Any, handle: Handler) -> None:  # noqa: ANN401 -- as above
        try:
            handle(message)
        except Exception as exc:
            lost = isinstance(exc, (*self.connection_errors, *self.channel_errors))
            if lost and not isinstance(exc, KeyError):  # which kombu counts among them
                raise
            self._drop(message, "crashed")

    def _drop(self, message: Any, reason: Reason) -> None:  # noqa: ANN401 -- as above
        task_id = message.headers.get("id") if isinstance(message.headers, Mapping) else ""
        event = "submit.refused" if reason in {"invalid_request", "not_a_ciphertext"} else "message.refused"
        self._refusals.refuse(_queue(message), reason, task_id, event)
        if not message.acknowledged:
            message.ack()


def _queue(message: Any) -> str:  # noqa: ANN401 -- as above
    """The queue of ``message``, one of a bounded set."""
    found = (message.delivery_info or {}).get("routing_key")
    return found if isinstance(found, str) and found in messages.TASKS else "other"
