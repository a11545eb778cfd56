"""The façade's own port: uvicorn's other protocol, since httptools refuses the LIST method that hvac sends.

It is served by the same process and loop as the main port, and shows nothing but the façade.
"""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from kms_api.facade import refusals
from kms_api.heads import Cycle, Impatient
from kms_api.rules import is_vault
from kms_api.tls import CERTIFICATE
from kms_core.auth import certificates

_METHODS: Final = frozenset({"GET", "HEAD", "LIST", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
_LENGTHS: Final = frozenset({b"content-length", b"transfer-encoding"})


class PeerH11(Impatient, H11Protocol):
    """As ``tls.PeerProtocol``: each request knows the certificate of its connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(binary_form=True) if tls else None
        if der:
            self.app_state = {**self.app_state, CERTIFICATE: certificates.read(der)}

    def last(self) -> Cycle | None:
        return self.cycle


def only(app: ASGIApp) -> ASGIApp:
    """The façade of an application. Methods are a closed set, since requests are counted by them.

    A body with two lengths is refused, as httptools does at the main port: h11 goes by the chunks, and a
    proxy before it that goes by the number would let a request pass within the body of another.
    """

    async def facade(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and {name for name, _ in scope["headers"]} >= _LENGTHS:
            refusal = refusals.plain(400, "Content-Length and Transfer-Encoding: send one of them")
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
        elif scope["type"] == "http" and not is_vault(scope["path"]):
            await refusals.plain(404, _ELSEWHERE)(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] not in _METHODS:
            await refusals.plain(405, "unsupported operation")(scope, receive, send)
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
