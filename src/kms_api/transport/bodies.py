"""Bodies of any size: a thread works on one slab while the event loop receives or sends another.

A slow or silent peer holds no thread.
"""

import asyncio
import contextvars
import mmap
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from kms_api.transport.pace import CHECK_S, ReaderWatch, TransferRate, connection_of, uvicorn_cycle
from kms_protocol.errors import BodyTimeout, InvalidRequest

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Slab = tuple[memoryview, bool]
"""Bytes, and whether more follow. Valid until the next slab is requested."""
_SLAB_BYTES: Final = 1024 * 1024
_SLOW: Final = "The body came too slowly, or stopped arriving"


def refuse_encoding(request: Request) -> None:
    """Raise InvalidRequest for a compressed body, which would make size limits meaningless."""
    headers = dict(reversed(request.scope["headers"]))  # of headers of one name the first counts
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise InvalidRequest("Content-Encoding is not accepted: send the bytes as they are")


async def receive(request: Request, sink: Generator[None, Slab, T], threads: Executor) -> T:
    """Send a body to ``sink`` slab by slab, in threads. Returns what the sink returns after the last slab.

    The sink starts before the body is read, and is closed if that breaks off. Raises what the sink raises,
    InvalidRequest for a compressed body, ClientDisconnect, and BodyTimeout for a sender that is too slow.
    """
    refuse_encoding(request)
    worker = Worker(threads)
    try:
        await outcome(await worker.begin(next, sink))
        reader = UploadReader(request)
        slab, other = (memoryview(mmap.mmap(-1, _SLAB_BYTES)) for _ in range(2))  # pages cost once filled
        size, more = await reader.fill(slab)
        while more:
            await worker.begin(sink.send, (slab, True))
            slab, other = other, slab
            size, more = await reader.fill(slab)
        return await outcome(await worker.begin(_last, sink, slab[:size]))
    finally:
        await worker.close(sink)


def _last(sink: Generator[None, Slab, T], slab: memoryview) -> T:
    try:
        sink.send((slab, False))
    except StopIteration as ended:
        returned: T = ended.value
        return returned
    raise RuntimeError("the sink wants more than the last slab")


class Worker:
    """Runs one call at a time in the threads of a pool, each in the context that this was made in."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._context = contextvars.copy_context()
        self._latest: asyncio.Future[Any] | None = None

    async def begin(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Start a call once the one before has ended. Raises what that one raised."""
        if self._latest:
            await outcome(self._latest)
        run = partial(self._context.run, function, *args, **kwargs)
        call = asyncio.get_running_loop().run_in_executor(self._threads, run)
        self._latest = call
        return call

    async def close(self, generator: Generator[object, Any, object]) -> None:
        """Close the generator that the calls went through, once none of them is in it any more."""
        with anyio.CancelScope(shield=True):
            if self._latest:
                await asyncio.wait([self._latest])
                self._latest.exception()  # was raised before, unless the body broke off for another reason
            await asyncio.get_running_loop().run_in_executor(self._threads, generator.close)


async def outcome(call: asyncio.Future[R]) -> R:
    """The result of a call, which is not cancelled with its caller. Raises what the call raised."""
    if not call.done():
        await asyncio.wait([call])
    return call.result()


class UploadReader:
    """Reads a body straight into slabs, with one wake-up and one copy for each slab.

    ``Request.stream`` wakes a task for each read of the socket, and copies its bytes three times. Reads ahead
    by no more than one read of the socket.
    """

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        self._rate = TransferRate()
        self._connection, self._cycle = connection_of(request.scope)
        self._rest = bytearray()  # arrived, but did not fit
        self._slab = memoryview(b"")
        self._in_slab = 0  # bytes
        self._in_earlier_slabs = 0  # bytes
        self._started = False

    async def fill(self, slab: memoryview) -> tuple[int, bool]:
        """Fill a slab, unless the body ends before. Returns the bytes in it, and whether more follow.

        Raises ClientDisconnect if the body breaks off, BodyTimeout if the sender is too slow.
        """
        self._in_earlier_slabs += self._in_slab
        self._slab, self._in_slab = slab, 0
        self._rate.wait()
        rest, self._rest = self._rest, bytearray()
        self._put(memoryview(rest))
        if not self._started:
            await self._start()
        while self._cycle.more_body and not self._rest:
            if self._cycle.disconnected:
                raise ClientDisconnect
            self._cycle.message_event.clear()
            self._connection.flow.resume_reading()
            await self._wait_until_full()
        return self._in_slab, bool(self._rest)

    def _take(self, data: bytes) -> None:
        """Take bytes from the protocol, which stops reading at the first byte that does not fit."""
        if self._cycle.response_complete:
            return  # the request was refused: the rest is dropped
        self._put(memoryview(data))
        if self._rest:
            self._connection.flow.pause_reading()
            self._cycle.message_event.set()

    def _put(self, data: memoryview) -> None:
        size = min(len(data), len(self._slab) - self._in_slab)
        self._slab[self._in_slab : self._in_slab + size] = data[:size]
        self._in_slab += size
        self._rest += data[size:]

    async def _start(self) -> None:
        """Take the first bytes from uvicorn, which also answers ``Expect: 100-continue``."""
        self._started = True
        message = None
        while message is None:
            with anyio.move_on_after(CHECK_S):
                message = await self._receive()
            self._check()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._put(memoryview(message["body"]))
        if self._cycle.more_body:
            self._connection.inlet = self._take

    async def _wait_until_full(self) -> None:
        """Wait until the slab is full, or the body has ended or broken off."""
        while not self._cycle.message_event.is_set():
            with anyio.move_on_after(CHECK_S):
                await self._cycle.message_event.wait()
            self._check()

    def _check(self) -> None:
        if self._rate.left_s(self._in_earlier_slabs + self._in_slab) <= 0:
            raise BodyTimeout(_SLOW)


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

    on_end: Callable[[int], Awaitable[None]] | None = None
    """Called at the end with the number of bytes sent: fewer than all if the reader went away before.

    An answer with a Content-Length is all sent once the connection has taken so many bytes: a reader that has
    them may close it before the end of the answer is processed here.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = uvicorn_cycle(scope)
        if cycle is None:
            await super().__call__(scope, receive, send)
            return
        watch, size = ReaderWatch(cycle), int(self.headers.get("content-length", "-1"))
        sent, is_whole = 0, False

        async def written(message: Message) -> None:
            nonlocal sent, is_whole
            sent += len(message.get("body", b""))
            watch.written += len(message.get("body", b""))
            await send(message)
            is_whole |= sent == size and not cycle.disconnected and not cycle.flow.write_paused

        try:
            with watch:
                await super().__call__(scope, receive, written)
        finally:
            if self.on_end is not None and (sent or is_whole):
                with anyio.CancelScope(shield=True):
                    await self.on_end(sent if is_whole else sent - 1)
