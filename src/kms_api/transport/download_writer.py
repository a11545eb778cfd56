"""Slabs of an answer to the socket without the interpreter's lock: a thread opens the next one meanwhile.

uvloop holds the lock while it writes, and a slab of 1 MiB takes half as long to write as to open. Knows
uvicorn's cycle, and nothing of what is sent.
"""

import asyncio
import os
from typing import Final

from cryptography.utils import Buffer
from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from kms_api.transport.admission import Budget, reservation_of
from kms_api.transport.transfer_rate import ReaderWatch
from kms_api.transport.unread_body import cycle_of

_LARGE_BYTES: Final = 64 * 1024


class DownloadWriter(asyncio.Transport):
    """In the place of the transport that a cycle writes to, for the time of one answer."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport

    def write(self, data: Buffer) -> None:
        """What the socket takes of a large piece at once; the rest goes the transport's own way."""
        transport = self._transport
        piece = memoryview(data)
        if (
            len(piece) >= _LARGE_BYTES
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        ):
            piece = piece[self._taken(piece) :]
        if piece:
            transport.write(piece)

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def _taken(self, piece: memoryview) -> int:
        """Asks for the descriptor each time: that of a closed connection may be another's by then."""
        try:
            return os.write(self._transport.get_extra_info("socket").fileno(), piece)
        except OSError:  # it is full, or broken, which the transport will notice and tell
            return 0


def unlock(request: Request) -> None:
    """Have the answer to a request written without the lock; one over TLS stays as it is."""
    cycle = cycle_of(request.scope)
    if cycle is not None and cycle.transport.get_extra_info("sslcontext") is None:
        cycle.transport = DownloadWriter(cycle.transport)


class WatchedResponse(StreamingResponse):
    """An answer of any length, for readers that keep the pace of transfers; its slot is in ``budget``."""

    budget: Budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = cycle_of(scope)
        if cycle is None:
            await super().__call__(scope, receive, send)
            return
        limits = reservation_of(scope).admission.transfer
        with ReaderWatch(cycle, limits, self.budget.too_slow) as watch:

            async def written(message: Message) -> None:
                watch.written += len(message.get("body", b""))
                await send(message)

            await super().__call__(scope, receive, written)
