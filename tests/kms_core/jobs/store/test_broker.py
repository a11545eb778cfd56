"""Wake-ups: kombu reads those of the scripts as its own, and a broker that hangs holds up no submission."""

import json
import threading
from contextlib import closing
from typing import Any, Final, cast

import pytest
from celery import Celery
from kombu.connection import Connection
from kombu.transport import redis

from kms_core.jobs.model import NotifyWorker
from kms_core.jobs.spec import BULK, QUEUES
from kms_core.jobs.store import broker, wake_ups
from kms_core.settings.model import RedisSection
from kms_core.settings.redis_urls import for_celery, is_shared
from kms_protocol.errors import JobsUnavailable
from support import job_stores
from support.amqp_server import amqp_server
from support.waiting import WAIT_S, until

CONNECT: Final[Any] = Connection  # kombu ships no types


@pytest.mark.parametrize("queue", QUEUES)
def test_lists_are_those_that_kombu_takes_from(queue: str) -> None:
    assert redis.Channel.priority_steps[0] == 0, "the first list of a queue has its name"
    assert wake_ups.list_key(queue) == f"kms:{queue}"


def test_a_wake_up_is_a_message_of_kombu() -> None:
    channel = CONNECT("memory://").channel()
    message = channel.Message(json.loads(wake_ups.encode_message(BULK)), channel)

    assert message.payload == [[], {}, None]
    assert (message.headers["task"], message.delivery_info["routing_key"]) == (wake_ups.TASK, BULK)


def test_a_broker_of_its_own_drops_wake_ups_that_nobody_takes() -> None:
    """RabbitMQ does, by the property ``expiration``: milliseconds, as text."""
    app = Celery(broker="memory://", set_as_current=False)
    notify = broker.notify_through(app, RedisSection(url="redis://h:6379/0", broker_url="amqp://h/"))
    assert notify

    notify(BULK)

    with app.connection_for_read() as connection:
        message = connection.default_channel.basic_get(BULK)
    assert (message.headers["task"], message.properties["expiration"]) == ("kms.run", "60000")


def test_a_list_on_another_redis_has_ten_wake_ups(redis_url: str) -> None:
    with closing(job_stores.connect(redis_url)) as client:
        client.lpush("kms:kms.bulk", *[b"x"] * 10)

        broker.connect(RedisSection(url=redis_url, broker_url=for_celery(redis_url)))(BULK)

        def newest() -> bytes:
            return cast("list[bytes]", client.lrange("kms:kms.bulk", 0, 0))[0]

        until(lambda: b"kms.run" in newest(), "a thread has sent it")
        until(lambda: client.llen("kms:kms.bulk") == 10, "and cut the list")


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


class SlowBroker:
    """Takes wake-ups while ``answers`` is set."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.sent: list[str] = []

    def __call__(self, queue: str) -> None:
        assert self.answers.wait(WAIT_S)
        self.sent.append(queue)
        if queue == "refused":
            raise JobsUnavailable


@pytest.fixture
def slow() -> SlowBroker:
    return SlowBroker()


def test_nobody_waits_for_a_broker_that_hangs(slow: SlowBroker) -> None:
    notify = broker.in_background(slow)
    for number in range(100):
        notify(f"queue-{number}")
    until(lambda: refuses(notify), "so many wait, and one is on its way")

    slow.answers.set()
    until(lambda: len(slow.sent) >= 100, "they are sent")
    assert slow.sent[:100] == [f"queue-{number}" for number in range(100)]


def refuses(notify: NotifyWorker) -> bool:
    try:
        notify("more")
    except JobsUnavailable:
        return True
    return False


def test_a_wake_up_that_cannot_be_sent_ends_no_other(slow: SlowBroker) -> None:
    notify = broker.in_background(slow)
    slow.answers.set()
    for queue in ("refused", "next"):
        notify(queue)

    until(lambda: slow.sent == ["refused", "next"], "both are tried")


def test_a_message_that_rabbitmq_never_confirms_is_given_up() -> None:
    with amqp_server() as server:
        app = Celery("kms-test", broker=server.url, set_as_current=False)
        app.conf.update(broker_transport_options={"confirm_publish": True}, broker_connection_timeout=2)
        notify = broker.notify_through(app, RedisSection(url="redis://localhost", broker_url=server.url))
        assert notify
        notify(BULK)
        assert server.published == 1

        server.confirms = False
        with pytest.raises(JobsUnavailable):
            notify(BULK)
        server.confirms = True
        notify(BULK)
