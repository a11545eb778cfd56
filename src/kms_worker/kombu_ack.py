"""One repair of kombu: a message whose acknowledgement fails must still give its prefetch credit back.

kombu 5.7's Redis transport runs the Redis command first and forgets the credit if that raises; after
``prefetch multiplier x concurrency`` such failures the worker lives on and never consumes again.
"""

from kombu.transport import redis, virtual


class _CreditReturningQoS(redis.QoS):
    """As kombu does it; on failure the virtual part is done all the same, and the error goes on."""

    def ack(self, delivery_tag: str) -> None:
        try:
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]  # kombu ships no types
        except BaseException:
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]  # as above
            raise

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        try:
            super().reject(delivery_tag, requeue)  # type: ignore[no-untyped-call]  # as above
        except BaseException:
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]  # as above
            raise


def install() -> None:
    """Use the repaired class for every channel made from now on."""
    redis.Channel.QoS = _CreditReturningQoS
