"""The worker's side of the broker: nudges for jobs that are taken up again, and how many messages wait."""

from collections.abc import Sequence
from typing import Final

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport import virtual

from kms_core.errors import JobsUnavailable
from kms_core.jobs.model import QUEUES, Nudge

TASK: Final = "kms.run"


def nudge_through(app: Celery) -> Nudge:
    """A ``nudge`` over the worker's own broker connection; raises JobsUnavailable."""

    def nudge(job_id: str, queue: str) -> None:
        try:
            app.send_task(TASK, (job_id,), queue=queue, argsrepr="-", kwargsrepr="-")
        except (OperationalError, OSError) as exc:
            raise JobsUnavailable from exc

    return nudge


def waiting(connection: Connection, queues: Sequence[str] = QUEUES) -> dict[str, int]:
    """Messages in each queue, all priorities of it. Raises JobsUnavailable."""
    try:
        return {queue: _length(connection, queue) for queue in queues}
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
