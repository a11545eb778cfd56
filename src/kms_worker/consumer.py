"""Celery's consumer, which hands over checked messages only; all others are acknowledged and dropped.

Celery 5.7 as it is ends on a message whose body is JSON and not a task, and puts it back before: each restart
ends the same way. Messages from Redis have passed ``kms_worker.elements`` before they get here.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
import structlog
from celery.worker import consumer as celery_consumer
from kombu import compression
from kombu.exceptions import ContentDisallowed

from kms_worker import elements, messages
from kms_worker.elements import Checks
from kms_worker.messages import Malformed, Reason
from kms_worker.refusals import LogBound
from kms_worker.rotation import TASK as KEYS
from kms_worker.submit import QUEUE as SUBMIT_QUEUE
from kms_worker.submit import TASK as SUBMIT

Handler = Callable[[Any], object]
_log = structlog.get_logger(__name__)


class CheckedConsumer(celery_consumer.Consumer):  # type: ignore[misc]  # Celery ships no types
    """The consumer of a worker."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 -- Celery's own
        checks: Checks,
        **options: Any,  # noqa: ANN401 -- as above
    ) -> None:
        self._checks = checks
        self._bound = LogBound()
        super().__init__(*args, **options)

    def connect(self) -> Any:  # noqa: ANN401 -- as above
        """A connection to the broker, on which no key of Redis is in the way of the service's.

        kombu takes messages up again while it connects, so the way is made by a connection of its own.
        """
        with self.app.connection_for_read() as connection, suppress(*connection.connection_errors):
            elements.repair(connection, self._checks)
        return super().connect()

    def create_task_handler(self, *args: Any, **options: Any) -> Handler:  # noqa: ANN401 -- as above
        """What Celery calls with each message."""
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

    def on_unknown_message(self, body: object, message: Any) -> None:  # noqa: ANN401 -- as above
        del body
        self._drop(message, "body")

    def on_unknown_task(self, body: object, message: Any, exc: Exception) -> None:  # noqa: ANN401 -- as above
        del body, exc
        self._drop(message, "unknown_task")

    def on_invalid_task(self, body: object, message: Any, exc: Exception) -> None:  # noqa: ANN401 -- as above
        del body
        self._drop(message, "content_type" if isinstance(exc, ContentDisallowed) else "body")

    def _accepted(self, message: Any) -> bool:  # noqa: ANN401 -- as above
        """Whether to hand ``message`` over, of which only the checked part is left. Raises Malformed."""
        queue = _queue(message)
        if len(message.body or b"") > messages.most_bytes(queue, self._checks.submit_bytes):
            raise Malformed("too_large")
        redelivered = bool((message.delivery_info or {}).get("redelivered"))
        content = (message.content_type, message.content_encoding)
        found = messages.read(queue, message.headers, content, message.body, redelivered=redelivered)
        if found.task == SUBMIT:
            messages.check_sealed(found)
        message.headers, message.body = found.headers(), found.body()
        message.properties = {"priority": (message.properties or {}).get("priority")}
        if redelivered and found.task in {SUBMIT, KEYS}:
            return self._came_back(message, found)
        return True

    def _came_back(self, message: Any, found: messages.CeleryMessage) -> bool:  # noqa: ANN401 -- as above
        """Count a death by sending a copy with the number; of ``kms.keys`` another comes within a minute."""
        if found.deaths >= messages.MOST_DEATHS or found.task == KEYS:
            raise Malformed("worker_died")
        if count := self._bound.passes():
            _log.warning("message.came_back", queue=SUBMIT_QUEUE, deaths=found.deaths, count=count)
        with self.app.producer_or_acquire() as producer:
            producer.publish(
                message.body,
                exchange="",
                routing_key=SUBMIT_QUEUE,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                headers=message.headers,
            )
        message.ack()
        return False

    def _hand_over(self, message: Any, handle: Handler) -> None:  # noqa: ANN401 -- as above
        try:
            handle(message)
        except Exception as exc:
            lost = isinstance(exc, (*self.connection_errors, *self.channel_errors))
            if lost and not isinstance(exc, KeyError):  # which kombu counts among them
                raise
            self._drop(message, "crashed")

    def _drop(self, message: Any, reason: Reason) -> None:  # noqa: ANN401 -- as above
        body, headers = message.body or b"", message.headers
        task_id = headers.get("id") if isinstance(headers, Mapping) else ""
        told = body if reason == "too_large" else _argument(body)
        event = "submit.refused" if reason in {"invalid_request", "not_a_ciphertext"} else "message.refused"
        named = task_id if isinstance(task_id, str) else ""
        self._checks.refusals.refuse(_queue(message), reason, told, named, event)
        if not message.acknowledged:
            message.ack()


def never_decompress() -> None:
    """Make kombu fail, in this process, at every message that is marked as compressed."""
    registry: Any = compression  # kombu ships no types
    for name in registry.encoders():
        registry.register(registry.get_encoder(name)[0], _no_decoder, name)


def _no_decoder(_body: object) -> bytes:
    raise Malformed("compressed")


def _queue(message: Any) -> str:  # noqa: ANN401 -- as above
    """Where ``message`` came by, one of a bounded set."""
    found = (message.delivery_info or {}).get("routing_key")
    return found if isinstance(found, str) and found in messages.TASKS else "other"


def _argument(body: bytes | str) -> bytes | str:
    """The one argument in ``body``; all of it, if that is no JSON of this shape."""
    try:
        args, _, _ = msgspec.json.decode(body, type=tuple[tuple[str], msgspec.Raw, msgspec.Raw])
    except (ValueError, RecursionError):
        return body
    return args[0]
