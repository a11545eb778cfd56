"""The worker's side of the broker: nudges for jobs that are taken up again, and how many messages wait."""

from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport import redis
from redis.exceptions import ResponseError

from kms_core.jobs.model import AMQP_RANKS, QUEUES, REDIS_STEPS, NotifyWorker, QueuePriority
from kms_core.jobs.store.broker_messages import TASK
from kms_core.jobs.store.redis_keys import is_of_the_record
from kms_core.settings.model import RedisSection
from kms_core.settings.redis_urls import is_shared
from kms_protocol.errors import JobsUnavailable
from kms_protocol.wire import PRIORITIES, Priority


def nudge_through(app: Celery, section: RedisSection) -> NotifyWorker | None:
    """A ``nudge`` over the worker's own broker connection, which raises JobsUnavailable.

    None where the store does it by itself.
    """
    if is_shared(section):
        return None

    def nudge(job_id: str, queue: str, priority: Priority) -> None:
        rank = AMQP_RANKS[priority] if is_amqp(app) else REDIS_STEPS[priority][0]
        try:
            app.send_task(TASK, (job_id,), queue=queue, priority=rank, argsrepr="-", kwargsrepr="-")
        except (OperationalError, OSError, AttributeError) as exc:
            # AttributeError: kombu 5.7, where the connection is lost while its channel is made
            raise JobsUnavailable from exc

    return nudge


def is_amqp(app: Celery) -> bool:
    """Whether the broker is RabbitMQ, not Redis."""
    return "amqp" in str(app.conf.broker_url).partition("://")[0]


def waiting(connection: Connection, queues: Sequence[str] = QUEUES) -> dict[QueuePriority, int]:
    """Messages in each lane. RabbitMQ tells of queues only: there each lane of a queue has all of its.

    Raises JobsUnavailable.
    """
    try:
        return {lane: count for queue in queues for lane, count in _lanes(connection, queue).items()}
    except (*connection.connection_errors, *connection.channel_errors, OperationalError, OSError) as exc:
        raise JobsUnavailable from exc


def _lanes(connection: Connection, queue: str) -> dict[QueuePriority, int]:
    channel = connection.default_channel
    if isinstance(channel, redis.Channel):  # its queue_declare forgets the key prefix
        with channel.conn_or_acquire() as client:
            return {
                (queue, priority): sum(_held(client, _list(channel, queue, step)) for step in steps)
                for priority, steps in REDIS_STEPS.items()
            }
    return dict.fromkeys(((queue, priority) for priority in PRIORITIES), _length(connection, queue))


def _held(client: Any, key: str) -> int:  # noqa: ANN401 -- kombu ships no types
    """The length of the list ``key``; 0 where others put something else there, which workers delete."""
    try:
        return int(client.llen(key))
    except ResponseError as exc:
        if not is_of_the_record(exc):
            raise
        return 0


def _list(channel: redis.Channel, queue: str, step: int) -> str:
    return str(channel._q_for_pri(queue, step))  # type: ignore[no-untyped-call]  # noqa: SLF001 -- kombu offers the sum alone


def _length(connection: Connection, queue: str) -> int:
    try:
        with connection.channel() as channel:  # type: ignore[no-untyped-call]  # untyped there; a refusal closes it
            return int(channel.queue_declare(queue, passive=True).message_count)
    except connection.channel_errors:  # no worker has declared the queue yet
        return 0
