"""The outermost ASGI layer: request ids, Host and Origin checks, HTTP metrics. Pure ASGI, no tasks."""

import os
import re
import time
from collections.abc import Iterable, Sequence
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kms_api.deps import WHO
from kms_api.errors import problems, vault
from kms_api.routing import is_ui, is_vault
from kms_core import audit
from kms_core.audit import AuditWriter
from kms_core.http_server.host_check import REFUSED, HostCheck, by_name
from kms_core.observability import metrics

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ANONYMOUS_A_MINUTE: Final = 60
_HEADERS: Final = ((b"x-content-type-options", b"nosniff"),)
_UI_HEADERS: Final = (
    *_HEADERS,
    (
        b"content-security-policy",
        (
            b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
            b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        ),
    ),
    (b"referrer-policy", b"same-origin"),  # with none at all a browser hides a form's Origin from us, too
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_log = structlog.get_logger("kms_api.access")


class RequestContext:
    """Wraps the application. ``hosts`` are the names it may be called by; ``*`` allows any."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], trail: AuditWriter | None = None) -> None:
        """``trail`` gets the attempts that are denied before an operation begins."""
        self._app = app
        self._trail = trail
        self._anonymous = _Few()
        self._hosts = HostCheck(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = by_name(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else os.urandom(16).hex()
        audit.request_id.set(request_id)
        noted = self._noting(scope)
        started, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _marked(scope, message["headers"], request_id, noted.audit_id)
            await send(message)

        metrics.ANSWERING.level += 1
        try:
            if self._hosts.refuses(headers, scope.get("server")):
                speak = vault.turned_away if is_vault(scope["path"]) else problems.problem
                refusal = speak(403, "forbidden", REFUSED)
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            metrics.ANSWERING.level -= 1
            _count(scope, status, time.perf_counter() - started)

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


def _marked(
    scope: Scope, headers: Iterable[tuple[bytes, bytes]], request_id: str, audit_id: str
) -> list[tuple[bytes, bytes]]:
    """The headers of an answer, and those that every answer has."""
    marked = [*headers, (b"x-request-id", request_id.encode())]
    if audit_id:
        marked.append((b"x-kms-audit-id", audit_id.encode()))
    if not any(name == b"cache-control" for name, _ in marked):
        marked.append((b"cache-control", b"no-store"))
    marked.extend(_UI_HEADERS if is_ui(scope["path"]) else _HEADERS)
    return marked


def _count(scope: Scope, status: int, seconds: float) -> None:
    route, method = getattr(scope.get("route"), "path", "unrouted"), scope["method"]
    metrics.count_answer(route, method, status, seconds)
    _log.debug("http.request", method=method, route=route, status=status, duration_us=round(seconds * 1e6))


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
