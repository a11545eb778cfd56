"""The body of a request straight into memory of the caller's: one wake-up and one copy for each slab of it.

``Request.stream`` wakes a task for each piece that a socket gave, and copies the piece three times before it
is there. Knows uvicorn's protocol, and nothing of what is asked.
"""

from collections.abc import AsyncIterator
from typing import ClassVar, Final, NamedTuple, Protocol

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from kms_core.errors import InvalidRequest
from kms_core.http_server.protocol import BODY

_STALLED_S: Final = 60.0


class Connection(Protocol):
    """What comes of a body goes to ``inlet``, if there is one, in place of uvicorn's own buffer."""

    inlet: "Inlet | None"
    flow: FlowControl


class Filled(NamedTuple):
    """What became of a slab: the bytes in it, and whether more follow. It is full if they do."""

    size: int
    more: bool


class Inlet:
    """One body on its way into slabs. It reads ahead by no more than the socket gave at once."""

    stalled_s: ClassVar[float] = _STALLED_S

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        self._connection: Connection
        self._cycle: RequestResponseCycle
        self._connection, self._cycle = request.scope["state"][BODY]
        self._left = bytearray()  # what came and did not fit
        self._slab = memoryview(b"")
        self._held = 0
        self._begun = False

    async def fill(self, slab: memoryview) -> Filled:
        """Fill a slab, unless the body ends before.

        Raises ClientDisconnect if the body breaks off, InvalidRequest if nothing comes for too long.
        """
        self._slab, self._held = slab, 0
        left, self._left = self._left, bytearray()
        self._put(memoryview(left))
        if not self._begun:
            await self._begin()
        while self._cycle.more_body and not self._left:
            if self._cycle.disconnected:
                raise ClientDisconnect
            self._cycle.message_event.clear()
            self._connection.flow.resume_reading()
            await self._woken()
        return Filled(self._held, more=bool(self._left))

    def put(self, piece: bytes) -> None:
        """For the protocol: what has come. A byte that does not fit ends the reading until the next slab."""
        if self._cycle.response_complete:
            return  # it was refused: nobody waits for the rest
        self._put(memoryview(piece))
        if self._left:
            self._connection.flow.pause_reading()
            self._cycle.message_event.set()

    def _put(self, piece: memoryview) -> None:
        size = min(len(piece), len(self._slab) - self._held)
        self._slab[self._held : self._held + size] = piece[:size]
        self._held += size
        self._left += piece[size:]

    async def _begin(self) -> None:
        """The first piece comes as uvicorn gives it, who also tells a sender that waits to go on."""
        self._begun = True
        try:
            with anyio.fail_after(self.stalled_s):
                message = await self._receive()
        except TimeoutError:
            raise _stalled() from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._put(memoryview(message["body"]))
        if self._cycle.more_body:
            self._connection.inlet = self

    async def _woken(self) -> None:
        """Until the slab is full, or the body has ended or broken off."""
        while True:
            before = self._held
            with anyio.move_on_after(self.stalled_s):
                await self._cycle.message_event.wait()
                return
            if self._held == before:
                raise _stalled()


async def next_piece(pieces: AsyncIterator[bytes]) -> bytes:
    """The next bytes of a body; empty at its end. A sender that stalls must not hold a thread for ever."""
    try:
        with anyio.fail_after(_STALLED_S):
            async for piece in pieces:
                if piece:
                    return piece
    except TimeoutError:
        raise _stalled() from None
    return b""


def _stalled() -> InvalidRequest:
    return InvalidRequest(f"The body stopped arriving for {_STALLED_S:.0f} s")
