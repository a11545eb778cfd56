"""Bound on the connections of one port, and the time limit of a request's head (slowloris)."""

import asyncio
from collections.abc import Callable
from typing import Final, Literal, Protocol

from kms_core import metrics

DEFAULT_MOST: Final = 2048
HEAD_TIMEOUT_S: Final = 30.0
_SHARE: Final = 16  # of the connections a port may have, closed at once where there is no room


Reason = Literal["malformed", "head_timeout", "full"]


def count(reason: Reason) -> None:
    """Count a connection that the service ended."""
    metrics.HTTP_CONNECTIONS_ENDED.labels(reason).inc()


class ClientConnection(Protocol):
    """An open connection."""

    def idle_since(self) -> int | None:
        """The number of requests so far if none is under way, else None."""

    def end(self) -> None:
        """Close it."""


class Connections:
    """The open connections of one port in one process.

    Above ``most`` the oldest connections without a request under way are closed, those first that never sent
    a whole request head. If every connection has a request under way, the new one is refused.
    """

    def __init__(
        self,
        most: int = DEFAULT_MOST,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        count: Callable[[Reason], None] = count,
    ) -> None:
        """``head_timeout_s``: seconds a connection may take for the head of a request, at most twice that."""
        self.head_timeout_s = head_timeout_s
        self.count = count
        self._most = most
        self._open: dict[ClientConnection, None] = {}

    def opened(self, connection: ClientConnection) -> bool:
        """Count a connection. False if there is no room for it."""
        if len(self._open) >= self._most and not self._make_room():
            self.count("full")
            return False
        self._open[connection] = None
        return True

    def closed(self, connection: ClientConnection) -> None:
        """Stop counting a connection."""
        self._open.pop(connection, None)

    def _make_room(self) -> bool:
        """Close some at once, so that a flood of connections does not look at all of them for each."""
        idle = sorted(
            (bool(requests), number, each)
            for number, each in enumerate(self._open)
            if (requests := each.idle_since()) is not None
        )[: max(1, self._most // _SHARE)]
        for *_, each in idle:
            self.count("full")
            del self._open[each]
            each.end()
        return bool(idle)


class HeadTimer:
    """Ends a connection on which no request begins or whose head does not end in time.

    It looks every ``head_timeout_s`` seconds and ends what it found without a request twice, so requests cost
    it nothing. uvicorn has a timer for silence after an answer only: a byte every few seconds, or none
    from the start, escapes that one.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: ClientConnection, connections: Connections
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._connections = connections
        self._seen: int | None = None
        self._next = loop.call_later(connections.head_timeout_s, self._look)

    def cancel(self) -> None:
        """Stop looking."""
        self._next.cancel()

    def _look(self) -> None:
        idle_since = self._connection.idle_since()
        if idle_since is not None and idle_since == self._seen:
            self._connections.count("head_timeout")
            self._connection.end()
            return
        self._seen = idle_since
        self._next = self._loop.call_later(self._connections.head_timeout_s, self._look)
