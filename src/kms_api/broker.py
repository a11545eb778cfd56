"""The API's side of the broker: tells workers of a job, and asks how many messages wait."""

from dataclasses import dataclass
from typing import Final

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport import virtual

from kms_core.errors import JobsUnavailable
from kms_core.jobs.model import QUEUES

TASK: Final = "kms.run"
_CONFIGURATION: Final[dict[str, object]] = {
    "task_serializer": "json",
    "task_ignore_result": True,
    "broker_connection_timeout": 2,
    "broker_transport_options": {
        "global_keyprefix": "kms:",
        "socket_timeout": 3,
        "socket_connect_timeout": 2,
    },
}


@dataclass(frozen=True, slots=True)
class Broker:
    """A producer only: it consumes nothing and keeps no results."""

    producer: Celery

    def nudge(self, job_id: str, queue: str) -> None:
        """A message that carries the job id and nothing else. Raises JobsUnavailable within seconds."""
        retry = {"max_retries": 1}
        try:
            self.producer.send_task(
                TASK, (job_id,), queue=queue, argsrepr="-", kwargsrepr="-", retry_policy=retry
            )
        except (OperationalError, OSError) as exc:
            raise JobsUnavailable from exc

    def depths(self) -> dict[str, int]:
        """Messages waiting in each queue. Raises JobsUnavailable."""
        with self.producer.connection_for_read() as connection:
            return _waiting(connection)


def connect(url: str) -> Broker:
    """A broker at this URL; nothing is connected before the first message."""
    producer = Celery("kms-api", broker=url, set_as_current=False)
    producer.conf.update(_CONFIGURATION)
    return Broker(producer)


def _waiting(connection: Connection) -> dict[str, int]:
    """Messages in each queue, all priorities of it. Raises JobsUnavailable."""
    try:
        return {queue: _length(connection, queue) for queue in QUEUES}
    except (*connection.connection_errors, OperationalError, OSError) as exc:
        raise JobsUnavailable from exc


def _length(connection: Connection, queue: str) -> int:
    if isinstance(connection.default_channel, virtual.Channel):  # queue_declare forgets its key prefix
        return int(connection.default_channel._size(queue))  # type: ignore[no-untyped-call]  # noqa: SLF001
    try:
        with connection.channel() as channel:  # a refusal closes it
            return int(channel.queue_declare(queue, passive=True).message_count)
    except connection.channel_errors:  # no worker has declared the queue yet
        return 0
