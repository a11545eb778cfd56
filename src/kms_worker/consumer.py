"""Celery's consumer, which hands over checked messages only; all others are acknowledged and dropped.

Celery 5.7 as it is ends on a message whose body is JSON and not a task, and puts it back before: each restart
ends the same way.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Literal, get_args

import msgspec
import structlog
from celery.worker import consumer as celery_consumer
from celery.worker import state
from kombu import compression
from kombu.exceptions import OperationalError
from kombu.transport import redis
from kombu.transport.pyamqp import amqp  # type: ignore[attr-defined]  # the one that kombu uses

from kms_core.age.armor import VERSION_LINE
from kms_core.jobs.execution import attendance
from kms_core.jobs.spec import BULK, FILES, MAINTENANCE
from kms_core.jobs.store.wake_ups import TASK as RUN
from kms_core.jobs.store.wake_ups import WAKE_UP_BODY
from kms_worker.refusals import TASK_ID, LogBound, Refusals
from kms_worker.rotation import KEYS_TASK
from kms_worker.submit import QUEUE as SUBMIT_QUEUE
from kms_worker.submit import SUBMIT_TASK

# Checks of broker messages before Celery acts on them: Malformed is raised for any other message.
#
# A producer chooses task, arguments and options. Of a message only a task name, a task id, one argument and
# bounded links are kept. Of kms.submit, options that change what is done, or when, are refused; all others
# (group, retries, shadow, reply_to and the like) are dropped and have no effect.

Reason = Literal[
    "too_large",  # above the bound of its queue; not parsed
    "headers",  # no table, or an id that is none
    "compressed",  # never decompressed
    "content_type",  # not JSON in UTF-8
    "unknown_task",  # no task of that queue
    "body",  # not JSON, or not the arguments of the task
    "invalid_request",  # on kms.submit: an argument that is not base64
    "not_a_ciphertext",  # on kms.submit: an argument that is no age file
    "chain_unsupported",  # these on kms.submit: an option of Celery that would have no effect
    "chord_unsupported",
    "eta_unsupported",
    "expires_unsupported",
    "timelimit_unsupported",
    "link_unsupported",
    "worker_died",  # came back twice from a worker that died or lost its connection
    "crashed",  # it passed the checks, and handling it failed all the same
]
TASKS: Final[Mapping[str, frozenset[str]]] = {
    BULK: frozenset({RUN}),
    FILES: frozenset({RUN}),
    MAINTENANCE: frozenset({RUN, KEYS_TASK}),
    SUBMIT_QUEUE: frozenset({SUBMIT_TASK}),
}
"""Queues that are consumed, and the tasks that may come by each."""
MOST_BYTES: Final = 65_536  # of a message without an argument; Celery writes about 1 KiB
MOST_RESENDS: Final = 2  # of a message whose worker died, each time as a copy with their number
_MOST_EMBED: Final = 262_144  # bytes of Celery's options, of which links are read
_MOST_LINKS: Final = 8
_MOST_LINK_BYTES: Final = 8192
_MOST_DEPTH: Final = 16
_IN_BODY: Final[Mapping[str, Reason]] = {"chain": "chain_unsupported", "chord": "chord_unsupported"}
_IN_HEADERS: Final[Mapping[str, Reason]] = {
    "eta": "eta_unsupported",  # and countdown
    "expires": "expires_unsupported",
    "timelimit": "timelimit_unsupported",
}
_OF_LINKS: Final = frozenset(
    {"eta", "countdown", "expires", "time_limit", "soft_time_limit", "link", "link_error", "chain", "chord"}
)
"""Options of a link that would have no effect."""
_NAME: Final = re.compile(r"[\w.:@-]{1,200}", re.ASCII)
_OURS: Final = ("kms.", "celery.")
Handler = Callable[[Any], object]
_DIFFERS_S: Final = 5.0
_PASS_ON_S: Final = 0.02
_SHOWN_CHARS: Final = 200
_RUN_BODY: Final = b'[[],{},{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'
_CALLS: Final = frozenset({amqp.spec.Exchange.Declare, amqp.spec.Queue.Declare, amqp.spec.Basic.Consume})
"""By which the worker begins with a queue."""
_log = structlog.get_logger(__name__)


class Malformed(Exception):
    """Raised for a message that this service did not send. Carries the reason and no text of the message."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class CeleryMessage(msgspec.Struct):
    """A message after its check: Celery's names, and no other field that Celery would obey."""

    task: str
    task_id: str
    args: list[str]
    callbacks: list[dict[str, object]]
    errbacks: list[dict[str, object]]
    resends: int
    unsupported: Reason | None
    """The option of Celery for which it is refused."""

    def headers(self) -> dict[str, object]:
        """Celery's headers. Without ``argsrepr`` Celery would log the argument."""
        named = {"task": self.task, "id": self.task_id, "resends": self.resends}
        refused = {"unsupported": self.unsupported} if self.unsupported else {}
        return {"lang": "py", **named, **refused, "argsrepr": "-", "kwargsrepr": "-"}

    def body(self) -> bytes:
        """Celery's body, as JSON."""
        if self.task == RUN:
            return _RUN_BODY
        links = {"callbacks": self.callbacks or None, "errbacks": self.errbacks or None}
        return msgspec.json.encode([self.args, {}, {**links, "chain": None, "chord": None}])


