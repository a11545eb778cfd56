"""The HTTP/1.1 of every port: what is read as a request, in which order answers come, what is refused."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from kms_core.http_protocol import (
    HEAD_BYTES,
    HEADERS,
    PIPELINED,
    ConnectionLimits,
    Connections,
    EvictionClass,
    HttpProtocol,
)
from support.http_cases import MALFORMED
from support.waiting import WAIT_S

BEGUN: Final = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
INNER: Final = b"GET /inner HTTP/1.1\r\nHost: localhost\r\n\r\n"
Answer = tuple[int, dict[str, str], Any]
pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """What the application was asked, as JSON."""
    request = Request(scope, receive)
    with suppress(ClientDisconnect):
        body = await request.body()
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        seen = {"method": request.method, "path": request.url.path, "body": body.decode(), "headers": headers}
        await JSONResponse(seen)(scope, receive, send)


class Slow:
    """Answers as ``echo`` does, to requests for these paths only when ``go`` is set."""

    def __init__(self, paths: str = "/") -> None:
        self.paths = paths
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(self.paths):
            await self.go.wait()
        await echo(scope, receive, send)


class Server:
    """A server, and the protocols of the connections that it accepts."""

    def __init__(self, port: int, accepted: "asyncio.Queue[HttpProtocol]") -> None:
        self.port = port
        self._accepted = accepted
        self.clients: list[Client] = []

    async def connect(self) -> "Client":
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.clients.append(Client(reader, writer, await self._accepted.get()))
        return self.clients[-1]

    async def close(self) -> None:
        for each in self.clients:
            each.writer.close()
            with suppress(ConnectionError):
                await each.writer.wait_closed()
        self.clients.clear()


class Client:
    """One connection, whose server side can be given bytes exactly as they are cut."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, protocol: HttpProtocol
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.protocol = protocol

    async def arrive(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            if piece and not self.protocol.transport.is_closing():
                self.protocol.data_received(piece)
            await asyncio.sleep(0)

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        if head[0].endswith("100 Continue"):
            return await self.answer()
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, json.loads(body)

    async def answers(self) -> list[Answer]:
        """All of them until the server closes."""
        found = []
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                found.append(await self.answer())
        return found


@asynccontextmanager
async def served(
    app: Any = echo,  # noqa: ANN401 -- any ASGI application
    connections: Connections | None = None,
) -> AsyncIterator[Server]:
    config, state = uvicorn.Config(app, lifespan="off", log_config=None, ws="none"), ServerState()
    accepted: asyncio.Queue[HttpProtocol] = asyncio.Queue()
    bound = connections or Connections()

    class Accepted(HttpProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
            super().connection_made(transport)
            accepted.put_nowait(self)

    def protocol() -> HttpProtocol:
        return Accepted(config=config, server_state=state, app_state={}, connections=bound)

    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1")
    async with asyncio.timeout(WAIT_S), server:
        serving = Server(server.sockets[0].getsockname()[1], accepted)
        try:
            yield serving
        finally:
            await serving.close()


async def answers_to(*pieces: bytes) -> list[Answer]:
    """The answers on one connection on which these pieces arrive."""
    async with served() as server:
        client = await server.connect()
        await client.arrive(pieces)
        return await client.answers()


def request(line: str, body: bytes = b"", *headers: str, chunked: bool = False) -> bytes:
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    framing = [length] if body else []
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    head = "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *headers, *framing])
    return head.encode() + b"\r\n\r\n" + sent


def seen(answers: Sequence[Answer]) -> list[tuple[str, str, str]]:
    return [(body["method"], body["path"], body["body"]) for status, _, body in answers if status == 200]


def cuts(whole: bytes) -> Iterator[list[bytes]]:
    yield [whole]
    for at in range(1, len(whole)):
        yield [whole[:at], whole[at:]]
    yield [whole[at : at + 1] for at in range(len(whole))]


H2C: Final = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
WEBSOCKET: Final = ("Connection: keep-alive, upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
EXPECTING: Final = (*H2C, "Expect: 100-continue")
LAST: Final = request("GET /last", b"", "Connection: close")
CASES: Final = {
    "h2c": (request("POST /a", INNER, *H2C), [("POST", "/a", INNER.decode())]),
    "websocket": (request("POST /a", INNER, *WEBSOCKET), [("POST", "/a", INNER.decode())]),
    "chunked": (request("POST /a", INNER, *H2C, chunked=True), [("POST", "/a", INNER.decode())]),
    "expect": (request("POST /a", INNER, *EXPECTING), [("POST", "/a", INNER.decode())]),
    "without-body": (request("GET /a", b"", *WEBSOCKET), [("GET", "/a", "")]),
    "twice": (
        request("POST /a", b"one", *H2C) + request("PUT /b", b"two", *WEBSOCKET),
        [("POST", "/a", "one"), ("PUT", "/b", "two")],
    ),
    "behind-another": (
        request("POST /a", b"one") + request("PUT /b", INNER, *H2C),
        [("POST", "/a", "one"), ("PUT", "/b", INNER.decode())],
    ),
    "list": (request("LIST /keys"), [("LIST", "/keys", "")]),
    "list-upgrade": (request("LIST /keys", b"", *H2C), [("LIST", "/keys", "")]),
    "list-in-a-body": (
        request("POST /a", b"\r\n\r\nLIST /x HTTP/1.1\r\n\r\n") + request("GET /b"),
        [("POST", "/a", "\r\n\r\nLIST /x HTTP/1.1\r\n\r\n"), ("GET", "/b", "")],
    ),
    "list-before-others": (
        request("LIST /b") + request("POST /c", b"LIST "),
        [("LIST", "/b", ""), ("POST", "/c", "LIST ")],
    ),
    "empty-lines-before": (
        b"\r\n\r\n" + request("LIST /a") + b"\r\n" + request("GET /b"),
        [("LIST", "/a", ""), ("GET", "/b", "")],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
async def test_each_request_has_its_own_body_wherever_the_network_cuts(
    case: tuple[bytes, list[tuple[str, str, str]]],
) -> None:
    sent, expected = case
    wrong = []
    async with served() as server:
        for pieces in cuts(sent + LAST):
            client = await server.connect()
            await client.arrive(pieces)
            found = seen(await client.answers())
            await server.close()
            if found != [*expected, ("GET", "/last", "")]:
                wrong.append((pieces, found))

    assert wrong == []


@pytest.mark.parametrize("size", [3000, 300_000])
async def test_large_bodies_end_where_they_say(size: int) -> None:
    body = b"LIST " * (size // 5)
    found = seen(await answers_to(request("POST /a", body) + LAST))

    assert found == [("POST", "/a", body.decode()), ("GET", "/last", "")]


async def test_list_on_a_connection_that_was_used() -> None:
    async with served() as server:
        client = await server.connect()
        found = []
        for line in ("GET /a", "LIST /b", "POST /c", "LIST /d"):
            client.writer.write(request(line))
            found += seen([await client.answer()])

    assert found == [("GET", "/a", ""), ("LIST", "/b", ""), ("POST", "/c", ""), ("LIST", "/d", "")]


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
async def test_list_behind_a_body_in_one_piece_is_refused_and_never_a_body(*, chunked: bool) -> None:
    found = await answers_to(request("POST /a", b"one", chunked=chunked) + request("LIST /b") + LAST)

    assert seen(found) == [("POST", "/a", "one")]
    assert [status for status, _, _ in found] == [200, 400]


async def test_an_upgrade_that_is_ignored_is_not_seen_and_other_options_are() -> None:
    sent = request("POST /a", b"x", "Connection: close, Upgrade", "Upgrade: h2c", "X-A: b")
    [(_, headers, body)] = await answers_to(sent)

    assert body["headers"] == {"x-a": "b", "connection": "close", "content-length": "1"}
    assert headers["connection"] == "close"


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=list(MALFORMED))
async def test_malformed_requests_are_refused_and_the_connection_is_closed(sent: bytes) -> None:
    for pieces in ([sent], [sent[:9], sent[9:]]):
        [(status, headers, problem)] = await answers_to(*pieces, INNER)

        assert (status, headers["connection"]) == (400, "close")
        assert headers["content-type"] == "application/problem+json"
        assert problem["code"] == "invalid_request"


async def test_what_is_malformed_is_refused_after_the_answers_before_it() -> None:
    slow = Slow()
    async with served(slow) as server:
        client = await server.connect()
        await client.arrive(
            [request("POST /a", b"one") + request("POST /b", b"two"), b"garbage\r\n\r\n", INNER]
        )
        slow.go.set()
        found = await client.answers()

    assert seen(found) == [("POST", "/a", "one"), ("POST", "/b", "two")]
    assert [status for status, _, _ in found] == [200, 200, 400]


@pytest.mark.parametrize("before", [b"", request("GET /a")], ids=["first", "second"])
async def test_a_body_that_becomes_malformed_is_refused_and_its_request_is_not_served(before: bytes) -> None:
    broken = b"POST /b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcX"
    found = await answers_to(before + broken)

    assert [status for status, _, _ in found] == [*[200] * bool(before), 400]


async def test_every_request_of_a_lost_connection_is_told() -> None:
    """uvicorn tells the last one only: others went on, and failed at a closed transport."""
    told: asyncio.Queue[str] = asyncio.Queue()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, send
        await receive()
        told.put_nowait("began")
        told.put_nowait((await receive())["type"])

    async with served(app) as server:
        client = await server.connect()
        await client.arrive([request("GET /a") + request("GET /b")])
        began = await told.get()
        client.writer.transport.abort()
        ended = await told.get()

    assert (began, ended) == ("began", "http.disconnect")
    assert told.empty()  # the second one is not begun


# -- connections -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"", BEGUN, b"LIS"], ids=["silent", "dripping", "list"])
async def test_a_connection_without_a_request_ends_and_one_with_a_slow_answer_does_not(first: bytes) -> None:
    slow = Slow()
    async with served(slow, Connections(ConnectionLimits(timeout_s=0.05))) as server:
        patient, dripping = await server.connect(), await server.connect()
        patient.writer.write(INNER)
        dripping.writer.write(first)
        end = asyncio.create_task(dripping.reader.read())
        while not end.done():
            if first == BEGUN and not dripping.writer.is_closing():
                dripping.writer.write(b"x")
            await asyncio.wait({end}, timeout=0.01)
        slow.go.set()
        status, _, _ = await patient.answer()

    assert end.exception() or end.result() == b""
    assert status == 200


@pytest.mark.parametrize("sent", [b"\r\n", BEGUN, b"LIS"], ids=["empty lines", "dripping", "list"])
async def test_a_connection_is_kept_after_a_response_and_ends_once_bytes_make_no_request(sent: bytes) -> None:
    """Proxies keep theirs for 60 s: one that the service closes before is a failed call of a client."""
    async with served(echo, Connections(ConnectionLimits(timeout_s=0.01))) as server:
        kept, other = await server.connect(), await server.connect()
        for each in (kept, other):
            each.writer.write(INNER)
            await each.answer()
        other.writer.write(sent)
        with suppress(ConnectionResetError):
            assert await other.reader.read() == b""
        rounds = [await server.connect() for _ in range(3)]  # each ends after two checks of its own
        for each in rounds:
            with suppress(ConnectionResetError):
                await each.reader.read()
        kept.writer.write(INNER)
        status, _, _ = await kept.answer()

    assert status == 200


async def test_a_head_is_held_up_to_a_bound() -> None:
    async with served() as server:
        client = await server.connect()
        client.writer.write(BEGUN)
        with suppress(ConnectionError):  # the other side closes while we write
            for _ in range(32 * HEAD_BYTES // 4096):
                client.writer.write(b"x" * 4096)
                await client.writer.drain()
                await asyncio.sleep(0)
            client.writer.write(b"\r\n")
        read = asyncio.ensure_future(client.reader.read())
        await asyncio.wait({read})

    assert read.exception() or read.result().startswith(b"HTTP/1.1 431 ")


LONG_HEADS: Final = {
    "many-headers": b"GET / HTTP/1.1\r\n" + b"a:\r\n" * (HEADERS + 1) + b"\r\n",
    "many-headers-without-end": b"GET / HTTP/1.1\r\n" + b"a:\r\n" * (HEADERS + 2),
    "whole-and-long": b"GET / HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES + b"\r\n\r\n",
    "long-line-in-one-piece": b"GET / HTTP/1.1\r\nX: " + b"x" * (HEAD_BYTES + 1),
    "long-line-after-headers": b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\nY: " + b"y" * 30_000,
    "long-target": b"GET /" + b"x" * (HEAD_BYTES + 1),
    "long-headers": b"GET / HTTP/1.1\r\n" + (b"X: " + b"x" * (HEAD_BYTES // 40) + b"\r\n") * 41 + b"\r\n",
}


@pytest.mark.parametrize("sent", LONG_HEADS.values(), ids=list(LONG_HEADS))
@pytest.mark.parametrize("pieces", [1, 7])
async def test_a_head_has_a_bound_however_it_comes(sent: bytes, pieces: int) -> None:
    step = len(sent) // pieces + 1
    [(status, _, problem)] = await answers_to(*(sent[at : at + step] for at in range(0, len(sent), step)))

    assert (status, problem["code"]) == (431, "invalid_request")


async def test_a_head_of_the_greatest_number_of_headers_is_read() -> None:
    sent = request("GET /a", b"", *["A: b"] * (HEADERS - 2), "Connection: close")

    assert seen(await answers_to(sent)) == [("GET", "/a", "")]


# -- trailers --------------------------------------------------------------------------------------


def with_trailer(trailer: bytes) -> bytes:
    whole = request("POST /a", b"one", chunked=True)
    return whole.removesuffix(b"\r\n") + trailer + b"\r\n\r\n"


@pytest.mark.parametrize("apart", [False, True])
async def test_a_trailer_is_no_header(apart: bool) -> None:
    whole = with_trailer(b"Authorization: Bearer x\r\nX-Forwarded-For: 203.0.113.1\r\nHost: localhost")
    at = whole.index(b"Authorization") if apart else len(whole)
    [(_, _, body), last] = await answers_to(whole[:at], whole[at:] + LAST)

    assert body["headers"] == {"transfer-encoding": "chunked"}
    assert body["body"] == "one"
    assert seen([last]) == [("GET", "/last", "")]


@pytest.mark.parametrize("cut", [0, 1], ids=["whole", "apart"])
async def test_a_trailer_that_ends_the_connection_is_told_and_swallows_no_request(cut: int) -> None:
    """The parser takes nothing after it: a connection left open would answer nobody."""
    whole = with_trailer(b"Connection: close")
    at = whole.index(b"Connection: close") if cut else len(whole)
    [(status, headers, _)] = await answers_to(whole[:at], whole[at:], LAST)

    assert (status, headers["connection"]) == (200, "close")


async def test_a_trailer_after_the_answer_ends_the_connection() -> None:
    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({})(scope, receive, send)

    whole = with_trailer(b"Connection: close")
    at = whole.index(b"Connection: close")
    async with served(early) as server:
        client = await server.connect()
        await client.arrive([whole[:at]])
        first = await client.answer()
        await client.arrive([whole[at:]])
        rest = await client.reader.read()

    assert first[0] == 200
    assert rest == b""


async def test_requests_that_wait_on_a_connection_have_a_bound() -> None:
    slow = Slow()
    async with served(slow) as server:
        client = await server.connect()
        await client.arrive([request("GET /a") * (PIPELINED + 20)])
        slow.go.set()
        found = await client.answers()

    assert [status for status, _, _ in found] == [*[200] * (PIPELINED + 1), 429]


async def test_a_source_has_at_most_half_of_the_connections_and_its_own_end_first() -> None:
    async with served(echo, Connections(ConnectionLimits(most=8))) as server:
        mine = [await server.connect() for _ in range(8)]
        ended_ = [await each.reader.read() for each in mine[:4]]
        mine[-1].writer.write(LAST)
        last = await mine[-1].answer()

    assert ended_ == [b""] * 4
    assert last[0] == 200


@pytest.mark.parametrize("ends_unread", [True, False])
async def test_a_client_that_reads_nothing_makes_room_and_ends_where_limits_say(
    ends_unread: bool,
) -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(400):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    limits = ConnectionLimits(timeout_s=0.05, ends_unread=ends_unread)
    async with served(large, Connections(limits)) as server:
        client = await server.connect()
        client.writer.write(INNER)
        await asyncio.sleep(0.3)
        reason = client.protocol.eviction_class()
        has_ended = client.protocol.transport.is_closing()

    assert has_ended == ends_unread
    assert ends_unread or reason is EvictionClass.UNREAD


async def test_above_the_bound_the_oldest_silent_connection_ends_and_requests_go_on() -> None:
    slow = Slow("/slow")
    async with served(slow, Connections(ConnectionLimits(most=4, is_proxy=lambda _: True))) as server:
        busy, used = await server.connect(), await server.connect()
        busy.writer.write(request("GET /slow"))
        used.writer.write(request("GET /a"))
        await used.answer()
        silent = [await server.connect() for _ in range(20)]
        for each in silent:
            each.writer.write(b"GET / HTTP/1.1\r\nHo")
        await asyncio.gather(*(each.reader.read() for each in silent[:-2]))
        used.writer.write(request("GET /b"))
        again = await used.answer()
        slow.go.set()
        busy_status, _, _ = await busy.answer()
        silent[-1].writer.write(b"st: localhost\r\n\r\n")
        last = await silent[-1].answer()

    assert (busy_status, again[0], last[0]) == (200, 200, 200)


async def test_when_every_connection_is_busy_the_next_one_is_refused_and_told_to_come_again() -> None:
    slow = Slow()
    async with served(slow, Connections(ConnectionLimits(most=2, is_proxy=lambda _: True))) as server:
        busy = [await server.connect() for _ in range(2)]
        for each in busy:
            await each.arrive([INNER])
        refused = await (await server.connect()).answers()
        slow.go.set()
        statuses = [(await each.answer())[0] for each in busy]
        await asyncio.sleep(0.05)  # the port looks for room again
        used = await server.connect()
        used.writer.write(INNER)
        later = await used.answer()

    assert [(status, headers["retry-after"], body["code"]) for status, headers, body in refused] == [
        (429, "1", "rate_limited")
    ]
    assert statuses == [200, 200]
    assert later[0] == 200
