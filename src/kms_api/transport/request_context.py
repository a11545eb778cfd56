"""The outermost ASGI middleware: client addresses, traces, request ids, Host and Origin checks, CORS.

Audit records, limits, logs and metrics read the client's address from ``scope["client"]`` and no header.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
from opentelemetry.trace import SpanKind
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kms_api import problems
from kms_api.deps import PRINCIPAL
from kms_api.routing import DOCS, is_ui, is_vault
from kms_core import audit
from kms_core.audit import AuditWriter
from kms_core.http_protocol import REFUSED, HostCheck, by_name
from kms_core.observability import metrics, tracing
from kms_core.proxies import Proxies
from kms_protocol.errors import Forbidden
from kms_protocol.wire import PREFIX

_PARENT: Final = tracing.PARENT.encode()
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
_ANONYMOUS_A_MINUTE: Final = 60
_HEADERS: Final = ((b"x-content-type-options", b"nosniff"),)
_POLICY: Final = (
    b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'%s; "
    b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_UI_HEADERS: Final = (
    *_HEADERS,
    (b"referrer-policy", b"same-origin"),  # with none at all a browser hides a form's Origin from us, too
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_CODEC: Final = frozenset({f"{PREFIX}/codec/encode", f"{PREFIX}/codec/decode"})
_CODEC_REFUSED: Final = f"{REFUSED}; a page of another site needs its origin in [kms.server] codec_origins"
_VARY: Final = (b"vary", b"Origin")
_ASKED_METHOD: Final = b"access-control-request-method"
_PREFLIGHT: Final = {
    "access-control-allow-methods": "POST",
    # as the page sends them: temporalio/ui, src/lib/services/data-encoder.ts
    "access-control-allow-headers": "Content-Type, X-Namespace, Authorization, Authorization-Extras",
    "access-control-max-age": "600",
}
_access = logging.getLogger("kms_api.access")
_log = structlog.get_logger(_access.name)


class ClientAddress:
    """Puts the address that a trusted proxy forwards into the scope, with port 0: headers seldom name one."""

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["client"] and self._proxies.trust(scope["client"][0]):
            lines = [
                value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"
            ]
            if lines:
                scope["client"] = self._proxies.client(scope["client"][0], ",".join(lines)), 0
        await self._app(scope, receive, send)


class RequestContext:
    """Gives each request an id and a span, checks Host and Origin, counts and logs answers, records denials.

    It is here alone that an error becomes an answer. One that is a fault of the service is raised again, for
    the log of the server, and so is one that comes after the beginning of an answer.

    The span is within the caller's trace if the request names one.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Sequence[str],
        audit_log: AuditWriter | None = None,
        codec_origins: Sequence[str] = (),
        pages: Callable[[Scope, Exception], Response] | None = None,
    ) -> None:
        """``hosts`` are the accepted host names; ``*`` accepts any. ``pages`` answers the errors of pages.

        Pages of ``codec_origins`` may call the codec server (CORS, Fetch §3.3), without cookies.
        """
        self._app = app
        self._pages = pages
        self._audit_log = audit_log
        self._anonymous = _MinuteLimit()
        self._hosts = HostCheck(hosts)
        self._codec_origins = frozenset(origin.encode() for origin in codec_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = by_name(scope["headers"])
        given = headers.get(b"x-request-id")
        request_id = given.decode() if given and _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        audit.request_id.set(request_id)
        noted = self._noting(scope)
        is_named, cors = self._cors(scope) if scope["path"] in _CODEC else (False, [])
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _marked(scope, [*message["headers"], *cors], request_id, noted.audit_id)
            await send(message)

        metrics.INFLIGHT.inc()
        with tracing.span(scope["method"], SpanKind.SERVER, headers.get(_PARENT, b"").decode("latin-1")):
            try:
                layer = self._own_answer(scope, headers, is_named=is_named) or self._app
                await layer(scope, receive, answer)
            except Exception as exc:
                has_begun = bool(status)
                if not has_begun:
                    await self._refused(scope, exc)(scope, receive, answer)
                if has_begun or not isinstance(exc, problems.EXPECTED):
                    raise
            finally:
                metrics.INFLIGHT.dec()
                _count(scope, status or 500, time.perf_counter() - started)

    def _refused(self, scope: Scope, error: Exception) -> Response:
        """The answer to an error, in the form that the clients of this path read."""
        if is_vault(scope["path"]):
            return problems.vault_answer(error)
        if self._pages is not None and is_ui(scope["path"]):
            return self._pages(scope, error)
        return problems.answer(error)

    def _own_answer(self, scope: Scope, headers: dict[bytes, bytes], *, is_named: bool) -> Response | None:
        """The refusal of a Host or an Origin, or the answer to a preflight; None for all other requests."""
        judged = {b"host": headers.get(b"host", b"")} if is_named else headers  # its Origin is judged already
        if self._hosts.refuses(judged, scope.get("server")):
            error = Forbidden(_CODEC_REFUSED if scope["path"] in _CODEC else REFUSED)
            return problems.vault_answer(error) if is_vault(scope["path"]) else problems.answer(error)
        if is_named and scope["method"] == "OPTIONS" and _ASKED_METHOD in headers:
            return Response(status_code=204, headers=_PREFLIGHT)
        return None

    def _cors(self, scope: Scope) -> tuple[bool, list[tuple[bytes, bytes]]]:
        """Return whether a request of the codec is of a page that may make it, and CORS headers for it."""
        if not self._codec_origins:
            return False, []
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        if len(origins) != 1 or origins[0] not in self._codec_origins:
            return False, [_VARY]
        return True, [_VARY, (b"access-control-allow-origin", origins[0])]

    def _noting(self, scope: Scope) -> audit.Noted:
        """The audit note of this request: a denial is recorded if no operation was."""

        def denied(code: str) -> None:
            who = scope.get(PRINCIPAL)
            if self._audit_log is not None and ((who and who.name) or self._anonymous.take()):
                audit.denied(self._audit_log, who, f"{scope['method']} {_route(scope)}", code)

        audit.source.set(scope["client"][0] if scope.get("client") else "")
        noted = audit.Noted(denied)
        audit.noted.set(noted)
        return noted


def _marked(
    scope: Scope, headers: Iterable[tuple[bytes, bytes]], request_id: str, audit_id: str
) -> list[tuple[bytes, bytes]]:
    """The headers of an answer, with those of every answer."""
    marked = [*headers, (b"x-request-id", request_id.encode())]
    if audit_id:
        marked.append((b"x-kms-audit-id", audit_id.encode()))
    if b"cache-control" not in dict(marked):
        marked.append((b"cache-control", b"no-store"))
    if not is_ui(scope["path"]):
        return [*marked, *_HEADERS]
    images = b" data:" if scope["path"] == DOCS else b""  # the icons in the styles of Swagger UI
    return [*marked, *_UI_HEADERS, (b"content-security-policy", _POLICY % images)]


def _route(scope: Scope) -> str:
    """The template of the request's path."""
    template: str = getattr(scope.get("route"), "path", "unrouted")
    return template


def _count(scope: Scope, status: int, seconds: float) -> None:
    route, method = _route(scope), scope["method"]
    tracing.note(f"{method} {route}", method=method, route=route, status=status)
    metrics.answer_seconds(route, method, str(status)).observe(seconds)
    if _access.isEnabledFor(logging.DEBUG):  # structlog asks only after ten calls
        took_us = round(seconds * 1e6)
        _log.debug("http.request", method=method, route=route, status=status, duration_us=took_us)


class _MinuteLimit:
    """A bound on audit records of anonymous callers, per minute."""

    def __init__(self) -> None:
        self._minute, self._taken = -1, 0

    def take(self) -> bool:
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._taken = minute, 0
        self._taken += 1
        return self._taken <= _ANONYMOUS_A_MINUTE
