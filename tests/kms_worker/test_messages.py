"""Broker messages as the worker takes them apart: what is left of them, and what is refused."""

import json
import logging
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import redis
from celery import Celery, chord, group
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from structlog.testing import capture_logs

from kms_core.jobs.spec import BULK, FILES, MAINTENANCE
from kms_core.jobs.store import wake_ups
from kms_worker.consumer import (
    AcknowledgingQoS,
    CeleryMessage,
    Malformed,
    check_sealed,
    most_bytes,
    read_message,
)
from kms_worker.refusals import Refusals
from support import job_stores, malformed_messages
from support.celery_messages import OPTIONS
from support.embedded_valkey import EmbeddedValkey
from support.waiting import until

JSON: Final = ("application/json", "utf-8")
connect: Final[Any] = Connection  # kombu ships no types


def read(queue: str, made: malformed_messages.RawMessage, *, redelivered: bool = False) -> CeleryMessage:
    content = (made.content_type, made.content_encoding)
    return read_message(queue, made.headers, content, made.body, redelivered=redelivered)


def submission(embed: object = None, **headers: object) -> malformed_messages.RawMessage:
    return malformed_messages.RawMessage(
        json.dumps([["x"], {}, embed]).encode(), malformed_messages.headers("kms.submit", **headers)
    )


@pytest.mark.parametrize("queue", malformed_messages.QUEUES)
def test_what_is_no_message_is_refused(queue: str) -> None:
    for made in malformed_messages.kinds(queue):
        with pytest.raises(Malformed):
            read(queue, made)


def test_headers_that_are_no_table_are_refused() -> None:
    for headers in malformed_messages.WRONG_TYPES:
        with pytest.raises(Malformed, match="headers"):
            read(BULK, malformed_messages.RawMessage(b"[]", headers))


def test_what_celery_sends_is_a_message_without_its_options() -> None:
    """Celery's own packing of a message."""
    app, more = Celery(set_as_current=False), {"time_limit": 1, "chain": [{"task": "x"}]}
    sent = app.amqp.as_task_v2("id-1", "kms.run", (), {}, eta=None, expires=60, retries=3, **more)
    found = read_message(FILES, sent.headers, JSON, json.dumps(sent.body).encode(), redelivered=False)

    links = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
    assert json.loads(found.body()) == [[], {}, links]
    names = {"lang": "py", "task": "kms.run", "id": "id-1"}
    assert found.headers() == names | {"resends": 0, "argsrepr": "-", "kwargsrepr": "-"}


def test_wake_up_that_names_a_job_is_refused() -> None:
    body = json.dumps([[str(uuid.uuid4())], {}, None]).encode()

    with pytest.raises(Malformed, match="body"):
        read(FILES, malformed_messages.RawMessage(body, malformed_messages.headers("kms.run")))


def test_message_of_the_service_itself_is_one() -> None:
    element = json.loads(wake_ups.encode_message(BULK))
    kinds = (element["content-type"], element["content-encoding"])
    found = read_message(BULK, element["headers"], kinds, element["body"], redelivered=False)

    assert (found.task, found.args) == ("kms.run", [])


def test_task_of_another_queue_is_refused() -> None:
    keys = malformed_messages.RawMessage(b"[[],{},null]", malformed_messages.headers("kms.keys"))
    others = ("kms.bulk", "kms.files", "kms.maintenance", "celery", "other")
    for queue, made in (*((queue, submission()) for queue in others), ("kms.submit", keys)):
        with pytest.raises(Malformed, match="unknown_task"):
            read(queue, made)


LINK: Final = {
    "task": "workflow.taken",
    "args": ["a", {"b": [1]}],
    "kwargs": {},
    "options": {"queue": "workflow"},
}
BAD_LINKS: Final = {
    "no queue": LINK | {"options": {}},
    "a queue of the service": LINK | {"options": {"queue": "kms.bulk"}},
    "a task of the service": LINK | {"task": "kms.submit"},
    "a task of Celery": LINK | {"task": "celery.map"},
    "a queue with a line end": LINK | {"options": {"queue": "a\nb"}},
    "an object": LINK | {"args": [{"__type__": "uuid", "__value__": "x"}]},
    "deep": LINK | {"args": [json.loads("[" * 40 + "]" * 40)]},
    "long": LINK | {"args": ["x" * 10_000]},
    "text": "workflow.taken",
    "args": LINK | {"args": "x"},
}


@pytest.mark.parametrize("given", [LINK, [LINK], [LINK] * 8])
def test_links_of_the_contract_are_sent_without_their_options(given: dict[str, object] | list[Any]) -> None:
    options: dict[str, object] = {"queue": "workflow", "serializer": "pickle", "link": [], "eta": None}
    links = json.loads(json.dumps(given).replace('{"queue": "workflow"}', json.dumps(options)))
    found = read("kms.submit", submission({"callbacks": links, "errbacks": [LINK], "chain": None}))

    clean = LINK | {"subtask_type": None, "immutable": False}
    assert (found.callbacks, found.errbacks) == ([clean] * (len(given) if given != LINK else 1), [clean])
    assert found.unsupported is None


