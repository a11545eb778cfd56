"""Elements of the broker's lists on Redis, checked before kombu parses them.

kombu 5.7 lets whatever it cannot parse out of its loop, which ends the worker. What is no message is dropped
here, and leaves no trace in kombu; what is one, kombu gets in a form of our making. Nor does it acknowledge
what no connection or note is left of.
"""

import os
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import redis as redis_py
from kombu.connection import Connection
from kombu.transport import redis

from kms_worker import messages
from kms_worker.messages import TASKS, Malformed
from kms_worker.refusals import Refusals

_SEPARATOR: Final = redis.Channel.sep
_LISTS: Final = tuple(
    queue if step == 0 else f"{queue}{_SEPARATOR}{step}" for queue in TASKS for step in redis.PRIORITY_STEPS
)


_BINDINGS: Final = ("binding", "binding_permanent")
_MUTEX: Final = "unacked_mutex"
_MUTEX_S: Final = redis.Channel.unacked_mutex_expire
_NO_EXPIRY: Final = -1


@dataclass(frozen=True, slots=True)
class Checks:
    """Checks of elements. ``submit_bytes`` bounds the argument of kms.submit."""

    refusals: Refusals
    submit_bytes: int

    def element(self, key: bytes, element: bytes) -> tuple[bytes, bytes] | None:
        """An element of the list ``key``, as kombu is to see it; None if it was refused."""
        queue = key.decode(errors="replace").rsplit(_SEPARATOR, 1)[0]
        try:
            return key, messages.envelope(queue, element, os.urandom(16).hex(), self.submit_bytes)
        except Malformed as exc:
            self.refusals.refuse(queue, exc.reason, element)
            return None

    def held(self, note: bytes) -> bool:
        """Return whether a worker wrote this note of a message in hand; another is refused."""
        try:
            messages.held(note, self.submit_bytes)
        except Malformed as exc:
            self.refusals.refuse("other", exc.reason, note)
            return False
        return True

    def drop_wrong_types(self, client: Any) -> None:  # noqa: ANN401 -- kombu ships no types
        """Delete keys with a name of the broker's and another type: nothing can be read from there or put."""
        looks = [(client.llen, key) for key in _LISTS]
        looks += [(client.hlen, "unacked"), (lambda key: client.zrange(key, 0, 0), "unacked_index")]
        looks += [(client.smembers, f"_kombu.{kind}.{queue}") for kind in _BINDINGS for queue in TASKS]
        for look, key in looks:
            try:
                look(key)
            except redis_py.ResponseError as exc:
                if not _is_wrong_type(exc):
                    raise
                client.delete(key)
                queue = key.rsplit(_SEPARATOR, 1)[0]
                self.refusals.refuse(queue if key in _LISTS else "other", "wrong_type", b"")
        left = client.ttl(f"{client.global_keyprefix}{_MUTEX}")
        if left == _NO_EXPIRY or left > _MUTEX_S:  # kombu always sets one
            client.delete(_MUTEX)
            self.refusals.refuse("other", "wrong_type", b"")


class CheckedClient(redis.PrefixedStrictRedis):
    """The client of every channel of kombu."""

    checks: ClassVar[Checks]

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:  # noqa: ANN401 -- kombu's
        """As ever, but for the answer to BRPOP: None where the element is no message."""
        try:
            found = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        except redis_py.ResponseError as exc:
            if command_name != "BRPOP" or not _is_wrong_type(exc):
                raise
            return self.checks.drop_wrong_types(self)
        return self.checks.element(*found) if command_name == "BRPOP" and found else found


class CheckedQoS(redis.QoS):
    """kombu's, which drops notes of unacknowledged messages that no worker wrote, or kombu cannot read."""

    checks: ClassVar[Checks]

    def ack(self, delivery_tag: str) -> None:
        if self._is_noted(delivery_tag):
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]  # kombu ships no types

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if self._is_noted(delivery_tag):
            super().reject(delivery_tag, requeue)  # type: ignore[no-untyped-call]  # as above

    def _is_noted(self, tag: str) -> bool:
        """Return whether Redis has a note of the message to remove: it has none of wake-ups.

        The message of a connection that was lost is given out again. kombu raises AttributeError for it,
        which ends a worker.
        """
        return tag in self._delivered and self.channel.connection is not None

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:  # noqa: ANN401 -- as above
        if tag not in self._delivered:
            with self.channel.conn_or_acquire(client) as line:
                note = line.hget(self.unacked_key, tag)
                if note is None or not self.checks.held(note):
                    self._forget(tag, line)
                    return
        try:
            super().restore_by_tag(tag, client, leftmost)  # type: ignore[no-untyped-call]  # as above
        except (redis_py.ConnectionError, redis_py.TimeoutError):
            raise
        except Exception:  # noqa: BLE001 -- whatever kombu makes of fields that the check passes over
            self.checks.refusals.refuse("other", "envelope", b"")
            with self.channel.conn_or_acquire(client) as line:
                self._forget(tag, line)

    def _forget(self, tag: str, line: Any) -> None:  # noqa: ANN401 -- kombu's
        self._remove_from_indices(tag, line.pipeline()).execute()  # type: ignore[no-untyped-call]


def install(checks: Checks) -> None:
    """Read all lists so from now on."""
    CheckedClient.checks = CheckedQoS.checks = checks
    redis.PrefixedStrictRedis = CheckedClient  # type: ignore[misc]  # what Channel makes clients of
    redis.Channel.QoS = CheckedQoS


def repair(connection: Connection, checks: Checks) -> None:
    """Make room for the broker's lists where the broker is a Redis."""
    channel = connection.default_channel
    if isinstance(channel, redis.Channel):
        with channel.conn_or_acquire() as client:
            checks.drop_wrong_types(client)


def _is_wrong_type(exc: redis_py.ResponseError) -> bool:
    return str(exc).startswith("WRONGTYPE")
