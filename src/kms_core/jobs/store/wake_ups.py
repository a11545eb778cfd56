"""Wake-ups: messages of the broker that say only that a queue has work. The jobs are in the store.

A wake-up is a constant and may be lost. It is written as kombu reads it from a list of Redis (Celery's
message protocol 2), so that the script that stores a job can push one.
"""

from typing import Final

import msgspec

from kms_core.jobs.store.keys import PREFIX

TASK: Final = "kms.run"
WAKE_UP_BODY: Final = "[[],{},null]"
"""Celery's arguments, named arguments and options: none."""
MOST_WAKE_UPS: Final = 10
"""In the list of a queue. More would be taken one by one, after the jobs had been done."""


def list_key(queue: str) -> str:
    """The key of the list that workers take the messages of a queue from, at its right end."""
    return f"{PREFIX}{queue}"


def encode_message(queue: str) -> bytes:
    """A wake-up for a queue."""
    return msgspec.json.encode(
        {
            "body": WAKE_UP_BODY,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"task": TASK, "id": "wake-up"},
            "properties": {
                "delivery_tag": "wake-up",
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
            },
        }
    )
