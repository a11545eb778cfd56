"""The Vault API's own port, for networks that open it apart from the rest; the same process serves both."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from kms_api.errors import vault
from kms_api.routing import is_vault


def only(app: ASGIApp) -> ASGIApp:
    """The Vault API of an application. Other paths are 404."""

    async def facade(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_vault(scope["path"]):
            await vault.plain(404, _ELSEWHERE)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return facade


async def serve(
    first: uvicorn.Config,
    listeners: list[socket.socket],
    second: uvicorn.Config,
    ports: list[socket.socket],
) -> None:
    """Run two servers until a signal, which stops both: each finishes the requests that it has."""
    beside = _Server(second)
    main = _Server(first, beside)
    with uvicorn.Server.capture_signals(main):
        async with asyncio.TaskGroup() as both:
            both.create_task(beside.serve(ports))
            await main.serve(listeners)
            beside.should_exit = True


class _Server(uvicorn.Server):
    """One of two: signals are caught for both together."""

    def __init__(self, config: uvicorn.Config, beside: uvicorn.Server | None = None) -> None:
        super().__init__(config)
        self._beside = beside

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._beside is not None:
            self._beside.handle_exit(sig, frame)


_ELSEWHERE: Final = "This port serves /v1/ alone: the rest of the API is on [kms] port"
