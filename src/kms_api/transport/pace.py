"""The pace of a peer on its connection: of transfers, and of a body that goes on after the answer.

A peer that is too slow loses its connection, and so does one whose body an answer leaves unread.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, Self

import anyio
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from kms_core.http_protocol import BODY, HttpProtocol
from kms_protocol.units import KiB

LINGER_S: Final = 2.0
"""Seconds for which the rest of a body is read and dropped after the answer: to close at once may destroy the
answer before the sender reads it (RFC 9112 §9.6)."""
BYTES_PER_S: Final = 4 * KiB
"""The pace of uploads and downloads, which slow links keep: a slower peer would hold its slot for long."""
GRACE_S: Final = 30.0
"""Seconds after which a transfer must have that pace on average."""
STALL_S: Final = 60.0
"""Seconds within which at least a byte must move."""
CHECK_S: Final = 1.0
"""Seconds between two checks of a transfer."""


class TransferRate:
    """The pace of one transfer. Only time in which the service waits for its peer counts."""

    __slots__ = ("_moved", "_quiet_s", "_waited_s", "_waiting_since")

    def __init__(self) -> None:
        self._moved = 0
        self._quiet_s = self._waited_s = 0.0
        self._waiting_since = time.monotonic()

    def wait(self) -> None:
        """Start to count time: the service waits for its peer from now on."""
        self._waiting_since = time.monotonic()

    def left_s(self, moved: int) -> float:
        """Seconds until the peer is too slow if nothing moves; 0 or less once it is.

        ``moved`` is the number of bytes since the beginning. Time counts since ``wait``, or the last call.
        """
        now = time.monotonic()
        spent_s, self._waiting_since = now - self._waiting_since, now
        self._waited_s += spent_s
        self._quiet_s = 0.0 if moved > self._moved else self._quiet_s + spent_s
        self._moved = moved
        due_s = max(GRACE_S, moved / BYTES_PER_S)
        return min(STALL_S - self._quiet_s, due_s - self._waited_s)


class ReaderWatch:
    """Aborts the connection of an answer whose reader is too slow, while entered.

    Only time in which bytes wait for the reader counts.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.written = 0
        """Bytes handed to the transport, counted by the caller, including those that wait at the start."""
        self._transport = cycle.transport
        self._rate = TransferRate()
        self._next: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self.written = self._transport.get_write_buffer_size()
        self._schedule_check()
        return self

    def __exit__(self, *_: object) -> None:
        if self._next is not None:
            self._next.cancel()

    def _schedule_check(self) -> None:
        self._next = asyncio.get_running_loop().call_later(CHECK_S, self._check)

    def _check(self) -> None:
        waiting = self._transport.get_write_buffer_size()
        if not waiting:
            self._rate.wait()
        elif self._rate.left_s(self.written - waiting) <= 0:
            self._next = None
            self._transport.abort()
            return
        self._schedule_check()


class UnreadBody:
    """Sends the answer to a request whose body is still arriving.

    An answer that leaves part of the body unread ends the connection: otherwise the sender could go on for as
    long as it likes, and a proxy might take the rest for another request.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, release: Callable[[], None]) -> None:
        """``release`` gives back the budgets of the request; called before the rest is dropped."""
        self._connection, self._cycle = connection_of(scope)
        self._receive = receive
        self._send = send
        self._release = release
        self._lingers = False

    async def send(self, message: Message) -> None:
        """Pass on a message of the application."""
        if message["type"] == "http.response.start":
            if self._cycle.more_body:
                self._lingers = not self._cycle.waiting_for_100_continue  # else nothing was sent yet
                others = [pair for pair in message["headers"] if pair[0].lower() != b"connection"]
                message["headers"] = [*others, (b"connection", b"close")]
            await self._send(message)
        elif self._lingers and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            self._release()
            await self._drop_rest()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self._send(message)

    async def _drop_rest(self) -> None:
        self._connection.inlet = None
        with anyio.move_on_after(LINGER_S):
            while self._cycle.more_body and not self._cycle.disconnected:
                await self._receive()


def connection_of(scope: Scope) -> tuple[HttpProtocol, RequestResponseCycle]:
    """Return the connection of a request, and uvicorn's state of the request. Only under uvicorn."""
    found: tuple[HttpProtocol, RequestResponseCycle] = scope["state"][BODY]
    return found


def uvicorn_cycle(scope: Scope) -> RequestResponseCycle | None:
    """Return uvicorn's state of a request; None under another server."""
    return connection_of(scope)[1] if BODY in scope.get("state", ()) else None


def should_stop_waiting(scope: Scope) -> bool:
    """Return whether to end a wait or an endless answer: the caller has gone, or the server stops."""
    connection, cycle = connection_of(scope)
    return bool(connection.stopping or cycle.disconnected)
