"""Bodies into slabs, over real connections: whole, in order, and ended by senders that stall or go away."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import pytest
import uvicorn
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from kms_api.transport import admission
from kms_api.transport.bodies import UploadReader
from kms_core.http_protocol import HttpProtocol
from kms_protocol.errors import BodyTimeout
from support.waiting import WAIT_S

SLAB: Final = 1000
pytestmark = pytest.mark.anyio
Handler = Callable[[Request], Awaitable[str]]


STALL_S: Final = 0.4


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server that answers with what the handler returns."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = PlainTextResponse(await handler(Request(scope, receive)))
        await answer(scope, receive, send)

    config, state = uvicorn.Config(app, lifespan="off", log_config=None), ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpProtocol(config=config, server_state=state, app_state={}), "127.0.0.1"
    )
    async with asyncio.timeout(WAIT_S), server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            yield reader, writer
        finally:
            writer.close()


async def digest(request: Request) -> str:
    """How many slabs the body filled, the size of the last, and the digest of all."""
    inlet, slab, count, hasher = (
        UploadReader(request),
        memoryview(bytearray(SLAB)),
        0,
        hashlib.sha256(),
    )
    size, more = await inlet.fill(slab)
    while more:
        assert size == SLAB
        hasher.update(slab)
        count += 1
        await asyncio.sleep(0)
        size, more = await inlet.fill(slab)
    hasher.update(slab[:size])
    return f"{count} {size} {hasher.hexdigest()}"


def expected(data: bytes) -> str:
    count = max(0, len(data) - 1) // SLAB
    return f"{count} {len(data) - count * SLAB} {hashlib.sha256(data).hexdigest()}"


def head(framing: str, *more: str) -> bytes:
    return "\r\n".join(["POST / HTTP/1.1", "Host: localhost", framing, *more, "", ""]).encode()


async def answered(reader: asyncio.StreamReader) -> str:
    said = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in said.lower().split(b"\r\n") if line.startswith(b"content-length"))
    return (await reader.readexactly(int(length.split(b":")[1]))).decode()


@pytest.mark.parametrize("size", [0, 1, SLAB - 1, SLAB, SLAB + 1, 2 * SLAB, 300_000], ids=str)
@pytest.mark.parametrize("step", [7, SLAB, 70_000], ids=str)
@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
async def test_a_body_fills_slabs_in_order(size: int, step: int, *, chunked: bool) -> None:
    data = os.urandom(min(size, 3000 * step))
    pieces = [data[start : start + step] for start in range(0, len(data), step)]

    async with served(digest) as (reader, writer):
        for _ in range(2):  # the connection is good for the next request
            if chunked:
                writer.write(head("Transfer-Encoding: chunked"))
                writer.write(b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces))
                writer.write(b"0\r\n\r\n")
            else:
                writer.write(head(f"Content-Length: {len(data)}"))
                writer.writelines(pieces)

            assert await answered(reader) == expected(data)


async def test_requests_that_come_at_once_keep_their_bodies() -> None:
    bodies = [os.urandom(size) for size in (2500, 0, SLAB, 70_001)]

    async with served(digest) as (reader, writer):
        writer.write(b"".join(head(f"Content-Length: {len(body)}") + body for body in bodies))

        assert [await answered(reader) for _ in bodies] == [expected(body) for body in bodies]


async def test_a_sender_that_waits_to_go_on_is_told_to() -> None:
    async with served(digest) as (reader, writer):
        writer.write(head("Content-Length: 5", "Expect: 100-continue"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello")

        assert await answered(reader) == expected(b"hello")


async def test_what_is_left_of_a_refused_body_is_passed_over() -> None:
    async def first_slab(request: Request) -> str:
        if request.url.path == "/":
            await UploadReader(request).fill(memoryview(bytearray(SLAB)))
        return request.url.path

    async with served(first_slab) as (reader, writer):
        writer.write(head("Content-Length: 500000") + bytes(100_000))
        assert await answered(reader) == "/"
        writer.write(bytes(400_000) + b"GET /next HTTP/1.1\r\nHost: localhost\r\n\r\n")

        assert await answered(reader) == "/next"


@pytest.mark.parametrize("sent", [0, 10, 2 * SLAB + 1, 200_000], ids=str)
async def test_a_body_that_breaks_off_raises(sent: int) -> None:
    ended = asyncio.get_running_loop().create_future()

    async def watched(request: Request) -> str:
        try:
            return await digest(request)
        except ClientDisconnect as exc:
            ended.set_result(exc)
            return ""

    async with served(watched) as (_, writer):
        writer.write(head("Content-Length: 500000") + bytes(sent))
        writer.close()

        assert isinstance(await ended, ClientDisconnect)


@pytest.mark.parametrize("sent", [0, 20, SLAB], ids=str)
async def test_a_sender_that_stalls_is_given_up_and_one_that_drips_is_not(
    sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "STALL_S", STALL_S)

    async def stalled(request: Request) -> str:
        slab = bytearray(SLAB)
        with pytest.raises(BodyTimeout):
            await UploadReader(request).fill(memoryview(slab))
        return str(slab.count(b"x"))

    async with served(stalled) as (reader, writer):
        writer.write(head("Content-Length: 500000"))
        for _ in range(20 if sent else 0):
            writer.write(b"x" * (sent // 20))
            await asyncio.sleep(2.5 * STALL_S / 20)

        assert await answered(reader) == str(sent)


async def by_slabs(request: Request) -> int:
    inlet, slab, whole = UploadReader(request), memoryview(bytearray(SLAB)), 0
    size, more = await inlet.fill(slab)
    while more:
        whole += size
        size, more = await inlet.fill(slab)
    return whole + size


@pytest.mark.parametrize(("a_second", "is_taken"), [(200, False), (8000, True)], ids=["below", "above"])
async def test_a_sender_keeps_the_pace_or_is_given_up(
    a_second: int, monkeypatch: pytest.MonkeyPatch, *, is_taken: bool
) -> None:
    monkeypatch.setattr(admission, "GRACE_S", 0.4)
    monkeypatch.setattr(admission, "BYTES_PER_S", 2000)

    async def handler(request: Request) -> str:
        try:
            return str(await by_slabs(request))
        except BodyTimeout:
            return "too slow"

    count, pause_s = 20, 0.1
    size = int(a_second * pause_s)
    async with served(handler) as (reader, writer):
        writer.write(head(f"Content-Length: {count * size}"))
        for _ in range(count):
            writer.write(bytes(size))
            await asyncio.sleep(pause_s)

        assert await answered(reader) == (str(count * size) if is_taken else "too slow")
