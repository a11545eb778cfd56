"""Slabs to the socket by the shortest way, over real connections: whole and in order for any reader."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Final

import pytest
import uvicorn
from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from kms_api.transport import bodies
from kms_api.transport.bodies import DownloadWriter
from kms_core.http_protocol import BODY, HttpProtocol
from support.waiting import WAIT_S

SLABS: Final = [os.urandom(1024 * 1024) for _ in range(24)]
pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return str(request.param), {"use_uvloop": True}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much of each piece went straight to the socket."""
    sizes = []
    honest = DownloadWriter._taken  # noqa: SLF001 -- what is looked at

    def counted(self: DownloadWriter, piece: memoryview) -> int:
        sizes.append(honest(self, piece))
        return sizes[-1]

    monkeypatch.setattr(DownloadWriter, "_taken", counted)
    return sizes


@asynccontextmanager
async def served(
    slabs: Sequence[bytes], **headers: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which these slabs were asked for."""

    async def body() -> AsyncIterator[bytes]:
        for slab in slabs:
            yield slab

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.write_without_lock(Request(scope, receive))
        await StreamingResponse(body(), headers=headers)(scope, receive, send)

    config, state = uvicorn.Config(app, lifespan="off", log_config=None), ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpProtocol(config=config, server_state=state, app_state={}), "127.0.0.1"
    )
    async with asyncio.timeout(WAIT_S), server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        try:
            yield reader, writer
        finally:
            writer.close()


@pytest.mark.parametrize("pause_s", [0, 0.002], ids=["a quick reader", "a slow reader"])
async def test_every_byte_arrives_in_order(pause_s: float, taken: list[int]) -> None:
    whole = b"".join(SLABS)
    got = bytearray()
    async with served(SLABS, **{"Content-Length": str(len(whole))}) as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
        while len(got) < len(whole):
            got += await reader.read(100_000)
            await asyncio.sleep(pause_s)

    assert got == whole
    assert sum(taken) > 0


async def test_small_pieces_and_chunked_ones_stay_in_order_beside_large_ones(taken: list[int]) -> None:
    slabs = [b"small", SLABS[0], b"x" * 70_000, b"end"]
    async with served(slabs) as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
        got = bytearray()
        while size := int((await reader.readuntil(b"\r\n")), 16):
            got += (await reader.readexactly(size + 2))[:-2]

    assert got == b"".join(slabs)
    assert sum(taken) > 0


async def test_a_reader_that_goes_away_ends_the_answer_and_a_later_connection_gets_its_own(
    taken: list[int],
) -> None:
    async with served(SLABS * 4, **{"Content-Length": str(96 * 1024 * 1024)}) as (reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        async with served([SLABS[1]], **{"Content-Length": str(len(SLABS[1]))}) as (other, _):
            await other.readuntil(b"\r\n\r\n")
            assert await other.readexactly(len(SLABS[1])) == SLABS[1]

    assert sum(taken) > 0


@pytest.mark.parametrize(
    ("closing", "waiting", "size"),
    [(True, 0, 1 << 20), (False, 1, 1 << 20), (False, 0, 100)],
    ids=["a closing transport", "bytes that wait before it", "a small piece"],
)
def test_what_must_not_overtake_goes_the_usual_way(*, closing: bool, waiting: int, size: int) -> None:
    written: list[memoryview] = []
    transport = SimpleNamespace(
        is_closing=lambda: closing, get_write_buffer_size=lambda: waiting, write=written.append
    )

    DownloadWriter(transport).write(bytes(size))  # type: ignore[arg-type]  # would fail if it asked for the socket

    assert [len(piece) for piece in written] == [size]


def test_a_connection_with_tls_keeps_its_transport() -> None:
    def with_context(context: ssl.SSLContext | None) -> SimpleNamespace:
        return SimpleNamespace(transport=SimpleNamespace(get_extra_info={"sslcontext": context}.get))

    over_tls, plain = with_context(ssl.create_default_context()), with_context(None)
    before = over_tls.transport
    for cycle in (over_tls, plain):
        bodies.write_without_lock(Request({"type": "http", "state": {BODY: (None, cycle)}}))

    assert over_tls.transport is before
    assert isinstance(plain.transport, DownloadWriter)


# -- what was sent


@pytest.mark.parametrize(("waits", "sent"), [(False, 3), (True, 2)])
async def test_a_reader_that_closes_once_it_has_all_bytes_was_sent_all(*, waits: bool, sent: int) -> None:
    """Before the end of the answer is processed, and unless bytes still wait in the transport."""
    told: list[int] = []
    gone = asyncio.Event()
    transport = SimpleNamespace(get_write_buffer_size=lambda: 0)
    cycle = SimpleNamespace(disconnected=False, flow=SimpleNamespace(write_paused=False), transport=transport)

    async def body() -> AsyncIterator[bytes]:
        yield b"abc"
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

    answer = bodies.WatchedResponse(body(), headers={"Content-Length": "3"})
    answer.told = note
    await answer({"type": "http", "state": {BODY: (None, cycle)}}, receive, send)

    assert told == [sent]
