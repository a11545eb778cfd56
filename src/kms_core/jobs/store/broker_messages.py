"""Nudges as kombu reads them from lists of Redis, so that one can be put there in the step that makes a job.

Celery's message protocol 2, of which a worker needs no more than this; knows no connection.
"""

import os
from collections.abc import Mapping
from typing import Final

import msgspec

from kms_core.jobs.model import QUEUES, REDIS_STEPS, QueuePriority
from kms_core.jobs.store.redis_keys import PREFIX
from kms_protocol.wire import NOT_JSON, PRIORITIES

TASK: Final = "kms.run"
LANES: Final[tuple[QueuePriority, ...]] = tuple(
    (queue, priority) for queue in QUEUES for priority in PRIORITIES
)
_SEPARATOR: Final = "\x06\x16"  # kombu's, between a queue and the step of its priority


class _Headers(msgspec.Struct):
    at: float = 0.0


class _Dated(msgspec.Struct):
    headers: _Headers = msgspec.field(default_factory=_Headers)


def where(lane: QueuePriority, step: int | None = None) -> str:
    """The key of the list that workers take the messages of a lane from, at its right end."""
    queue, priority = lane
    step = REDIS_STEPS[priority][0] if step is None else step
    return f"{PREFIX}{queue}{_SEPARATOR}{step}" if step else f"{PREFIX}{queue}"


def write(job_id: str, lane: QueuePriority, at: float) -> bytes:
    """A message that carries the job id; ``at`` is the time by Redis's clock."""
    tag = os.urandom(8).hex()
    queue, priority = lane
    properties: Mapping[str, object] = {
        "delivery_tag": tag,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": REDIS_STEPS[priority][0],
    }
    return msgspec.json.encode(
        {
            "body": f'[["{job_id}"],{{}},null]',
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"task": TASK, "id": tag, "at": at},
            "properties": properties,
        }
    )


def written_at(message: bytes) -> float:
    """When a message was written; 0 for one that is not of ours."""
    try:
        return msgspec.json.decode(message, type=_Dated).headers.at
    except NOT_JSON:
        return 0.0
