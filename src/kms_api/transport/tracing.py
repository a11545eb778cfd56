"""A span for each request, around everything: only in place where traces are asked for."""

from collections.abc import Mapping
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kms_core.observability import tracing

_UNROUTED: Final = "unrouted"


class Traced:
    """Takes up the caller's trace, if a request names one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        given = headers.get(tracing.PARENT.encode(), b"").decode("latin-1")
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with tracing.span(scope["method"], "server", given):
            try:
                await self._app(scope, receive, answer)
            finally:
                method, route = scope["method"], getattr(scope.get("route"), "path", _UNROUTED)
                tracing.note(f"{method} {route}", method=method, route=route, status=status)