SOON: Final = datetime(2999, 1, 1, tzinfo=UTC)
SENDER: Final = Celery(set_as_current=False, broker="memory://", backend="cache+memory://")
AFTER: Final = SENDER.signature("workflow.after", queue="workflow")
LATE: Final = AFTER.clone().set(countdown=1)
LINKED: Final = AFTER.clone().set(link=AFTER)
SUBMIT: Final = SENDER.signature("kms.submit", ("x",), queue="kms.submit")
UNSUPPORTED: Final[dict[str, tuple[str, Callable[[], Any]]]] = {
    "a step after it": ("chain_unsupported", lambda: SUBMIT | AFTER),
    "an end of a group": ("chord_unsupported", lambda: chord([SUBMIT, SUBMIT], AFTER)),
    "a time": ("eta_unsupported", lambda: SUBMIT.clone().set(eta=SOON)),
    "a delay": ("eta_unsupported", lambda: SUBMIT.clone().set(countdown=1)),
    "an end of its time": ("expires_unsupported", lambda: SUBMIT.clone().set(expires=60)),
    "a limit": ("timelimit_unsupported", lambda: SUBMIT.clone().set(time_limit=1)),
    "a soft limit": ("timelimit_unsupported", lambda: SUBMIT.clone().set(soft_time_limit=1)),
    "a link that is a chain": ("link_unsupported", lambda: SUBMIT.clone().set(link=AFTER | AFTER)),
    "a link with a delay": (
        "link_unsupported",
        lambda: SUBMIT.clone().set(link=LATE),
    ),
    "a link with a link": (
        "link_unsupported",
        lambda: SUBMIT.clone().set(link=LINKED),
    ),
    "a ninth link": ("link_unsupported", lambda: SUBMIT.clone().set(link=[AFTER] * 9)),
    **{
        f"a link with {name}": ("link_unsupported", partial(SUBMIT.clone().set, link_error=[link]))
        for name, link in BAD_LINKS.items()
        if isinstance(link, dict) and link["args"] != "x"
    },
}


