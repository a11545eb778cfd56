"""The worker's ``/metrics``, ``/livez`` and ``/readyz``, served by the parent for all its children."""

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, cast

import structlog
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from kms_core.auth.authenticator import MetricsAccess
from kms_core.http_protocol import (
    REFUSED,
    ConnectionLimits,
    Connections,
    HostCheck,
    HttpProtocol,
    ProblemResponse,
    by_name,
)
from kms_core.observability import metrics

_LIMITS: Final = ConnectionLimits(most=64, timeout_s=10, ends_unread=True)
_STOP_S: Final = 2
_BACKLOG: Final = 128
_HEADERS: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_log = structlog.get_logger(__name__)


class MetricsServer:
    """An HTTP server in a thread of its own."""

    def __init__(self, listener: socket.socket, app: "MetricsApp") -> None:
        protocol = partial(HttpProtocol, connections=Connections(_LIMITS))
        config = uvicorn.Config(
            app,
            http=cast("type[asyncio.Protocol]", protocol),  # uvicorn only calls it
            loop="asyncio",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_STOP_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="metrics", daemon=True
        )
        self._thread.start()

    def shutdown(self) -> None:
        """Stop, and wait for it at most 2 seconds."""
        self._server.should_exit = True
        self._thread.join(_STOP_S)


class MetricsApp:
    """The ASGI application: three paths, GET and HEAD. ``/readyz`` answers 503 until ``is_ready``.

    ``refresh`` sets the metrics that are read when they are asked for.
    """

    def __init__(
        self,
        scraping: MetricsAccess,
        allowed_hosts: Sequence[str],
        is_ready: Callable[[], bool],
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._scraping = scraping
        self._is_ready, self._refresh = is_ready, refresh
        self._hosts = HostCheck(allowed_hosts)
        self._reading = asyncio.Semaphore()
        self._next: asyncio.Task[bytes] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = by_name(scope["headers"])
        refusal = self._refusal(scope, headers)
        if refusal is None and scope["path"] == "/metrics" and not await self._may_scrape(scope, headers):
            refusal = ProblemResponse(401, "unauthenticated", "See [kms.server] metrics")
        if refusal is not None:
            await refusal(scope, receive, send)
        elif scope["path"] in {"/livez", "/readyz"}:
            well = scope["path"] == "/livez" or self._is_ready()
            text = "ok\n" if well else "takes no jobs\n"
            await PlainTextResponse(text, 200 if well else 503, _HEADERS)(scope, receive, send)
        else:
            found = Response(await self._read(), 200, _HEADERS, CONTENT_TYPE_LATEST)
            await found(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> "ProblemResponse | None":
        """The refusal of a request for anything but these paths."""
        if self._hosts.refuses(headers, scope.get("server")):
            return ProblemResponse(403, "forbidden", REFUSED)
        if scope["path"] not in {"/metrics", "/livez", "/readyz"}:
            return ProblemResponse(404, "not_found", "This port has /metrics, /livez and /readyz")
        if scope["method"] not in {"GET", "HEAD"}:
            return ProblemResponse(405, "method_not_allowed", "Send GET or HEAD", {"allow": "GET, HEAD"})
        return None

    async def _read(self) -> bytes:
        """The metrics as they are from now on: requests that wait at the same time share one reading."""
        if self._next is None:
            self._next = asyncio.create_task(self._read_when_free())
        return await asyncio.shield(self._next)

    async def _read_when_free(self) -> bytes:
        async with self._reading:
            self._next = None  # what is asked from here on is for the next reading
            return await asyncio.to_thread(metrics.exposition, self._refresh)

    async def _may_scrape(self, scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
        address = scope["client"][0] if scope["client"] else None
        if self._scraping.is_open_to(address, (name.decode("latin-1") for name in headers)):
            return True
        scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            return False
        async with self._reading:  # a JWT may have to wait for its issuer's keys
            return await asyncio.to_thread(self._scraping.allows, token.strip())


def serve(bind: str, port: int, app: MetricsApp) -> MetricsServer | None:
    """Serve until ``shutdown``. A taken port costs the metrics, not the jobs, and is logged."""
    listener = socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((bind, port))
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        _log.warning("metrics.not_served", port=port, reason=exc.strerror)
        return None
    return MetricsServer(listener, app)
