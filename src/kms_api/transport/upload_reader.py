"""The body of a request straight into memory of the caller's: one wake-up and one copy for each slab of it.

``Request.stream`` wakes a task for each piece that a socket gave, and copies the piece three times before it
is there. Knows uvicorn's protocol, and nothing of what is asked.
"""

from typing import Final, NamedTuple, Protocol

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from kms_api.transport.transfer_rate import TransferLimits, TransferRate
from kms_core.http_server.protocol import BODY
from kms_protocol.errors import BodyTimeout

SLOW: Final = "The body came too slowly, or stopped arriving"


class Connection(Protocol):
    """What comes of a body goes to ``inlet``, if there is one, in place of uvicorn's own buffer."""

    inlet: "UploadReader | None"
    flow: FlowControl


class Filled(NamedTuple):
    """What became of a slab: the bytes in it, and whether more follow. It is full if they do."""

    size: int
    more: bool


class UploadReader:
    """One body on its way into slabs. It reads ahead by no more than the socket gave at once."""

    def __init__(self, request: Request, limits: TransferLimits) -> None:
        """``limits`` are the pace that the sender must keep."""
        self._receive = request.receive
        self._look_s = limits.look_s
        self._rate = TransferRate(limits)
        self._connection: Connection
        self._cycle: RequestResponseCycle
        self._connection, self._cycle = request.scope["state"][BODY]
        self._left = bytearray()  # what came and did not fit
        self._slab = memoryview(b"")
        self._held = 0
        self._filled = 0  # in slabs before this one
        self._begun = False

    async def fill(self, slab: memoryview) -> Filled:
        """Fill a slab, unless the body ends before.

        Raises ClientDisconnect if the body breaks off, BodyTimeout if the sender is too slow.
        """
        self._filled += self._held
        self._slab, self._held = slab, 0
        self._rate.wait()
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
        message = None
        while message is None:
            with anyio.move_on_after(self._look_s):
                message = await self._receive()
            self._check()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._put(memoryview(message["body"]))
        if self._cycle.more_body:
            self._connection.inlet = self

    async def _woken(self) -> None:
        """Until the slab is full, or the body has ended or broken off."""
        while not self._cycle.message_event.is_set():
            with anyio.move_on_after(self._look_s):
                await self._cycle.message_event.wait()
            self._check()

    def _check(self) -> None:
        if self._rate.left_s(self._filled + self._held) <= 0:
            raise BodyTimeout(SLOW)


class Pieces:
    """A body in the pieces that the socket gives, for a thread that asks for one after the other."""

    def __init__(self, request: Request, limits: TransferLimits) -> None:
        """``limits`` are the pace that the sender must keep."""
        self._receive = request.receive
        self._look_s = limits.look_s
        self._rate = TransferRate(limits)
        self._moved = 0
        self._has_ended = False

    async def next(self) -> bytes:
        """The next bytes; empty at the end. Raises ClientDisconnect, BodyTimeout for a slow sender."""
        self._rate.wait()
        while not self._has_ended:
            message = None
            with anyio.move_on_after(self._look_s):
                message = await self._receive()
            if message is not None:
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                self._has_ended = not message["more_body"]
                self._moved += len(message["body"])
            if self._rate.left_s(self._moved) <= 0:
                raise BodyTimeout(SLOW)
            if message is not None and message["body"]:
                piece: bytes = message["body"]
                return piece
        return b""
