"""uvicorn's HTTP/1.1 protocol with what it leaves out of RFC 9110 and 9112, and what a KMS needs.

- An Upgrade is ignored and the body kept (RFC 9110 §7.8). httptools stops at the head of such a request, and
  uvicorn would drop the body or read it as the next request.
- The method LIST of Vault's clients is known, which httptools refuses.
- A malformed request is answered 400 after the answers of the requests before it.
- A head has a size and a time limit, and a port has a bound of connections.
- Each request has the client certificate of its connection in ``scope["state"]``, and there the way to read
  its body without a copy.
"""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, Protocol, cast

import httptools
import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from kms_core.auth import certificates
from kms_core.auth.certificates import Shown
from kms_core.http_server.connections import Connections, HeadTimer

CERTIFICATE: Final = "kms.certificate"
BODY: Final = "kms.body"
"""The key in ``scope["state"]`` of a pair: the protocol and the cycle of the request."""
HEAD_BYTES: Final = 64 * 1024
_SEARCHED_BYTES: Final = 2048
_LIST: Final = b"LIST "
_AS_GET: Final = b"GET "
_LINE_ENDS: Final = b"\r\n"
_HOP_BY_HOP: Final = (b"upgrade", b"connection")
NO_HEADERS: Final[Mapping[bytes, bytes]] = {}
_CLOSE: Final = {b"connection": b"close"}
_LAST: Final = {400: _CLOSE, 429: {**_CLOSE, b"retry-after": b"1"}}


class BodyReader(Protocol):
    """Takes what comes of a body in place of uvicorn's own buffer."""

    def put(self, piece: bytes) -> None:
        """Take the next bytes of the body."""