def most_bytes(queue: str, submit_bytes: int) -> int:
    """The most bytes of a message's body in ``queue``; ``submit_bytes`` bounds the argument of kms.submit."""
    return MOST_BYTES + (submit_bytes if queue == SUBMIT_QUEUE else 0)


def read_message(
    queue: str, headers: object, content: tuple[object, object], body: object, *, redelivered: bool
) -> CeleryMessage:
    """The message in ``body``, at most ``most_bytes`` long. ``content`` is its type and encoding.

    Raises Malformed.
    """
    if not isinstance(headers, Mapping):
        raise Malformed("headers")
    if headers.get("compression"):
        raise Malformed("compressed")
    task, task_id = headers.get("task"), headers.get("id")
    if not isinstance(task, str) or task not in TASKS.get(queue, ()):
        raise Malformed("unknown_task")
    if not isinstance(task_id, str) or not TASK_ID.fullmatch(task_id):
        raise Malformed("headers")
    kind, encoding = content
    if kind != "application/json" or str(encoding).lower() != "utf-8":
        raise Malformed("content_type")
    args, embed = ([], None) if body == WAKE_UP_BODY and task == RUN else _arguments(task, body)
    callbacks, errbacks = (_links(embed, name) for name in ("callbacks", "errbacks"))
    resends = headers.get("resends")
    count = resends if isinstance(resends, int) and 0 < resends < MOST_RESENDS else 0
    is_ours = task != SUBMIT_TASK
    unsupported = None if is_ours else _unsupported(headers, embed, len(callbacks) + len(errbacks))
    return CeleryMessage(task, task_id, args, callbacks, errbacks, count + redelivered, unsupported)


def check_sealed(message: CeleryMessage) -> None:
    """Refuse a kms.submit with an option that has no effect, or without an age file.

    Nothing is raised if the pool is to send its ``link_error``. Raises Malformed.
    """
    if message.errbacks:
        return
    if message.unsupported:
        raise Malformed(message.unsupported)
    try:
        content = msgspec.convert(message.args[0], bytes)
    except msgspec.ValidationError:
        raise Malformed("invalid_request") from None
    if not content.startswith(VERSION_LINE):
        raise Malformed("not_a_ciphertext")


class _Empty(msgspec.Struct, forbid_unknown_fields=True):
    pass


_parts: Final = msgspec.json.Decoder(tuple[msgspec.Raw, msgspec.Raw, msgspec.Raw])


def _arguments(task: str, body: object) -> tuple[list[str], object]:
    """The positional arguments, checked, and Celery's options, which are not. No other value is built."""
    if not isinstance(body, (bytes, bytearray, memoryview, str)):
        raise Malformed("body")
    try:
        raw, named, embed = _parts.decode(body)
        if len(embed) > _MOST_EMBED:
            raise Malformed("too_large")
        msgspec.json.decode(named, type=_Empty)
        args = list(msgspec.json.decode(raw, type=tuple[str] if task == SUBMIT_TASK else tuple[()]))
        options = msgspec.json.decode(embed)
    except (ValueError, RecursionError):  # of msgspec, and UnicodeDecodeError
        raise Malformed("body") from None
    return args, options


def _unsupported(headers: Mapping[object, object], embed: object, kept: int) -> Reason | None:
    """The first option of Celery that would have no effect; ``kept`` is the number of links that are sent.

    A copy of a message has only the reason left, in its headers.
    """
    options = embed if isinstance(embed, dict) else {}
    asked = [
        *(reason for name, reason in _IN_BODY.items() if options.get(name)),
        *(reason for name, reason in _IN_HEADERS.items() if _is_set(headers.get(name))),
    ]
    if sum(len(_given(embed, name)) for name in ("callbacks", "errbacks")) > kept:
        asked.append("link_unsupported")
    carried = (reason for reason in get_args(Reason) if reason == headers.get("unsupported"))
    return next(iter(asked), None) or next(carried, None)


def _is_set(option: object) -> bool:
    """Whether an option is given; limits of time are a pair, of soft and hard."""
    return any(option) if isinstance(option, list | tuple) else option is not None


# -- links of kms.submit: Celery sends them, so they are rebuilt from fields known to be harmless ---------


def _links(embed: object, name: str) -> list[dict[str, object]]:
    """The links that docs/celery.md allows; others are left out, and the message is refused.

    Of eight, those to a task and queue that are not the service's, with at most 8 KiB of arguments.
    """
    return [made for raw in _given(embed, name)[:_MOST_LINKS] if (made := _link(raw)) is not None]


