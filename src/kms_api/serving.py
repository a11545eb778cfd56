"""One process that serves: builds the application and hands it to uvicorn."""

import asyncio
import ssl
from collections.abc import Sequence
from socket import socket
from typing import Final, Literal

import uvicorn
from starlette.types import ASGIApp

from kms_api import app, listening, tls
from kms_api.facade import listener as facade
from kms_core import keyring
from kms_core.errors import EXIT_UNAVAILABLE
from kms_core.settings import Settings

_GRACE_S: Final = 20
_FREED_BYTES: Final = 4 * 1024 * 1024


def serve(settings: Settings, inherited: Sequence[int]) -> int:
    """Serve until a signal, at the sockets that the leader handed down or at our own.

    Returns the exit code. Raises ConfigurationError, before a port is taken.
    """
    _keep_freed_slabs()
    keyring.check(settings)
    built = app.build(settings)
    context = tls.context(settings.kms.server, strict=settings.is_prod)
    listeners = [socket(fileno=number) for number in inherited] or listening.ports(settings.kms)
    if not listeners:
        return EXIT_UNAVAILABLE
    config = _config(built, tls.PeerProtocol, context)
    sockets = [listening.eager(each, settings.kms.server.processes) for each in listeners]
    if len(sockets) == 1:
        uvicorn.Server(config).run(sockets=sockets[0])
        return 0
    second = _config(facade.only(built), facade.PeerH11, context, lifespan="off")
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(facade.serve(config, sockets[0], second, sockets[1]))
    return 0


def _keep_freed_slabs() -> None:
    """Have the C library keep some MiB of freed memory: else each slab's pages come anew from the kernel.

    glibc raises its bounds to the largest mapped block that was ever freed (mallopt(3), M_MMAP_THRESHOLD):
    here 4 MiB, and twice that for what an arena may hold free. No page of this block is touched.
    """
    bytes(_FREED_BYTES)


def _config(
    built: ASGIApp,
    http: type[asyncio.Protocol],
    context: ssl.SSLContext | None,
    lifespan: Literal["on", "off"] = "on",
) -> uvicorn.Config:
    return uvicorn.Config(
        built,
        loop="uvloop",
        http=http,  # knows who is at the other end
        ssl_context_factory=None if context is None else lambda *_: context,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing here trusts a forwarded address
        timeout_graceful_shutdown=_GRACE_S,
        lifespan=lifespan,
    )
