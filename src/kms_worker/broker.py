"""The worker's side of the broker: nudges for jobs that are taken up again, and how many messages wait."""

from collections.abc import Sequence
from typing import Final

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import OperationalError
from kombu.transport import virtual
from kombu.transport.base import StdChannel

from kms_core.errors import JobsUnavailable
from kms_core.jobs.model import QUEUES
from kms_core.jobs.store import Nudge

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
        return {queue: _length(connection.default_channel, queue) for queue in queues}
    except (*connection.connection_errors, OperationalError, OSError) as exc:
        raise JobsUnavailable from exc


def _length(channel: StdChannel, queue: str) -> int:
    if isinstance(channel, virtual.Channel):  # its queue_declare(passive) forgets the key prefix
        return int(channel._size(queue))  # type: ignore[no-untyped-call]  # noqa: SLF001
    return int(channel.queue_declare(queue).message_count)  # type: ignore[attr-defined]  # all have it
