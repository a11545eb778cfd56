"""ASGI middleware for the pages, which need Redis: their sessions are there."""

import asyncio
from collections.abc import Callable, Container
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kms_api.deps import Pool, Service
from kms_api.routing import UI, is_ui
from kms_api.ui.sessions import COOKIE, cookies
from kms_core.jobs.store.condition import StoreCondition, StoreProbe
from kms_protocol.errors import JobsUnavailable

_LOOK_S: Final = 0.25
_LOOKS: Final = Pool("page probe", 4)
"""Calls that ask for the condition of Redis: they wait for half a second at most, also while pages hang."""


class PageLayer:
    """ASGI middleware that raises JobsUnavailable for a page within a second if Redis hangs.

    Redis holds the sessions. What waits for it goes on in its thread and ends with its timeouts.
    """

    def __init__(self, app: ASGIApp, open_paths: Container[str], look: Callable[[], StoreCondition]) -> None:
        """``open_paths`` need neither credentials nor Redis. ``look`` asks Redis, and may block."""
        self._app, self._open_paths = app, open_paths
        self._probe = StoreProbe(look, 2 * _LOOK_S, _LOOK_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if not is_ui(path) or path in self._open_paths:
            is_root = path == "/" and "text/html" in Headers(scope=scope).get("accept", "")
            await (RedirectResponse(UI) if is_root else self._app)(scope, receive, send)
            return
        sent: list[Message] = []

        async def collect(message: Message) -> None:
            sent.append(message)

        await self._call(scope, receive, collect)
        for message in sent:
            await send(message)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application. Raises JobsUnavailable if Redis is away and holds the session, or hangs."""
        is_away = await self._is_redis_away(scope)
        if is_away and any(cookies(scope["headers"], COOKIE)):
            raise JobsUnavailable
        called = asyncio.ensure_future(self._app(scope, receive, send))
        called.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # also if none waits
        pause_s = None if is_away or scope["method"] not in {"GET", "HEAD"} else _LOOK_S
        while not (await asyncio.wait([called], timeout=pause_s))[0]:
            if await self._is_redis_away(scope):
                raise JobsUnavailable
        await called

    async def _is_redis_away(self, scope: Scope) -> bool:
        pages: Service = scope["app"].service
        is_away = await pages.run(_LOOKS, self._probe.condition) == "unavailable"
        if is_away:
            pages.store_probe.failed()  # so that no page waits for a Redis that answered that probe before
        return is_away
