"""Answers of any size on their way out: a thread makes the next slab while the one before is sent.

A slow reader holds no thread.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import Executor
from typing import Final, TypeVar

import anyio
from cryptography.utils import Buffer
from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from kms_api.transport.connection import ReaderWatch, cycle_of
from kms_api.transport.upload import Worker, outcome

T = TypeVar("T")
_LARGE_BYTES: Final = 64 * 1024


async def send(slabs: Generator[T], threads: Executor) -> AsyncGenerator[T]:
    """Yield what ``slabs`` yields, each made in a thread while the one before is sent.

    Raises what ``slabs`` raises. A forged slab breaks the connection: no clean end is sent.
    """
    worker = Worker(threads)
    try:
        ahead = await worker.begin(next, slabs, None)
        while (slab := await outcome(ahead)) is not None:
            ahead = await worker.begin(next, slabs, None)
            yield slab
    finally:
        await worker.close(slabs)  # a download that breaks off leaves no file open


class WatchedResponse(StreamingResponse):
    """A streamed answer, whose connection ends if its reader is too slow."""

    told: Callable[[int], Awaitable[None]] | None = None
    """Told at the end the number of bytes that were sent: fewer than all if the reader went away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = cycle_of(scope)
        if cycle is None:
            await super().__call__(scope, receive, send)
            return
        watch, is_whole = ReaderWatch(cycle), False

        async def written(message: Message) -> None:
            nonlocal is_whole
            watch.written += len(message.get("body", b""))
            await send(message)
            is_end = message["type"] == "http.response.body" and not message.get("more_body")
            is_whole = is_end and not cycle.disconnected

        try:
            with watch:
                await super().__call__(scope, receive, written)
        finally:
            if self.told is not None and watch.written:
                with anyio.CancelScope(shield=True):
                    await self.told(watch.written if is_whole else watch.written - 1)


def write_without_lock(request: Request) -> None:
    """Write the answer to a request without the interpreter's lock; over TLS it is written as usual.

    uvloop holds the lock while it writes, and writing a slab of 1 MiB takes half as long as opening one.
    """
    cycle = cycle_of(request.scope)
    if cycle is not None and cycle.transport.get_extra_info("sslcontext") is None:
        cycle.transport = DownloadWriter(cycle.transport)


class DownloadWriter(asyncio.Transport):
    """Replaces the transport of uvicorn's cycle for one answer."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport

    def write(self, data: Buffer) -> None:
        """Write what the socket takes of large data at once; the transport writes the rest."""
        transport = self._transport
        rest = memoryview(data)
        if len(rest) >= _LARGE_BYTES and not transport.is_closing() and not transport.get_write_buffer_size():
            rest = rest[self._taken(rest) :]
        if rest:
            transport.write(rest)

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def _taken(self, data: memoryview) -> int:
        """The number of bytes taken. Asks for the descriptor each time: a closed one may be reused."""
        try:
            return os.write(self._transport.get_extra_info("socket").fileno(), data)
        except OSError:  # full, or broken, which the transport will notice
            return 0
