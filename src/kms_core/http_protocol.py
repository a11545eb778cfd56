"""uvicorn's HTTP/1.1 protocol, with rules of RFC 9110 and RFC 9112 that uvicorn leaves out.

- An Upgrade is ignored and the body kept (RFC 9110 §7.8). httptools stops at the head of such a request, and
  uvicorn would drop the body or parse it as the next request.
- The method LIST of Vault's clients is accepted, which httptools refuses. It is malformed in the same read of
  the socket as the end of an earlier request: these clients send no request before the last response.
- A malformed request is answered 400, after the responses to the requests before it.
- Request heads are bounded in size and time, and the connections of a port in number.
- ``scope["state"]`` of a request has the client certificate of its connection, and the objects for reading
  its body without a copy.
- ``HostCheck`` refuses DNS rebinding, and requests by pages of other sites (RFC 9110 §7.2, Fetch §3.2).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httptools
import msgspec
from starlette.responses import Response
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from kms_core.auth import client_certificates
from kms_core.auth.client_certificates import PresentedCertificate
from kms_core.auth.rate_limit import source_of

LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
REFUSED: Final = (
    "This Host or Origin is not one that the service is configured for: "
    "add the name to [kms.server] allowed_hosts, or call it as localhost"
)
_OWN_SITES: Final = frozenset({b"same-origin", b"none"})
_EVICTED_PART: Final = 16  # a full port closes this part of its connections at once
_RETRY_S: Final = 0.01
CERTIFICATE: Final = "kms.certificate"
BODY: Final = "kms.body"
"""The key in ``scope["state"]`` of a pair: the protocol and the cycle of the request."""
KEEP_ALIVE_S: Final = 75
"""Seconds after a response for which a connection is kept: longer than proxies keep theirs, usually 60."""
HEAD_BYTES: Final = 64 * 1024
HEADERS: Final = 100
PIPELINED: Final = 16
"""The most bytes and headers of a head, and the most requests that wait for an earlier response."""
_VERSIONS: Final = frozenset({"1.1", "1.0"})
_LIST: Final = b"LIST "
_AS_GET: Final = b"GET "
_HOP_BY_HOP: Final = (b"upgrade", b"connection")
_MALFORMED: Final = (400, "invalid_request", "The request is malformed (RFC 9112)")
_LONG_HEAD: Final = (431, "invalid_request", "The head of the request exceeds 64 KiB or 100 headers")
_PIPELINED: Final = (429, "rate_limited", "Too many requests wait for their responses on this connection")
_NO_ROOM: Final = (429, "rate_limited", "This port has no room for another connection: try again in a second")


class HostCheck:
    """The host names of a port: loopback names, its own address, and those of the settings."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """``hosts`` are further names; ``*`` allows any name and any Origin."""
        self._hosts = frozenset(host.lower() for host in (*LOCAL_HOSTS, *hosts))

    def refuses(self, headers: Mapping[bytes, bytes], server: tuple[str, int | None] | None) -> bool:
        """Return whether to refuse a request by its headers; ``server`` is the address that it reached.

        A page in the operator's browser must not reach a service that trusts the loopback interface. The
        address is allowed as a host: no DNS server can forge it, and probes and scrapes in a cluster use it.
        """
        if "*" in self._hosts:
            return False
        named, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        try:
            host = _host_of(named)
            foreign = origin is not None and urlsplit(origin.decode("latin-1")).netloc != named
        except ValueError:  # a wrong IPv6 address in brackets, or a wrong port
            return True
        known = host in self._hosts or (server is not None and host == server[0])
        return not known or foreign or headers.get(b"sec-fetch-site", b"none") not in _OWN_SITES


@lru_cache(maxsize=64)
def _host_of(named: str) -> str:
    """The name in a Host header without the port, empty for an invalid one. Raises ValueError."""
    address = urlsplit(f"//{named}")
    return (address.hostname or "") if address.port != 0 and "@" not in named else ""


def by_name(headers: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The first header of each name. A repeated Host is empty: a proxy may have used the other one.

    RFC 9112 §3.2.
    """
    found = dict(reversed(headers))
    if len(found) < len(headers) and sum(name == b"host" for name, _ in headers) > 1:
        found[b"host"] = b""
    return found