def sent_by_celery(signature: Any) -> list[malformed_messages.RawMessage]:  # noqa: ANN401 -- Celery ships no types
    """The messages to kms.submit that Celery makes of a signature."""
    made = []

    def publish(_producer: object, name: str, message: Any, **_: object) -> None:  # noqa: ANN401 -- as above
        if name == "kms.submit":
            headers = json.loads(json.dumps(message.headers))
            made.append(malformed_messages.RawMessage(json.dumps(message.body).encode(), headers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SENDER.amqp, "send_task_message", publish)
        SENDER.signature(signature).apply_async()
    return made


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_option_that_would_have_no_effect_refuses_its_message(name: str) -> None:
    """Also the copy of it that is sent when its worker has died."""
    reason, signature = UNSUPPORTED[name]
    messages = [read("kms.submit", made) for made in sent_by_celery(signature())]
    copies = [malformed_messages.RawMessage(each.body(), each.headers(), *JSON) for each in messages]

    assert [each.unsupported for each in messages] == [reason] * len(messages) != []
    assert [read("kms.submit", each).unsupported for each in copies] == [reason] * len(messages)
    without = msgspec.structs.replace(messages[0], errbacks=[])
    with pytest.raises(Malformed, match=reason):
        check_sealed(without)


def test_message_that_celery_makes_without_options_has_all_it_asks_for() -> None:
    (plain,), group_of = sent_by_celery(SUBMIT), sent_by_celery(group([SUBMIT, SUBMIT]))

    assert [read("kms.submit", each).unsupported for each in (plain, *group_of)] == [None] * 3


@pytest.mark.parametrize("name", BAD_LINKS)
def test_other_links_are_left_out(name: str) -> None:
    found = read("kms.submit", submission({"callbacks": [BAD_LINKS[name]]}))

    assert (found.callbacks, found.unsupported) == ([], "link_unsupported")


@pytest.mark.parametrize(
    ("headers", "redelivered", "expected"),
    [
        ({}, False, 0),
        ({}, True, 1),
        ({"resends": 1}, False, 1),
        ({"resends": 1}, True, 2),
        ({"resends": -9}, True, 1),
    ],
)
def test_resends_are_those_before_and_this_one(
    headers: dict[str, object], *, redelivered: bool, expected: int
) -> None:
    assert read("kms.submit", submission(**headers), redelivered=redelivered).resends == expected


def test_only_a_submission_may_be_long() -> None:
    assert most_bytes("kms.submit", 10) - most_bytes(BULK, 10) == 10


LONG: Final = 4_000_000
EMPTY: Final = "[" + "[]," * (LONG // 3) + "1]"  # each costs a list of 56 bytes
GREEDY: Final = {
    "arguments": '[["' + '","'.join(map(str, range(LONG // 9))) + '"],{},null]',
    "named arguments": '[["x"],{' + ",".join(f'"{one}":1' for one in range(LONG // 9)) + "},null]",
    "a tree for an argument": f"[[{EMPTY}],{{}},null]",
    "options": f'[["x"],{{}},{EMPTY}]',
}


def peak(act: Callable[[], object]) -> int:
    """The most bytes of memory that ``act`` holds at a time; it is to end as Malformed."""
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", GREEDY)
def test_a_body_builds_no_value_that_is_not_used(name: str) -> None:
    made = malformed_messages.RawMessage(GREEDY[name].encode(), malformed_messages.headers("kms.submit"))

    assert peak(lambda: read("kms.submit", made)) < 1_000_000


# -- on Redis -------------------------------------------------------------------------------------------


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


Received = Callable[..., Any]  # kombu ships no types


@contextmanager
def receiver(broker_url: str, client: redis.Redis) -> Iterator[Received]:
    """``received(queue, no_ack=True)``: a wake-up that a worker's consumer got and has not acknowledged."""
    with (
        pytest.MonkeyPatch.context() as patch,
        connect(broker_url, transport_options=OPTIONS) as connection,
    ):
        patch.setattr("kombu.transport.redis.Channel.QoS", AcknowledgingQoS)

        def receive(queue: str, *, no_ack: bool) -> Any:  # noqa: ANN401 -- as above
            client.lpush(f"kms:{queue}", wake_ups.encode_message(queue))
            found: list[Any] = []
            declared = Queue(queue, Exchange(queue), queue)  # type: ignore[no-untyped-call]  # as above
            options = {"no_ack": no_ack, "on_message": found.append, "accept": ["json"]}
            connection.Consumer(queues=[declared], channel=connection.channel(), **options).consume()
            until(lambda: connection.drain_events(timeout=5) or found, "a message")
            return found[0]

        yield receive


@pytest.fixture
def received(broker_url: str, client: redis.Redis) -> Iterator[Received]:
    with receiver(broker_url, client) as found:
        yield found


@pytest.mark.parametrize("settle", ["ack_log_error", "reject_log_error"])
def test_message_of_a_connection_that_was_lost_is_given_out_again(
    received: Received, client: redis.Redis, settle: str
) -> None:
    """As of a task that ends when Redis has been away: kombu's AttributeError would end the worker."""
    message = received(MAINTENANCE, no_ack=False)
    was, message.channel.connection = message.channel.connection, None  # as kombu leaves a lost one
    getattr(message, settle)(logging.getLogger(), ())
    message.channel.connection = was

    assert client.hlen("kms:unacked") == 1


def test_message_is_settled_once_it_is_acknowledged(received: Received, client: redis.Redis) -> None:
    received(MAINTENANCE, no_ack=False).ack()

    assert client.hlen("kms:unacked") == client.zcard("kms:unacked_index") == 0


def test_wake_up_costs_nothing_to_acknowledge(tmp_path: Path) -> None:
    """On a server of its own, which counts the commands of nobody else."""
    with (
        EmbeddedValkey(tmp_path) as server,
        closing(job_stores.connect(server.url)) as client,
        receiver(server.broker_url, client) as received,
    ):
        received(MAINTENANCE, no_ack=False).ack()
        message = received(BULK, no_ack=True)
        before = client.info("commandstats")["cmdstat_hdel"]["calls"]
        message.ack()

        assert client.info("commandstats")["cmdstat_hdel"]["calls"] == before > 0


# -- what is said ------------------------------------------------------------------------------


def test_log_is_bounded_and_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = Refusals()
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    with capture_logs() as lines:
        for _ in range(100):
            refusals.refuse(BULK, "body", "id-1")
        monkeypatch.setattr("time.monotonic", lambda: 60.0)
        refusals.refuse(BULK, "body", "id-1")

    assert [line["count"] for line in lines] == [1, 1, 1, 98]
    assert {line["task_id"] for line in lines} == {"id-1"}


@pytest.mark.parametrize("task_id", ["a b", "\x1b[2J", "i" * 256, 7, None])
def test_a_task_id_that_is_none_is_not_logged(task_id: object) -> None:
    with capture_logs() as lines:
        Refusals().refuse("kms.submit", "body", task_id)

    assert [line["task_id"] for line in lines] == [""]


def test_refusing_is_a_sign_of_work() -> None:
    beats: list[str] = []
    Refusals(lambda: beats.append("")).refuse(BULK, "body")

    assert len(beats) == 1
