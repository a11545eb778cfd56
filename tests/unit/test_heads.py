"""Connections on which no request comes, and heads that do not end: at both of the service's ports."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from kms_api.facade.listener import PeerH11
from kms_api.tls import HEAD_BYTES, PeerProtocol

WAIT_S: Final = 60
BEGUN: Final = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
pytestmark = pytest.mark.anyio


class QuickTools(PeerProtocol):
    head_s = 0.05


class QuickH11(PeerH11):
    head_s = 0.05


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[QuickTools, QuickH11], ids=["httptools", "h11"])
def protocol(request: pytest.FixtureRequest) -> type[asyncio.Protocol]:
    found: type[asyncio.Protocol] = request.param
    return found


@asynccontextmanager
async def served(protocol: type[asyncio.Protocol], answer: asyncio.Event) -> AsyncIterator[int]:
    """The port of a server that answers when it may."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer.wait()
        await PlainTextResponse("done")(scope, receive, send)

    config, state = uvicorn.Config(app, lifespan="off", log_config=None), ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: protocol(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]  # as uvicorn makes them
        "127.0.0.1",
    )
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("first", [b"", BEGUN], ids=["silent", "dripping"])
async def test_a_connection_without_a_request_ends_and_one_with_a_slow_answer_does_not(
    protocol: type[asyncio.Protocol], first: bytes
) -> None:
    answer = asyncio.Event()
    async with asyncio.timeout(WAIT_S), served(protocol, answer) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        idle, drip = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        drip.write(first)
        end = asyncio.create_task(idle.read())
        while not end.done():
            if first and not drip.is_closing():
                drip.write(b"x")
            await asyncio.wait({end}, timeout=0.01)
        answer.set()
        status = await reader.readline()
        writer.close()
        drip.close()

    assert end.exception() or end.result() == b""
    assert status == b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("protocol", [PeerProtocol, PeerH11], ids=["httptools", "h11"])
async def test_a_head_is_held_up_to_a_bound(protocol: type[asyncio.Protocol]) -> None:
    async with asyncio.timeout(WAIT_S), served(protocol, asyncio.Event()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(BEGUN)
        with suppress(ConnectionError):  # the other side closes while we write
            for _ in range(32 * HEAD_BYTES // 4096):
                writer.write(b"x" * 4096)
                await writer.drain()
                await asyncio.sleep(0)
            writer.write(b"\r\n")
        ended = asyncio.ensure_future(reader.read())
        await asyncio.wait({ended})
        writer.close()

    assert ended.exception() or ended.result().startswith(b"HTTP/1.1 400 ")
