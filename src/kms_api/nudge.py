"""Tells workers of a job: a Celery message that carries the job id and nothing else."""

from typing import Final

from celery import Celery
from kombu.exceptions import OperationalError

from kms_core.errors import JobsUnavailable
from kms_core.jobs.store import Nudge

TASK: Final = "kms.run"
_SOCKET_TIMEOUT_S: Final = 3


def through(broker_url: str) -> Nudge:
    """A ``nudge(job_id, queue)`` over this broker; raises JobsUnavailable instead of waiting for long."""
    producer = Celery("kms-api", broker=broker_url, set_as_current=False)
    producer.conf.update(
        task_serializer="json",
        task_ignore_result=True,
        broker_transport_options={
            "global_keyprefix": "kms:",
            "socket_timeout": _SOCKET_TIMEOUT_S,
            "socket_connect_timeout": 2,
        },
        broker_connection_timeout=2,
    )

    def nudge(job_id: str, queue: str) -> None:
        try:
            producer.send_task(
                TASK, (job_id,), queue=queue, argsrepr="-", kwargsrepr="-", retry_policy={"max_retries": 1}
            )
        except (OperationalError, OSError) as exc:
            raise JobsUnavailable from exc

    return nudge
