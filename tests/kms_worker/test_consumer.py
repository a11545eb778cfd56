"""The consumer of a worker: errors of RabbitMQ, and wake-ups that come while all processes are busy."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.worker.consumer import Consumer
from kombu.transport.pyamqp import amqp  # type: ignore[attr-defined]  # the one that kombu uses

from kms_core.jobs.spec import BULK, FILES
from kms_worker.consumer import CheckedConsumer
from kms_worker.refusals import Refusals
from support import malformed_messages


@pytest.mark.parametrize(
    ("code", "text", "method", "is_told"),
    [
        (406, "inequivalent arg 'x-queue-type' for queue 'kms.bulk'", (50, 10), True),
        (405, "cannot obtain exclusive access to locked queue 'kms.bulk'", (50, 10), True),
        (406, "inequivalent arg 'type' for exchange 'kms.bulk'", (40, 10), True),
        (403, "queue 'kms.bulk' in exclusive use", (60, 20), True),
        (406, "delivery acknowledgement on channel 1 timed out", (0, 0), False),
        (406, "unknown delivery tag 7", (60, 80), False),
    ],
)
def test_only_a_refused_declaration_is_a_queue_that_differs(
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    text: str,
    method: tuple[int, int],
    *,
    is_told: bool,
) -> None:
    """RabbitMQ has the same code for an acknowledgement that is late, which no change of the queue mends."""
    waits = list[float]()
    monkeypatch.setattr(Consumer, "on_connection_error_after_connected", lambda _self, _exc: None)
    monkeypatch.setattr("kms_worker.consumer.time.sleep", waits.append)
    error = amqp.exceptions.error_for_code(code, text, method, amqp.exceptions.ChannelError)

    CheckedConsumer.__new__(CheckedConsumer).on_connection_error_after_connected(error)

    assert bool(waits) is is_told


def test_wake_ups_that_come_while_all_processes_are_busy_are_passed_on_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another worker may be idle. A copy that finds this one busy as well is dropped."""
    later: list[Callable[[], object]] = []
    now = [0.0]
    monkeypatch.setattr("kms_worker.consumer.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Consumer, "__init__", lambda _: None)
    consumer: Any = CheckedConsumer(refusals=Refusals(), submit_bytes=0)
    consumer.app = Celery(broker="memory://", set_as_current=False)
    consumer.connection_errors = consumer.channel_errors = ()
    consumer.pool = SimpleNamespace(num_processes=0)  # so none is free
    consumer.timer = SimpleNamespace(call_after=lambda _, work, args: later.append(partial(work, *args)))

    def comes(queue: str, **headers: object) -> int:
        """The number of copies that are to be sent after one more wake-up."""
        made = malformed_messages.RawMessage(b"[[],{},null]", malformed_messages.headers(**headers))
        info = {"routing_key": queue, "redelivered": False}
        assert not consumer._accepted(SimpleNamespace(**made._asdict(), delivery_info=info, properties={}))  # noqa: SLF001 -- one message
        return len(later)

    with consumer.app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_declare(BULK)
        assert [comes(BULK), comes(BULK), comes(FILES)] == [1, 1, 2]
        later[0]()
        copy = channel.basic_get(BULK)
        assert copy.headers["resends"] == 1
        now[0] = 1.0
        assert comes(BULK, resends=1) == 2
        assert comes(BULK) == 3
