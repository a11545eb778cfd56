"""Messages that are put into kombu's lists without kombu: kombu must read them as its own."""

import json
from typing import Any, Final

import pytest
from kombu.connection import Connection
from kombu.transport import redis

from kms_core.jobs.model import BULK, QUEUES, QueuePriority
from kms_core.jobs.store import broker_messages
from kms_core.settings.model import RedisSection
from kms_core.settings.redis_urls import for_celery, is_shared

CONNECT: Final[Any] = Connection  # kombu ships no types


@pytest.mark.parametrize("lane", broker_messages.LANES, ids="-".join)
def test_lists_are_those_that_kombu_takes_from(lane: QueuePriority) -> None:
    steps = redis.Channel.priority_steps
    queue, _ = lane
    lists = {f"kms:{queue}" if step == 0 else f"kms:{queue}{redis.Channel.sep}{step}" for step in steps}

    assert broker_messages.where(lane) in lists


def test_every_lane_has_a_list_of_its_own() -> None:
    assert len({broker_messages.where(lane) for lane in broker_messages.LANES}) == 3 * len(QUEUES)


def test_message_is_one_of_kombus() -> None:
    channel = CONNECT("memory://").channel()
    message = channel.Message(json.loads(broker_messages.write("a-job", (BULK, "low"), 12.5)), channel)

    assert message.payload == [["a-job"], {}, None]
    assert (message.headers["task"], message.delivery_info["routing_key"]) == (broker_messages.TASK, BULK)


def test_two_messages_of_a_job_are_told_apart() -> None:
    tags = {
        json.loads(broker_messages.write("a-job", (BULK, "high"), 1))["properties"]["delivery_tag"]
        for _ in "ab"
    }

    assert len(tags) == 2


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (broker_messages.write("a-job", (BULK, "high"), 12.5), 12.5),
        (b'{"headers": {"task": "kms.run"}}', 0.0),
        (b'{"headers": {"at": "soon"}}', 0.0),
        (b"\xff", 0.0),
        (b"", 0.0),
    ],
    ids=["ours", "celery", "junk", "bytes", "empty"],
)
def test_message_says_when_it_was_written(message: bytes, expected: float) -> None:
    assert broker_messages.written_at(message) == expected


@pytest.mark.parametrize(
    ("url", "broker_url", "expected"),
    [
        ("redis://h:6379/0", "redis://h:6379/0", True),
        ("unix:///run/v.sock?db=2", "redis+socket:///run/v.sock?virtual_host=2", True),
        ("redis://h:6379/0", "redis://h:6379/1", False),
        ("redis://a:x@h:6379/0", "redis://b:y@h:6379/0", False),
        ("redis://h:6379/0", "amqp://h/", False),
    ],
    ids=["same", "socket", "database", "user", "rabbitmq"],
)
def test_broker_is_shared_only_if_it_is_the_same(url: str, broker_url: str, *, expected: bool) -> None:
    assert is_shared(RedisSection(url=url, broker_url=broker_url)) is expected
    assert is_shared(RedisSection(url=url, broker_url=for_celery(url)))
