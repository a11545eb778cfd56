"""One process that serves: builds the application and hands it to uvicorn."""

import asyncio
import resource
import ssl
from collections.abc import Sequence
from functools import partial
from socket import socket
from typing import Any, Final, Literal, cast

import structlog
import uvicorn
import uvloop
from starlette.types import ASGIApp

from kms_api import app
from kms_api.server import listening_sockets
from kms_api.server import vault_port as facade
from kms_api.transport import tls
from kms_core import keyring, server_memory
from kms_core.http_server.connections import ConnectionLimits, Connections
from kms_core.http_server.protocol import HttpProtocol
from kms_core.proxies import Proxies
from kms_core.settings.model import ServerSection, Settings
from kms_protocol.errors import EXIT_UNAVAILABLE

_GRACE_S: Final = 20
_FREED_BYTES: Final = 4 * 1024 * 1024
_HANDSHAKE_S: Final = 10.0
_OTHER_FILES: Final = 256  # files of jobs, keys and logs, and connections to peers
_log = structlog.get_logger(__name__)


class HandshakeTimeoutLoop(uvloop.Loop):
    """An event loop whose TLS servers end a connection without a handshake after 10 seconds (uvloop: 60).

    Until then a connection is in no protocol of ours, and in no bound of a port.
    """

    async def create_server(  # type: ignore[override]  # all of its overloads in one
        self,
        *args: Any,  # noqa: ANN401 -- as above
        **options: Any,  # noqa: ANN401 -- as above
    ) -> asyncio.AbstractServer:
        if options.get("ssl"):
            options.setdefault("ssl_handshake_timeout", _HANDSHAKE_S)
        return await super().create_server(*args, **options)


def serve(settings: Settings, inherited: Sequence[int]) -> int:
    """Serve until a signal, at the sockets that the leader handed down or at our own.

    Returns the exit code. Raises ConfigurationError, before a port is taken.
    """
    server_memory.protect(strict=settings.is_prod)
    _keep_freed_slabs()
    keyring.check(settings)
    built = app.build(settings)
    context = tls.context(settings.kms.server, strict=settings.is_prod)
    listeners = [socket(fileno=number) for number in inherited] or listening_sockets.ports(settings.kms)
    if not listeners:
        return EXIT_UNAVAILABLE
    limits = _connections(settings.kms.server)
    config = _config(built, context, limits)
    sockets = [listening_sockets.eager(each, settings.kms.server.processes) for each in listeners]
    if len(sockets) == 1:
        uvicorn.Server(config).run(sockets=sockets[0])
        return 0
    second = _config(facade.only(built), context, limits, lifespan="off")
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(facade.serve(config, sockets[0], second, sockets[1]))
    return 0


def _keep_freed_slabs() -> None:
    """Have the C library keep some MiB of freed memory: else each slab's pages come anew from the kernel.

    glibc raises its bounds to the largest mapped block that was ever freed (mallopt(3), M_MMAP_THRESHOLD):
    here 4 MiB, and twice that for what an arena may hold free. No page of this block is touched.
    """
    bytes(_FREED_BYTES)


def _connections(server: ServerSection) -> ConnectionLimits:
    """The bound on connections: of the settings, or what the limit of open files allows, with a warning."""
    wanted = server.connections
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, max(1, hard - _OTHER_FILES))
    if allowed < wanted:
        _log.warning("server.few_open_files", connections=allowed, wanted=wanted, limit=hard)
    return ConnectionLimits(allowed, is_proxy=Proxies.of(server).trust)


def _config(
    built: ASGIApp,
    context: ssl.SSLContext | None,
    limits: ConnectionLimits,
    lifespan: Literal["on", "off"] = "on",
) -> uvicorn.Config:
    protocol = partial(HttpProtocol, connections=Connections(limits))
    return uvicorn.Config(
        built,
        loop="kms_api.server.process:HandshakeTimeoutLoop",
        http=cast("type[asyncio.Protocol]", protocol),  # uvicorn only calls it
        ws="none",
        ssl_context_factory=None if context is None else lambda *_: context,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing here trusts a forwarded address
        timeout_graceful_shutdown=_GRACE_S,
        lifespan=lifespan,
    )
