"""One process that serves: builds the application and hands it to uvicorn."""

import socket
from typing import Final

import uvicorn

from kms_api import app, tls
from kms_api.listening import listen
from kms_core import keyring
from kms_core.errors import EXIT_UNAVAILABLE
from kms_core.settings import Settings

GRACE_S: Final = 20


def serve(settings: Settings, inherited: int | None) -> int:
    """Serve until a signal, at the socket that the leader handed down or at one of our own.

    Returns the exit code. Raises ConfigurationError, before the port is taken.
    """
    keyring.check(settings)
    built = app.build(settings)
    context = tls.context(settings.kms.server, strict=settings.is_prod)
    if inherited is None:
        listener = listen(settings.kms.bind, settings.kms.port)
    else:
        listener = socket.socket(fileno=inherited)
    if listener is None:
        return EXIT_UNAVAILABLE
    config = uvicorn.Config(
        built,
        loop="uvloop",
        http=tls.PeerProtocol,  # httptools, and who is at the other end
        ssl_context_factory=None if context is None else lambda *_: context,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing here trusts a forwarded address
        timeout_graceful_shutdown=GRACE_S,
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0
