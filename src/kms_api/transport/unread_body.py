"""Answers to requests whose body has not come yet: one that leaves a part unread ends the connection.

Else a sender could go on for as long as it likes, and a proxy might take the rest for another request.
"""

from collections.abc import Callable
from typing import Final

import anyio
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from kms_api.transport.upload_reader import Connection
from kms_core.http_server.protocol import BODY

LINGER_S: Final = 2.0
"""How long the rest of a body is passed over after its answer, since closing at once may destroy the answer
before a sender reads it (RFC 9112 §9.6)."""


class UnreadBody:
    """The way out of one request whose body is still on its way."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, release: Callable[[], None]) -> None:
        """``release`` gives back what the request holds; it is called before the rest is passed over."""
        self._connection: Connection
        self._cycle: RequestResponseCycle
        self._connection, self._cycle = scope["state"][BODY]
        self._receive = receive
        self._send = send
        self._release = release
        self._lingers = False

    async def send(self, message: Message) -> None:
        """Pass a message of the application on."""
        if message["type"] == "http.response.start":
            if self._cycle.more_body:
                self._lingers = not self._cycle.waiting_for_100_continue  # else nothing was sent yet
                others = [pair for pair in message["headers"] if pair[0].lower() != b"connection"]
                message["headers"] = [*others, (b"connection", b"close")]
            await self._send(message)
        elif self._lingers and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            self._release()
            await self._pass_over()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self._send(message)

    async def _pass_over(self) -> None:
        """Drop what still comes, until the body or the connection ends, or the time is over."""
        self._connection.inlet = None
        with anyio.move_on_after(LINGER_S):
            while self._cycle.more_body and not self._cycle.disconnected:
                await self._receive()


def cycle_of(scope: Scope) -> RequestResponseCycle | None:
    """Return uvicorn's side of a request, where the protocol has left it."""
    found = scope.get("state", {}).get(BODY)
    if found is None:
        return None
    cycle: RequestResponseCycle = found[1]
    return cycle
