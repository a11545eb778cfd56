"""How messages in hand are kept on Redis: two changes to kombu.

A message whose acknowledgement fails must still give its prefetch credit back. kombu 5.7's Redis transport
runs the Redis command first and forgets the credit if that raises; after ``prefetch multiplier x
concurrency`` such failures the worker lives on and never consumes again.

And a nudge in hand is noted in memory alone: kombu writes a message to Redis when it is taken and once more
when it is done with, which costs a small job two writes to the disk, and a nudge that is lost is sent again
by the caretaker. What others send to workers (``kms.submit``) is noted as ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kombu.transport import redis, virtual

from kms_core.jobs.store.broker_messages import TASK


class OurQoS(redis.QoS):
    """As kombu does it, but for nudges and for what is left after a failure."""

    def append(self, message: virtual.Message, delivery_tag: str) -> None:
        noted_by = virtual.QoS if _is_nudge(message) else redis.QoS
        noted_by.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]  # kombu ships no types

    def ack(self, delivery_tag: str) -> None:
        with self._credit_returned(delivery_tag):
            if self._nudge(delivery_tag) is None:
                super().ack(delivery_tag)  # type: ignore[no-untyped-call]  # as above

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        with self._credit_returned(delivery_tag):
            if requeue or self._nudge(delivery_tag) is None:
                super().reject(delivery_tag, requeue)  # type: ignore[no-untyped-call]  # as above

    def restore_by_tag(self, tag: str, client: object = None, leftmost: bool = False) -> None:
        message = self._nudge(tag)
        if message is None:
            super().restore_by_tag(tag, client, leftmost)  # type: ignore[no-untyped-call]  # as above
        elif tag not in self._dirty:
            raw, info = message._raw, message.delivery_info  # noqa: SLF001 -- as kombu does
            with self.channel.conn_or_acquire(client) as line:
                self.channel._do_restore_message(  # noqa: SLF001 -- as above
                    raw, info["exchange"], info["routing_key"], line, leftmost
                )

    def _nudge(self, delivery_tag: str) -> virtual.Message | None:
        message = self._delivered.get(delivery_tag)
        return message if message is not None and _is_nudge(message) else None

    @contextmanager
    def _credit_returned(self, delivery_tag: str) -> Iterator[None]:
        try:
            yield
        finally:
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]  # as above


def _is_nudge(message: virtual.Message) -> bool:
    return (message.headers or {}).get("task") == TASK


def install() -> None:
    """Use this for every channel made from now on."""
    redis.Channel.QoS = OurQoS
