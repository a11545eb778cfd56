"""The outermost ASGI layer: request ids, Host and Origin checks, HTTP metrics. Pure ASGI, no tasks."""

import re
import time
import uuid
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kms_api import problems
from kms_api.deps import WHO
from kms_api.rules import is_ui
from kms_core import audit, metrics
from kms_core.audit import Audit

LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ANONYMOUS_A_MINUTE: Final = 60
_OWN_SITES: Final = frozenset({"same-origin", "none"})
_HEADERS: Final = {"X-Content-Type-Options": "nosniff"}
_UI_HEADERS: Final = {
    **_HEADERS,
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",  # with none at all a browser hides the Origin of a form from us, too
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_log = structlog.get_logger("kms_api.access")


class Edge:
    """Wraps the application. ``hosts`` are the names it may be called by; ``*`` allows any."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], trail: Audit | None = None) -> None:
        """``trail`` gets the attempts that are denied before an operation begins."""
        self._app = app
        self._trail = trail
        self._anonymous = _Few()
        self._hosts = frozenset(host.lower() for host in (*LOCAL_HOSTS, *hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        audit.request_id.set(request_id)
        noted = self._noting(scope)
        started, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["X-Request-Id"] = request_id
                if noted.audit_id:
                    sent["X-KMS-Audit-Id"] = noted.audit_id
                sent.setdefault("Cache-Control", "no-store")
                sent.update(_UI_HEADERS if is_ui(scope["path"]) else _HEADERS)
            await send(message)

        metrics.INFLIGHT.inc()
        try:
            if self._refused(headers):
                refusal = problems.problem(403, "forbidden", _WHY)
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            metrics.INFLIGHT.dec()
            self._count(scope, status, time.perf_counter() - started)

    def _refused(self, headers: Headers) -> bool:
        """A page in the operator's browser must not reach a service that trusts the loopback interface."""
        if "*" in self._hosts:
            return False
        named, origin = headers.get("host", ""), headers.get("origin")
        try:
            host = urlsplit(f"//{named}").hostname or ""
            foreign = origin is not None and urlsplit(origin).netloc != named
        except ValueError:  # brackets around what is no IPv6 address
            return True
        return host not in self._hosts or foreign or headers.get("sec-fetch-site", "none") not in _OWN_SITES

    def _noting(self, scope: Scope) -> audit.Noted:
        """What is recorded for this request, which a denial shall be if nothing else was."""

        def denied(code: str) -> None:
            who = scope.get(WHO)
            if self._trail is not None and ((who and who.name) or self._anonymous.take()):
                route = f"{scope['method']} {getattr(scope.get('route'), 'path', 'unrouted')}"
                audit.denied(self._trail, who, route, code)

        audit.source.set(scope["client"][0] if scope.get("client") else "")
        noted = audit.Noted(denied)
        audit.noted.set(noted)
        return noted

    @staticmethod
    def _count(scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unrouted")
        metrics.HTTP_REQUESTS.labels(route, scope["method"], str(status)).inc()
        metrics.HTTP_SECONDS.labels(route, scope["method"]).observe(seconds)
        _log.debug(
            "http.request",
            method=scope["method"],
            route=route,
            status=status,
            duration_us=round(seconds * 1e6),
        )


class _Few:
    """A bound on what callers whom nobody knows can have written to a disk: so many records a minute."""

    def __init__(self, a_minute: int = _ANONYMOUS_A_MINUTE) -> None:
        self._most = a_minute
        self._minute, self._taken = -1, 0

    def take(self) -> bool:
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._taken = minute, 0
        self._taken += 1
        return self._taken <= self._most


_WHY: Final = (
    "This Host or Origin is not one that the service is configured for: "
    "add the name to [kms.server] allowed_hosts, or call it as localhost"
)
