"""Fixed paths go straight to their handlers, since FastAPI's way there costs as much as a seal (ADR 12).

The routes stay FastAPI's own: it documents them, and answers whatever is not here, such as another method, an
unknown path, or a path with parameters.
"""

import inspect
from collections.abc import Iterable
from typing import Final

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from kms_api.errors import problems
from kms_api.routing import ScopedRoute
from kms_protocol.errors import KmsError

_EXPECTED: Final = (KmsError, HTTPException, ClientDisconnect)


class FastPath:
    """Wraps the application, whose routers are included below ``prefix``."""

    def __init__(self, app: FastAPI, routers: Iterable[APIRouter], prefix: str) -> None:
        self._app = app
        self._straight = {
            (method, prefix + route.path): route
            for router in routers
            for route in router.routes
            if isinstance(route, ScopedRoute) and _is_plain(route)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._straight.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["app"], scope["route"] = self._app, route
        try:
            route.admit(scope)
            answer: Response = await route.endpoint(Request(scope, receive, send))
        except _EXPECTED as exc:
            answer = problems.expected(exc)
        await answer(scope, receive, send)


def _is_plain(route: ScopedRoute) -> bool:
    """Whether the handler asks for the request alone."""
    return "{" not in route.path and list(inspect.signature(route.endpoint).parameters) == ["request"]