class HttpProtocol(HttpToolsProtocol):
    """One connection. uvicorn makes it; ``connections`` is shared by all of a port."""

    inlet: BodyReader | None = None

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bound = Connections() if connections is None else connections
        self._shown: Shown | None = None
        self._timer: HeadTimer | None = None
        self._answering: RequestResponseCycle | None = None
        self._requests = 0
        self._held = b""  # the beginning of a request line that may become LIST
        self._is_list = self._refused = False
        self._between, self._in_head = True, False
        self._head_bytes = self._body_bytes = 0
        self._declared: float | None = None
        self._upgrading = False

    # -- the connection ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(binary_form=True) if tls else None
        self._shown = certificates.read(der) if der else None
        if not self._bound.opened(self):
            self._refuse(
                429, "rate_limited", "This port has no room for another connection: try again in a second"
            )
        self._timer = HeadTimer(self.loop, self, self._bound)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        waiting = (cycle for cycle, _ in self.pipeline)
        for cycle in filter(None, (self._answering, *waiting)):  # uvicorn tells the last request only
            cycle.disconnected = True
            cycle.message_event.set()
        self.pipeline.clear()
        self._bound.closed(self)
        if self._timer is not None:
            self._timer.cancel()

    def end(self) -> None:
        """Close the connection."""
        self.transport.close()

    def idle_since(self) -> int | None:
        """The number of requests so far if none is under way, else None."""
        cycle = self._last()
        return self._requests if cycle is None or cycle.response_complete else None

    def _last(self) -> RequestResponseCycle | None:
        """The last request whose head was complete."""
        return self.cycle

    # -- what arrives ------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        in_head = self._in_head
        if self._may_hold_list(data):
            self._feed_requests(self._held + data)
        else:
            self._feed(data)
        if in_head and self._in_head:  # the piece in which it began may hold the end of a body, too
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self.send_400_response("The head of the request is too large")

    def _may_hold_list(self, data: bytes) -> bool:
        """Whether a LIST may begin, go on or end in this piece: such a piece is fed request by request.

        Large pieces are, too, since that costs less than to search them.
        """
        if self._between:
            if self._held:
                return True
        elif not self._in_head and len(data) <= self._body_left():
            return False
        return len(data) > _SEARCHED_BYTES or _LIST in data or data[-1] in _LIST

    def _feed_requests(self, data: bytes) -> None:
        """Feed a piece up to the end of each request in it, where the method of the next one is looked at.

        The end of a chunked body is known to the parser only, so the rest of the piece is fed with it, and a
        LIST in there is malformed.
        """
        self._held = b""
        at, view, end_of_head = 0, memoryview(data), b"\n"
        while at < len(data) and not self._refused:
            if self._between:
                at, end_of_head = self._begin(data, at), b"\r\n\r\n"
                continue
            if self._in_head:  # one that began in an earlier piece is fed line by line: its end may be cut
                found = data.find(end_of_head, at)
                end = found + len(end_of_head) if found >= 0 else len(data)
            else:
                end = int(min(len(data), at + self._body_left()))
            self._feed(view[at:end])
            at = end

    def _begin(self, data: bytes, at: int) -> int:
        """Feed the first bytes of the next request; where they end. LIST is fed as GET, and noted."""
        while at < len(data) and data[at] in _LINE_ENDS:  # RFC 9112 §2.2
            at += 1
        word = data[at : at + len(_LIST)]
        if word == _LIST:
            self._is_list = True
            self._feed(_AS_GET)
            return at + len(_LIST)
        if _LIST.startswith(word):
            self._held = word
            return len(data)
        self._feed(word[:1])
        return at + 1

    def _feed(self, data: bytes | memoryview) -> None:
        """Feed the parser, and again from where it stopped for an Upgrade."""
        while not self._refused:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stop:
                data = data[stop.args[0] :]
                self._ignore_upgrade()
            except httptools.HttpParserError:
                self.send_400_response("The request is malformed (RFC 9112)")
            else:
                return

    def _ignore_upgrade(self) -> None:
        """Give the head that the parser stopped at to a fresh parser, without the Upgrade."""
        self._upgrading = False
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self.send_400_response("CONNECT is not served here")
            return
        head = [method, b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name not in _HOP_BY_HOP:
                head += [name, b": ", value, b"\r\n"]
        kept = b", ".join(self._kept_options())
        head += [b"connection: ", kept, b"\r\n\r\n"] if kept else [b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._feed(b"".join(head))

    def _kept_options(self) -> list[bytes]:
        """The options of the Connection headers but for ``upgrade``."""
        given = [value for name, value in self.headers if name == b"connection"]
        options = [option.strip() for value in given for option in value.split(b",")]
        return [option for option in options if option and option.lower() != b"upgrade"]

    def _body_left(self) -> float:
        """The bytes of the body still to come; infinite for a chunked one."""
        if self._declared is None:
            headers = dict(self.headers)
            chunked = b"transfer-encoding" in headers
            self._declared = float("inf") if chunked else int(headers.get(b"content-length", 0))
        return self._declared - self._body_bytes

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # -- callbacks of the parser -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._between, self._in_head, self._head_bytes = False, True, 0
        self._body_bytes, self._declared = 0, None
        self.inlet = None
        if self._shown is not None:
            self.scope["state"][CERTIFICATE] = self._shown

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self.parser.should_upgrade():
            self._upgrading = True
            return
        super().on_headers_complete()
        self._requests += 1
        scope = self.scope
        if self._is_list:
            self._is_list, scope["method"] = False, "LIST"
        scope["state"][BODY] = self, self.cycle

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self.inlet is not None:
            self.inlet.put(body)
            return
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self._between, cycle = True, self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    # -- refusals ----------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Refuse what is malformed, after the answers of the requests before it, and close."""
        self._bound.count("malformed")
        self._refuse(400, "invalid_request", msg)

    def _refuse(self, status: int, code: str, detail: str) -> None:
        self._refused = True
        answer = cast("ASGI3Application", ProblemResponse(status, code, detail, _LAST[status]))
        waits = self.idle_since() is None
        if waits and self.cycle.more_body:  # the malformed one itself: its head was complete
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.pipeline:
                self.pipeline.popleft()
            elif self.cycle.response_started:
                self.transport.close()
                return
            else:
                waits = False
        self.cycle = self._last_cycle()
        if waits:
            self.pipeline.appendleft((self.cycle, answer))
        else:
            self._start_asgi_task(self.cycle, answer)

    def _last_cycle(self) -> RequestResponseCycle:
        """The cycle of an answer after which the connection is closed."""
        return RequestResponseCycle(
            scope={"type": "http", "method": "GET"},  # type: ignore[typeddict-item]  # it sends, and reads no more
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )


class ProblemResponse:
    """An ASGI application that answers one problem (RFC 9457)."""

    def __init__(
        self, status: int, code: str, detail: str, headers: Mapping[bytes, bytes] = NO_HEADERS
    ) -> None:
        title = HTTPStatus(status).phrase
        problem = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
        self._status, self._body = status, msgspec.json.encode(problem)
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(self._body)),
            (b"cache-control", b"no-store"),
            *self._headers.items(),
        ]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})
