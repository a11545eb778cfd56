"""Messages that are put into kombu's lists without kombu: kombu must read them as its own."""

import json
from typing import Any, Final

import pytest
from kombu.connection import Connection
from kombu.transport import redis

from kms_core.jobs.spec import BULK, QUEUES
from kms_core.jobs.store import redis_keys
from kms_core.settings.model import RedisSection
from kms_core.settings.redis_urls import for_celery, is_shared

CONNECT: Final[Any] = Connection  # kombu ships no types


@pytest.mark.parametrize("queue", QUEUES)
def test_lists_are_those_that_kombu_takes_from(queue: str) -> None:
    assert redis.Channel.priority_steps[0] == 0, "the first list of a queue has its name"
    assert redis_keys.list_key(queue) == f"kms:{queue}"


def test_a_wake_up_is_a_message_of_kombu() -> None:
    channel = CONNECT("memory://").channel()
    message = channel.Message(json.loads(redis_keys.encode_message(BULK)), channel)

    assert message.payload == [[], {}, None]
    assert (message.headers["task"], message.delivery_info["routing_key"]) == (redis_keys.TASK, BULK)


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
