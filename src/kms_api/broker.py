"""The API's side of the broker: tells workers of a job, and asks how many messages wait."""

from dataclasses import dataclass
from typing import Final

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport import redis

from kms_core.jobs.model import AMQP_RANKS, QUEUES, REDIS_STEPS
from kms_core.jobs.store.broker_messages import TASK
from kms_core.redis_client import celery_options
from kms_core.settings.model import RedisSection
from kms_protocol.errors import JobsUnavailable
from kms_protocol.wire import Priority

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


@dataclass(frozen=True, slots=True)
class Broker:
    """A producer only: it consumes nothing and keeps no results."""

    producer: Celery

    def nudge(self, job_id: str, queue: str, priority: Priority = "normal") -> None:
        """A message that carries the job id and nothing else. Raises JobsUnavailable within seconds."""
        amqp = "amqp" in str(self.producer.conf.broker_url).partition("://")[0]
        options = {
            "priority": AMQP_RANKS[priority] if amqp else REDIS_STEPS[priority][0],
            "retry_policy": {"max_retries": 1},
        }
        try:
            self.producer.send_task(TASK, (job_id,), queue=queue, argsrepr="-", kwargsrepr="-", **options)
        except (OperationalError, OSError, AttributeError) as exc:
            # AttributeError: kombu 5.7, where the connection is lost while its channel is made
            raise JobsUnavailable from exc

    def depths(self) -> dict[tuple[str, str], int]:
        """Messages waiting, by queue and priority; RabbitMQ tells of queues only (``any``).

        Raises JobsUnavailable.
        """
        with self.producer.connection_for_read() as connection:
            return _waiting(connection)


def connect(section: RedisSection) -> Broker:
    """The broker of ``[kms.redis]``; nothing is connected before the first message."""
    producer = Celery("kms-api", set_as_current=False)
    producer.conf.update(_CONFIGURATION | celery_options(section, _TRANSPORT))
    return Broker(producer)


def _waiting(connection: Connection) -> dict[tuple[str, str], int]:
    """Raises JobsUnavailable."""
    try:
        return {
            (queue, priority): count
            for queue in QUEUES
            for priority, count in _by_priority(connection, queue).items()
        }
    except (*connection.connection_errors, OperationalError, OSError) as exc:
        raise JobsUnavailable from exc


def _by_priority(connection: Connection, queue: str) -> dict[str, int]:
    channel = connection.default_channel
    if not isinstance(channel, redis.Channel):
        return {"any": _length(connection, queue)}
    with channel.conn_or_acquire() as client:  # queue_declare forgets the key prefix
        return {
            priority: sum(client.llen(_list(channel, queue, step)) for step in steps)
            for priority, steps in REDIS_STEPS.items()
        }


def _list(channel: redis.Channel, queue: str, step: int) -> str:
    return str(channel._q_for_pri(queue, step))  # type: ignore[no-untyped-call]  # noqa: SLF001 -- kombu offers the sum alone


def _length(connection: Connection, queue: str) -> int:
    try:
        with connection.channel() as channel:  # type: ignore[no-untyped-call]  # untyped there; a refusal closes it
            return int(channel.queue_declare(queue, passive=True).message_count)
    except connection.channel_errors:  # no worker has declared the queue yet
        return 0
