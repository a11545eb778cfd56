"""One serving process: uvicorn and its TLS."""

import asyncio
import resource
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import structlog
import uvicorn
import uvloop
from starlette.types import ASGIApp

from kms_api import app
from kms_core import container, secure_memory
from kms_core.auth import client_certificates
from kms_core.auth.client_certificates import Lists
from kms_core.http_protocol import ConnectionLimits, Connections, HttpProtocol
from kms_core.proxies import Proxies
from kms_core.reload import Reloaded
from kms_core.secure_files import OTHERS, in_shell
from kms_core.settings.model import ServerSection, Settings
from kms_protocol.errors import EXIT_UNAVAILABLE, ConfigurationError
from kms_protocol.tls_client import load_pair

_WARN_S: Final = 60.0
_VERIFY: Final = {"optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_log = structlog.get_logger(__name__)


class RenewedContext:
    """The TLS context in use, loaded again at a handshake after its files changed.

    So certificates and revocation lists are renewed under a running service. Invalid files leave the old
    context in use. While a revocation list is expired, OpenSSL refuses every client certificate.
    """

    def __init__(self, server: ServerSection) -> None:
        """Raises OSError, ValueError, ConfigurationError."""
        self._warned_at = float("-inf")
        paths = filter(None, (server.tls_cert, server.tls_key, server.client_ca, server.client_crl))
        self._loaded = Reloaded(
            tuple(paths),
            lambda: (client_certificates.load_lists(server), _context(server)),
            done=lambda _: _log.info("tls.renewed"),
            failed=lambda exc: _log.error("tls.not_renewed", error=type(exc).__name__),
        )
        _, self.first = self._loaded.current()
        self.first.sni_callback = self._renew

    def _renew(self, connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        del name, first
        lists, current = self._loaded.current()
        self._warn_if_expired(lists)
        connection.context = current

    def _warn_if_expired(self, lists: Lists | None) -> None:
        """Log an expired revocation list, at most once a minute; failed handshakes are not logged."""
        now = time.time()
        if lists and not lists.begins <= now < lists.ends and now - self._warned_at > _WARN_S:
            self._warned_at = now
            _log.error("tls.client_crl_expired", advice="client certificates are refused; renew client_crl")


def server_context(server: ServerSection, *, strict: bool = False) -> ssl.SSLContext | None:
    """The TLS context; None for plain HTTP. Raises ConfigurationError.

    A key that every user may read is refused if ``strict``, else logged.
    """
    if server.tls_cert is None or server.tls_key is None:
        return None
    try:
        if server.tls_key.stat().st_mode & OTHERS:
            advice = f"every user may read {server.tls_key}: run `chmod 600 {in_shell(server.tls_key)}`"
            if strict:
                raise ConfigurationError(f"kms.server.tls_key: {advice}")
            _log.warning("tls.key_open_to_others", advice=advice)
        return RenewedContext(server).first
    except (OSError, ValueError) as exc:  # an SSLError is an OSError
        why = getattr(exc, "reason", None) or exc.strerror if isinstance(exc, OSError) else "not PEM"
        raise ConfigurationError(
            f"kms.server: tls_cert, tls_key or client_ca cannot be used ({why}): expected PEM files, and the "
            "key of the certificate"
        ) from exc


def _context(server: ServerSection) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2 if server.client_ca is None else ssl.TLSVersion.TLSv1_3
    made.set_alpn_protocols(["http/1.1"])
    load_pair(made, str(server.tls_cert), str(server.tls_key))
    if server.client_ca is not None:
        made.load_verify_locations(server.client_ca)
        made.verify_mode = _VERIFY[server.client_cert]
        # A resumed session would not show its certificate again. TLS 1.3 resumes by tickets only; TLS 1.2
        # also by session ids, which Python cannot turn off.
        made.num_tickets = 0
    if server.client_crl is not None:
        made.load_verify_locations(server.client_crl)
        made.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN  # a current list of every authority, or no connection
    return made


_GRACE_S: Final = 20
_COPIES: Final = 15
_FREED_BYTES: Final = 4 * 1024 * 1024
_HANDSHAKE_S: Final = 10.0
_CONNECTIONS: Final = 2048
"""Of this process, with some 30 KiB each: above that idle ones are closed, oldest first."""
_OTHER_FILES: Final = 256  # files of jobs, keys and logs, and connections to peers


class HandshakeTimeoutLoop(uvloop.Loop):
    """An event loop that ends TLS connections without a handshake after 10 seconds (uvloop: 60).

    Until its handshake a connection does not count in the bound on connections.
    """

    async def create_server(  # type: ignore[override]  # all of its overloads in one
        self,
        *args: Any,  # noqa: ANN401 -- as above
        **options: Any,  # noqa: ANN401 -- as above
    ) -> asyncio.AbstractServer:
        if options.get("ssl"):
            options.setdefault("ssl_handshake_timeout", _HANDSHAKE_S)
        return await super().create_server(*args, **options)


def serve(settings: Settings, listener: Callable[[], socket.socket | None]) -> int:
    """Serve until a signal. Returns the exit code. Raises ConfigurationError, before ``listener`` is called.

    ``listener`` returns the listening socket, or None if the port cannot be taken.
    """
    secure_memory.protect(strict=settings.is_prod)
    _keep_freed_slabs()
    container.check(settings)
    application = app.build(settings)
    context = server_context(settings.kms.server, strict=settings.is_prod)
    taken = listener()
    if taken is None:
        return EXIT_UNAVAILABLE
    config = _config(application, context, _connections(settings.kms.server))
    uvicorn.Server(config).run(sockets=copies_of(taken, settings.kms.server.processes))
    return 0


def copies_of(listener: socket.socket, processes: int) -> list[socket.socket]:
    """The socket, and copies of it if it is served by a single process.

    libuv takes one connection from each socket in a turn of the loop. From a single socket, clients that
    connect at once are accepted one by one between the requests of earlier ones: the last of 64 waited for a
    second. Several processes need copies less, and share callers more evenly without.
    """
    copies = _COPIES if processes == 1 else 0
    listener.settimeout(0)  # of all copies, other processes' too: a blocking one would hold its loop
    return [listener, *(listener.dup() for _ in range(copies))]


def _keep_freed_slabs() -> None:
    """Make the C library keep some MiB of freed memory, so that slabs reuse pages.

    glibc raises its bounds to the largest mapped block ever freed (mallopt(3), M_MMAP_THRESHOLD): here 4 MiB,
    and twice that for the free memory of an arena. No page of this block is touched.
    """
    bytes(_FREED_BYTES)


def _connections(server: ServerSection) -> ConnectionLimits:
    """The bound on connections, lowered to the limit of open files with a warning."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = _CONNECTIONS if hard == resource.RLIM_INFINITY else max(1, hard - _OTHER_FILES)
    allowed = min(_CONNECTIONS, most)
    if allowed < _CONNECTIONS:
        _log.warning("server.few_open_files", connections=allowed, wanted=_CONNECTIONS, limit=hard)
    return ConnectionLimits(allowed, is_proxy=Proxies(server.trusted_proxies).trust)


def _config(application: ASGIApp, context: ssl.SSLContext | None, limits: ConnectionLimits) -> uvicorn.Config:
    protocol = partial(HttpProtocol, connections=Connections(limits))
    return uvicorn.Config(
        application,
        loop="kms_api.server.process:HandshakeTimeoutLoop",
        http=cast("type[asyncio.Protocol]", protocol),  # uvicorn only calls it
        ws="none",
        ssl_context_factory=None if context is None else lambda *_: context,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # ``ClientAddress`` reads them
        timeout_graceful_shutdown=_GRACE_S,
        lifespan="on",
    )
