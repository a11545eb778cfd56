"""Bodies over real connections: uploads into slabs, and slabs made ahead of a reader."""

import asyncio
import contextvars
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Final

import pytest
import uvicorn
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from kms_api.transport import bodies, pace
from kms_api.transport.bodies import UploadReader
from kms_core.http_protocol import BODY, HttpProtocol
from kms_protocol.errors import BodyTimeout, DecryptFailed
from support.waiting import WAIT_S

SLAB: Final = 1000
SLABS: Final = [os.urandom(1024 * 1024) for _ in range(24)]
STALL_S: Final = 0.4
ABOUT: Final = contextvars.ContextVar("about", default="nothing")
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@asynccontextmanager
async def connected(app: ASGIApp) -> AsyncIterator[Connection]:
    """A connection to a server with this application."""
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


# -- uploads -------------------------------------------------------------------------------------------


@asynccontextmanager
async def taking(handler: Callable[[Request], Awaitable[str]]) -> AsyncIterator[Connection]:
    """A connection to a server that answers with what the handler returns."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = PlainTextResponse(await handler(Request(scope, receive)))
        await answer(scope, receive, send)

    async with connected(app) as connection:
        yield connection


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

    async with taking(digest) as (reader, writer):
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
    sent = [os.urandom(size) for size in (2500, 0, SLAB, 70_001)]

    async with taking(digest) as (reader, writer):
        writer.write(b"".join(head(f"Content-Length: {len(body)}") + body for body in sent))

        assert [await answered(reader) for _ in sent] == [expected(body) for body in sent]


async def test_a_sender_that_waits_to_go_on_is_told_to() -> None:
    async with taking(digest) as (reader, writer):
        writer.write(head("Content-Length: 5", "Expect: 100-continue"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello")

        assert await answered(reader) == expected(b"hello")


async def test_what_is_left_of_a_refused_body_is_passed_over() -> None:
    async def first_slab(request: Request) -> str:
        if request.url.path == "/":
            await UploadReader(request).fill(memoryview(bytearray(SLAB)))
        return request.url.path

    async with taking(first_slab) as (reader, writer):
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

    async with taking(watched) as (_, writer):
        writer.write(head("Content-Length: 500000") + bytes(sent))
        writer.close()

        assert isinstance(await ended, ClientDisconnect)


@pytest.mark.parametrize("sent", [0, 20, SLAB], ids=str)
async def test_a_sender_that_stalls_is_given_up_and_one_that_drips_is_not(
    sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "STALL_S", STALL_S)

    async def stalled(request: Request) -> str:
        slab = bytearray(SLAB)
        with pytest.raises(BodyTimeout):
            await UploadReader(request).fill(memoryview(slab))
        return str(slab.count(b"x"))

    async with taking(stalled) as (reader, writer):
        writer.write(head("Content-Length: 500000"))
        for _ in range(20 if sent else 0):
            writer.write(b"x" * (sent // 20))
            await asyncio.sleep(2.5 * STALL_S / 20)

        assert await answered(reader) == str(sent)


@pytest.mark.parametrize(("a_second", "is_taken"), [(200, False), (8000, True)], ids=["below", "above"])
async def test_a_sender_keeps_the_pace_or_is_given_up(
    a_second: int, monkeypatch: pytest.MonkeyPatch, *, is_taken: bool
) -> None:
    monkeypatch.setattr(pace, "GRACE_S", 0.4)
    monkeypatch.setattr(pace, "BYTES_PER_S", 2000)

    async def handler(request: Request) -> str:
        try:
            return await digest(request)
        except BodyTimeout:
            return "too slow"

    count, pause_s = 20, 0.1
    size = int(a_second * pause_s)
    async with taking(handler) as (reader, writer):
        writer.write(head(f"Content-Length: {count * size}"))
        for _ in range(count):
            writer.write(bytes(size))
            await asyncio.sleep(pause_s)

        assert await answered(reader) == (expected(bytes(count * size)) if is_taken else "too slow")


# -- answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "waits", "sent"), [(b"abc", False, 3), (b"abc", True, 2), (b"", False, 0)])
async def test_a_reader_that_closes_once_it_has_all_bytes_was_sent_all(
    data: bytes, *, waits: bool, sent: int
) -> None:
    """Before the end of the answer is processed, and unless bytes still wait in the transport."""
    told: list[int] = []
    gone = asyncio.Event()
    transport = SimpleNamespace(get_write_buffer_size=lambda: 0)
    cycle = SimpleNamespace(disconnected=False, flow=SimpleNamespace(write_paused=False), transport=transport)

    async def body() -> AsyncIterator[bytes]:
        if data:
            yield data
        cycle.disconnected = True
        gone.set()
        await asyncio.sleep(WAIT_S)

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        cycle.flow.write_paused = waits and bool(message.get("body"))

    async def note(count: int) -> None:
        told.append(count)

    answer = bodies.WatchedResponse(body(), headers={"Content-Length": str(len(data))})
    answer.on_end = note
    await answer({"type": "http", "state": {BODY: (None, cycle)}}, receive, send)

    assert told == [sent]


# -- slabs made ahead of a slow reader -----------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


async def test_slabs_come_in_order_from_threads_that_know_the_request(threads: ThreadPoolExecutor) -> None:
    def numbers() -> Generator[tuple[int, str, bool]]:
        for number in range(100):
            yield number, ABOUT.get(), threading.current_thread() is threading.main_thread()

    ABOUT.set("this request")

    found = [slab async for slab in bodies.send(numbers(), threads)]
    assert found == [(number, "this request", False) for number in range(100)]


async def test_slabs_before_a_forged_one_are_sent_and_then_it_raises(threads: ThreadPoolExecutor) -> None:
    def forged() -> Generator[bytes]:
        yield b"genuine"
        raise DecryptFailed

    sending = bodies.send(forged(), threads)

    assert await anext(sending) == b"genuine"
    with pytest.raises(DecryptFailed):
        await anext(sending)


async def test_a_reader_that_goes_away_closes_the_source_once_nothing_runs_in_it(
    threads: ThreadPoolExecutor,
) -> None:
    may_go_on, closed = threading.Event(), threading.Event()

    def slow() -> Generator[bytes]:
        try:
            yield b"first"
            may_go_on.wait(60)
            yield b"second"
        finally:
            closed.set()

    sending = bodies.send(slow(), threads)
    first = await anext(sending)
    threading.Timer(0.05, may_go_on.set).start()
    await sending.aclose()

    assert first == b"first"
    assert closed.is_set()
