"""The broker as Celery has it: sends wake-ups where it is not the Redis of the jobs, and counts messages."""

import queue
import threading
from functools import partial
from typing import Final

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport import redis

from kms_core.jobs.model import NotifyWorker
from kms_core.jobs.store.wake_ups import MOST_WAKE_UPS, TASK, list_key
from kms_core.observability import metrics
from kms_core.redis_client import celery_options
from kms_core.settings.model import RedisSection
from kms_core.settings.redis_urls import is_shared
from kms_protocol.errors import JobsUnavailable

_KEPT_S: Final = 60.0  # after which RabbitMQ drops a wake-up that no worker took
_CONFIGURATION: Final[dict[str, object]] = {
    "task_serializer": "json",
    "task_ignore_result": True,
    "broker_connection_timeout": 2,
}
_TRANSPORT: Final[dict[str, object]] = {
    "global_keyprefix": "kms:",
    "socket_timeout": 3,
    "socket_connect_timeout": 2,
    "confirm_publish": True,
}
WITHIN: Final = {"timeout": 3, "confirm_timeout": 3}
"""Options of a publication: seconds to write it, and until RabbitMQ confirms it, which has no bound else."""
_MOST_WAITING: Final = 100


def in_background(notify: NotifyWorker) -> NotifyWorker:
    """Return a function that has a thread call ``notify``, so that no submission waits for the broker.

    The function raises JobsUnavailable while 100 wake-ups wait in the queue of the thread. Failures of
    ``notify`` are counted; the reaper sends other wake-ups in place of those that were lost.
    """
    waiting = queue.SimpleQueue[str]()

    def send() -> None:
        while True:
            try:
                notify(waiting.get())
            except Exception:  # noqa: BLE001 -- a wake-up may be lost, the thread may not
                metrics.JOB_RESUMES.labels("notify_failed").inc()

    def put(name: str) -> None:
        if waiting.qsize() >= _MOST_WAITING:
            raise JobsUnavailable
        waiting.put(name)

    threading.Thread(target=send, name="wake-ups", daemon=True).start()
    return put


def connect(section: RedisSection) -> NotifyWorker:
    """A ``notify`` over a producer of its own, and from a thread: see ``in_background``.

    Nothing is connected before the first message.
    """
    producer = Celery("kms-api", set_as_current=False)
    producer.conf.update(_CONFIGURATION | celery_options(section, _TRANSPORT))
    return in_background(partial(_send, producer))


def notify_through(app: Celery, section: RedisSection) -> NotifyWorker | None:
    """A ``notify`` over the worker's own broker connection, which raises JobsUnavailable.

    None where the store pushes wake-ups by itself.
    """
    return None if is_shared(section) else partial(_send, app)


def _send(app: Celery, name: str) -> None:
    once = {"max_retries": 1}
    named = {"queue": name, "argsrepr": "-", "kwargsrepr": "-", "expiration": _KEPT_S}
    try:
        with app.producer_or_acquire() as producer:
            app.send_task(TASK, (), producer=producer, retry_policy=once, **named, **WITHIN)
            if isinstance(producer.channel, redis.Channel):  # it has no expiry
                with producer.channel.conn_or_acquire() as client:
                    client.ltrim(list_key(name), 0, MOST_WAKE_UPS - 1)
    except (OperationalError, OSError, AttributeError, *app.connection_for_write().channel_errors) as exc:
        # AttributeError: kombu 5.7, where the connection is lost while its channel is made
        raise JobsUnavailable from exc


def messages(connection: Connection, queue: str) -> int:
    """The number of messages that wait in a queue. Raises JobsUnavailable."""
    try:
        channel = connection.default_channel
        if isinstance(channel, redis.Channel):  # its queue_declare forgets the key prefix
            return int(channel._size(queue))  # type: ignore[no-untyped-call]  # noqa: SLF001 -- kombu has no other
        return _length_of_queue(connection, queue)
    except (*connection.connection_errors, *connection.channel_errors, OperationalError, OSError) as exc:
        raise JobsUnavailable from exc


def _length_of_queue(connection: Connection, queue: str) -> int:
    try:
        with connection.channel() as channel:  # type: ignore[no-untyped-call]  # untyped there; a refusal closes it
            return int(channel.queue_declare(queue, passive=True).message_count)
    except connection.channel_errors:  # no worker has declared the queue yet
        return 0