def _given(embed: object, name: str) -> list[object]:
    """The links of a kind, none of them checked."""
    found = embed.get(name) if isinstance(embed, dict) else None
    return found if isinstance(found, list) else [found] if found else []


def _link(raw: object) -> dict[str, object] | None:
    if not isinstance(raw, dict):
        return None
    options = raw.get("options")
    queue = options.get("queue") if isinstance(options, dict) else None
    args, named = raw.get("args") or [], raw.get("kwargs") or {}
    known = _is_theirs(raw.get("task")) and _is_theirs(queue) and _has_effect(options)
    if not known or not isinstance(args, list) or not isinstance(named, dict) or not _is_flat([args, named]):
        return None
    immutable = raw.get("immutable") is True
    made = {"task": raw["task"], "args": args, "kwargs": named, "options": {"queue": queue}}
    return {**made, "subtask_type": None, "immutable": immutable}


def _has_effect(options: object) -> bool:
    return isinstance(options, dict) and not any(options.get(name) for name in _OF_LINKS)


def _is_theirs(name: object) -> bool:
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not name.startswith(_OURS)


def _is_flat(value: object) -> bool:
    """Return whether JSON is neither deep nor long, and has nothing that kombu would turn into an object."""
    return _is_shallow(value, _MOST_DEPTH) and len(msgspec.json.encode(value)) <= _MOST_LINK_BYTES


def _is_shallow(value: object, left: int) -> bool:
    if isinstance(value, dict):
        return (
            left > 0 and "__type__" not in value and all(_is_shallow(one, left - 1) for one in value.values())
        )
    if isinstance(value, list):
        return left > 0 and all(_is_shallow(one, left - 1) for one in value)
    return True


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
        self._passed_on: dict[str, float] = {}
        """Queues, and the time at which a wake-up of each was last passed on."""
        super().__init__(*args, **options)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Log a queue or exchange that is not as it should be, and wait: Celery tries again at once."""
        super().on_connection_error_after_connected(exc)
        if isinstance(exc, amqp.exceptions.AMQPError) and exc.method_sig in _CALLS:
            _log.error(
                "broker.queue_differs",
                error=str(exc.reply_text)[:_SHOWN_CHARS],
                hint="delete the queue or exchange, or set broker_queue_type (docs/redis.md)",
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
        if len(message.body or b"") > most_bytes(queue, self._submit_bytes):
            raise Malformed("too_large")
        redelivered = bool((message.delivery_info or {}).get("redelivered"))
        content = (message.content_type, message.content_encoding)
        found = read_message(queue, message.headers, content, message.body, redelivered=redelivered)
        if found.task == SUBMIT_TASK:
            check_sealed(found)
        if found.task == RUN and self._is_sated():
            if not found.resends:
                self._pass_on(message, queue, found.headers() | {"resends": 1})
            return False
        message.headers, message.body = found.headers(), found.body()
        message.properties = {"priority": (message.properties or {}).get("priority")}
        if found.task != RUN:
            attendance.want()
        if redelivered and found.task in {SUBMIT_TASK, KEYS_TASK}:
            return self._came_back(message, found)
        return True

    def _is_sated(self) -> bool:
        """Return whether each process has a wake-up; a further one is dropped.

        One for each does, as each drains all queues of the worker. Nothing is acknowledged, so the broker
        would send any number into memory.
        """
        held = sum(request.name == RUN for request in state.reserved_requests)
        return bool(held >= self.pool.num_processes)

    def _pass_on(self, message: Any, queue: str, headers: Mapping[str, object]) -> None:  # noqa: ANN401 -- as above
        """Send a copy in a moment, one for all that come until then: another worker may have an idle process.

        Or this one, by then.
        """
        now = time.monotonic()
        if now - self._passed_on.get(queue, -math.inf) > _PASS_ON_S:
            self._passed_on[queue] = now
            self.timer.call_after(_PASS_ON_S, self._send_on, (message, queue, headers))

    def _send_on(self, *copy: Any) -> None:  # noqa: ANN401 -- as above
        with suppress(OperationalError, *self.connection_errors, *self.channel_errors):
            self._send_copy(*copy)

    def _came_back(self, message: Any, found: CeleryMessage) -> bool:  # noqa: ANN401 -- as above
        """Send a copy that counts one more; of ``kms.keys`` another comes within a minute."""
        if found.resends >= MOST_RESENDS or found.task == KEYS_TASK:
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
        is_read = reason in {"invalid_request", "not_a_ciphertext"} or reason.endswith("_unsupported")
        event = "submit.refused" if is_read else "message.refused"
        self._refusals.refuse(_queue(message), reason, task_id, event)
        if not message.acknowledged:
            message.ack()


def _queue(message: Any) -> str:  # noqa: ANN401 -- as above
    """The queue of ``message``, one of a bounded set."""
    found = (message.delivery_info or {}).get("routing_key")
    return found if isinstance(found, str) and found in TASKS else "other"
