"""What a worker tells of, and waits for, after an error of RabbitMQ."""

import pytest
from celery.worker.consumer import Consumer
from kombu.transport.pyamqp import amqp  # type: ignore[attr-defined]  # the one that kombu uses

from kms_worker.consumer import CheckedConsumer


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
