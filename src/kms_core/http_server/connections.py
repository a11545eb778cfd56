"""Bounds on the connections of one port, and time limits of heads (slowloris) and of readers that stall."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal, Protocol

from kms_core.auth.rate_limit import source_of
from kms_core.observability import metrics

_ROOM: Final = 16  # the part of a port's connections that is closed at once where there is no room
_AGAIN_S: Final = 0.01


Reason = Literal["malformed", "timeout", "full"]


class EvictionClass(IntEnum):
    """Why a connection may be closed to make room, the first reason first."""

    SILENT = 0
    """It never sent a whole request head."""
    IDLE = 1
    """Every request on it is answered."""
    UNREAD = 2
    """Its client does not read an answer."""


class ClientConnection(Protocol):
    """An open connection."""

    source: str
    """The address of the client as the socket has it; empty for Unix sockets."""

    def standing(self) -> EvictionClass | None:
        """The reason to close it first; None while a request is worked on."""

    def progress(self) -> Hashable:
        """A value that changes while requests come and answers are read; None while one is worked on."""

    def end(self) -> None:
        """Close it."""


def count(reason: Reason) -> None:
    """Count a connection that the service ended."""
    metrics.HTTP_CONNECTIONS_ENDED.labels(reason).inc()


def _never(address: str) -> bool:
    del address
    return False


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """``most`` connections of a port in one process, and of one source address at most half of them.

    A connection has ``timeout_s`` seconds, at most twice that, for the head of a request; where
    ``ends_unread`` holds, it also ends once its client has read nothing of an answer for as long.
    ``is_proxy`` tells addresses for which the bound by source does not hold.
    """

    most: int = 2048
    timeout_s: float = 30.0
    ends_unread: bool = False
    is_proxy: Callable[[str], bool] = _never


class Connections:
    """The open connections of one port in one process.

    Without room the connections of the source that has most of them are closed first, and of one source in
    the order of ``EvictionClass``, the oldest first. If requests are worked on at all of them, the new
    connection is refused.
    """

    def __init__(
        self, limits: ConnectionLimits | None = None, count: Callable[[Reason], None] = count
    ) -> None:
        self.limits: Final = ConnectionLimits() if limits is None else limits
        self.count = count
        self._open: dict[ClientConnection, str] = {}
        self._sources: Counter[str] = Counter()
        self._next_look = 0.0

    def opened(self, connection: ClientConnection) -> bool:
        """Count a connection. False if there is no room for it."""
        source = source_of(connection.source) if connection.source else ""
        if not (self._has_room() and self._has_room_of_source(source)):
            self.count("full")
            return False
        self._open[connection] = source
        self._sources[source] += 1
        return True

    def closed(self, connection: ClientConnection) -> None:
        """Stop counting a connection."""
        source = self._open.pop(connection, None)
        if source is not None:
            self._sources[source] -= 1
            if not self._sources[source]:
                del self._sources[source]

    def _has_room(self) -> bool:
        return len(self._open) < self.limits.most or self._make_room(lambda _: True)

    def _has_room_of_source(self, source: str) -> bool:
        most = max(1, self.limits.most // 2)
        if self._sources[source] < most or not source or self.limits.is_proxy(source):
            return True
        return self._make_room(lambda other: other == source)

    def _make_room(self, of: Callable[[str], bool]) -> bool:
        """Close some at once, so that a flood of connections does not look at all of them for each.

        Where there was none to close, the next look is 10 ms later.
        """
        now = time.monotonic()
        if now < self._next_look:
            return False
        found = sorted(
            (-self._sources[source], standing, number, each)
            for number, (each, source) in enumerate(self._open.items())
            if of(source) and (standing := each.standing()) is not None
        )[: max(1, self.limits.most // _ROOM)]
        for *_, each in found:
            self.count("full")
            self.closed(each)
            each.end()
        if not found:
            self._next_look = now + _AGAIN_S
        return bool(found)


class StallTimer:
    """Ends a connection on which nothing moves: no request begins, no head ends, or no answer is read.

    It looks every ``timeout_s`` seconds and ends what it found unmoved twice, so requests cost it nothing.
    uvicorn has a timer for silence after an answer only: a byte every few seconds, or none from the start,
    escapes that one.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: ClientConnection, connections: Connections
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._connections = connections
        self._seen: Hashable = None
        self._next = loop.call_later(connections.limits.timeout_s, self._look)

    def cancel(self) -> None:
        """Stop looking."""
        self._next.cancel()

    def _look(self) -> None:
        progress = self._connection.progress()
        if progress is not None and progress == self._seen:
            self._connections.count("timeout")
            self._connection.end()
            return
        self._seen = progress
        self._next = self._loop.call_later(self._connections.limits.timeout_s, self._look)