class EvictionClass(IntEnum):
    """Reasons to close a connection to make room, in the order in which they apply."""

    SILENT = 0
    """It never sent a whole request head."""
    IDLE = 1
    """All its requests are answered."""
    UNREAD = 2
    """Its client does not read a response."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """``most`` connections of a port in one process, and at most half of them from one source address.

    A connection has ``timeout_s`` to twice ``timeout_s`` seconds for the head of a request. With
    ``ends_unread`` it also ends once its client has read nothing of a response for that time. ``is_proxy``
    says which addresses are exempt from the bound by source.
    """

    most: int = 2048
    timeout_s: float = 30.0
    ends_unread: bool = False
    is_proxy: Callable[[str], bool] = lambda _: False


class Connections:
    """The open connections of one port in one process.

    To make room, connections of the source with the most connections are closed first, those of one source in
    the order of ``EvictionClass``, oldest first. If all have a request in progress, the new connection is
    refused.
    """

    def __init__(self, limits: ConnectionLimits | None = None) -> None:
        self.limits: Final = ConnectionLimits() if limits is None else limits
        self._open: dict[HttpProtocol, str] = {}
        self._sources: Counter[str] = Counter()
        self._retry_at = 0.0

    def opened(self, connection: "HttpProtocol") -> bool:
        """Count a new connection; False if there is no room for it."""
        source = source_of(connection.source) if connection.source else ""
        is_full = len(self._open) >= self.limits.most and not self._make_room(lambda _: True)
        if is_full or not self._has_room_of_source(source):
            return False
        self._open[connection] = source
        self._sources[source] += 1
        return True

    def closed(self, connection: "HttpProtocol") -> None:
        """Stop counting a connection."""
        source = self._open.pop(connection, None)
        if source is not None:
            self._sources[source] -= 1
            if not self._sources[source]:
                del self._sources[source]

    def _has_room_of_source(self, source: str) -> bool:
        most = max(1, self.limits.most // 2)
        if self._sources[source] < most or not source or self.limits.is_proxy(source):
            return True
        return self._make_room(lambda other: other == source)

    def _make_room(self, of: Callable[[str], bool]) -> bool:
        """Close several connections at once, so that a flood of new ones does not sort them all each time.

        If there was none to close, it tries again after 10 ms at the earliest.
        """
        now = time.monotonic()
        if now < self._retry_at:
            return False
        found = sorted(
            (-self._sources[source], reason, number, each)
            for number, (each, source) in enumerate(self._open.items())
            if of(source) and (reason := each.eviction_class()) is not None
        )[: max(1, self.limits.most // _EVICTED_PART)]
        for *_, each in found:
            self.closed(each)
            each.end()
        if not found:
            self._retry_at = now + _RETRY_S
        return bool(found)


class HttpProtocol(HttpToolsProtocol):
    """One connection, created by uvicorn; all connections of a port share ``connections``."""

    stopping = False
    """The server stops: a request that waits for something should be answered now."""

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
        self.timeout_keep_alive = KEEP_ALIVE_S
        self._shown: PresentedCertificate | None = None
        self.inlet: Callable[[bytes], None] | None = None
        """Takes the bytes of a body in place of uvicorn's own buffer."""
        self._timer: asyncio.TimerHandle | None = None
        self._seen: Hashable = None
        self._answering: RequestResponseCycle | None = None
        self._requests = 0
        self._held = b""  # the beginning of a request line that may become LIST
        self._is_list = self._refused = False
        self._refusal = _MALFORMED
        self._between, self._in_head = True, False
        self._head_bytes = self._line_bytes = 0
        self._upgrading = False

    # -- the connection ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        self._shown = client_certificates.of_connection(tls) if tls else None
        self.source = self.client[0] if self.client else ""
        if not self._bound.opened(self):
            self._refuse(*_NO_ROOM)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        waiting = (cycle for cycle, _ in self.pipeline)
        for cycle in filter(None, (self._answering, *waiting)):  # uvicorn informs only the last request
            cycle.disconnected = True
            cycle.message_event.set()
        self.pipeline.clear()
        self._bound.closed(self)
        if self._timer is not None:
            self._timer.cancel()

    def shutdown(self) -> None:
        self.stopping = True
        super().shutdown()

    def _watch(self) -> None:
        self._timer = self.loop.call_later(self._bound.limits.timeout_s, self._end_if_stalled)

    def _end_if_stalled(self) -> None:
        """Close a connection where no request begins, no head is completed, or no response is read.

        Runs every ``timeout_s`` seconds, so requests cost nothing. uvicorn has a timeout only for silence
        after a response, which applies there: clients that send a byte every few seconds, or never any,
        escape it (slowloris).
        """
        progress = self._progress()
        if progress is not None and progress == self._seen:
            self.end()
            return
        self._seen = progress
        self._watch()

    def end(self) -> None:
        """Close the connection; data that its client does not read is dropped."""
        if self.flow.write_paused:
            self.transport.abort()
        else:
            self.transport.close()

    def eviction_class(self) -> EvictionClass | None:
        """The eviction class of this connection; None while it serves a request."""
        if self._is_idle():
            return EvictionClass.IDLE if self._requests else EvictionClass.SILENT
        return EvictionClass.UNREAD if self.flow.write_paused else None

    def _progress(self) -> Hashable:
        """A value that changes as requests arrive and responses are read; None during a request.

        Also None while uvicorn's timeout runs.
        """
        if self._is_idle():
            return self._requests if self.timeout_keep_alive_task is None else None
        if self.flow.write_paused and self._bound.limits.ends_unread:
            return self._requests, self.transport.get_write_buffer_size()
        return None

    def _is_idle(self) -> bool:
        last: RequestResponseCycle | None = self.cycle  # of the last request with a complete head
        return last is None or last.response_complete

    # -- what arrives ------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        if self._between:
            data = self._as_get((self._held + data).lstrip(b"\r\n"))  # RFC 9112 §2.2: empty lines before it
        if data:
            self._feed(data)
        if self._in_head and not self._refused:
            self._check_line(data)

    def _check_line(self, data: bytes) -> None:
        """Bound the incomplete line, which the parser buffers without calling back."""
        end = data.rfind(b"\n") + 1
        self._line_bytes = len(data) - end + (0 if end else self._line_bytes)
        if self._head_bytes + self._line_bytes > HEAD_BYTES:
            self._refuse(*_LONG_HEAD)

    def _as_get(self, data: bytes) -> bytes:
        """The first bytes of a request, with GET in place of LIST; empty while they may become LIST."""
        self._held = b""
        if data.startswith(_LIST):
            self._is_list = True
            return _AS_GET + data[len(_LIST) :]
        if _LIST.startswith(data):
            self._held = data
            return b""
        return data

    def _feed(self, data: bytes | memoryview) -> None:
        """Feed the parser, and again from where it stopped for an Upgrade."""
        while not self._refused:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stop:
                data = data[stop.args[0] :]
                self._ignore_upgrade()
            except httptools.HttpParserError:
                self._refuse(*self._refusal)
            else:
                return

    def _ignore_upgrade(self) -> None:
        """Feed the head at which the parser stopped to a new parser, without the Upgrade."""
        self._upgrading = False
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(400, "invalid_request", "CONNECT is not served here")
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
        """The options of the Connection headers, without ``upgrade``."""
        given = [value for name, value in self.headers if name == b"connection"]
        options = [option.strip() for value in given for option in value.split(b",")]
        return [option for option in options if option and option.lower() != b"upgrade"]

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # -- callbacks of the parser -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._between, self._in_head, self._head_bytes, self._line_bytes = False, True, 0, 0
        self.inlet = None
        if self._shown is not None:
            self.scope["state"][CERTIFICATE] = self._shown

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header. A trailer is dropped: it must not count as a header (RFC 9110 §6.5.1)."""
        if not self._in_head:
            return
        self._head_bytes += len(name) + len(value)
        if self._head_bytes + len(self.url) > HEAD_BYTES or len(self.headers) >= HEADERS:
            self._refusal = _LONG_HEAD
            raise ValueError("the head is too large")  # ends the parsing
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self.parser.get_http_version() not in _VERSIONS:
            raise ValueError("not HTTP/1.1")
        if len(self.pipeline) >= PIPELINED:
            self._refusal = _PIPELINED
            raise ValueError("too many requests wait")
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
        if self.inlet is not None:
            self.inlet(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self._between, cycle = True, self.cycle
        # A trailer may close the connection: the parser accepts nothing after it.
        if not self.parser.should_keep_alive():
            cycle.keep_alive = False
            if cycle.response_complete:
                self.transport.close()
        super().on_message_complete()

    # -- refusals ----------------------------------------------------------------------------------

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Refuse a request or connection, after the responses to earlier requests, and close."""
        self._refused = True
        headers = {"connection": "close"}
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            headers["retry-after"] = "1"
        answer = cast("ASGI3Application", ProblemResponse(status, code, detail, headers))
        waits = not self._is_idle()
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
        """The cycle of a response after which the connection is closed."""
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


class ProblemResponse(Response):
    """A response with one problem (RFC 9457)."""

    media_type = "application/problem+json"

    def __init__(self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        title = HTTPStatus(status).phrase
        problem = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
        more = {"cache-control": "no-store", **(headers or {})}
        super().__init__(msgspec.json.encode(problem), status, more)
