"""HTTP to a backend's server: pooled connections, one deadline for a whole call, our errors; no protocol.

A call ends at its deadline however slowly the server drips, since each wait on the socket is given what is
left of it (looking up the server's name alone is the system's own time). Nothing of an answer's body and
nothing of a request gets into an error. No redirect is followed, no cookie is taken, and no proxy but one
that ``PeerServer`` names. Safe to call from several threads; after a fork the child makes connections of its
own.
"""

import os
import ssl
import time
import weakref
from collections.abc import Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar
from urllib.parse import unquote, urlsplit

import httpcore
import msgspec

from kms_core.http_client import Busy, Unreachable
from kms_core.http_client.deadline import DeadlineTransport
from kms_core.observability import tracing
from kms_protocol import __version__
from kms_protocol.errors import BackendUnavailable, ConfigurationError
from kms_protocol.tls_client import client_context

ANSWER_BYTES: Final = 1024 * 1024
CONNECTIONS: Final = 64
KEEP_ALIVE_S: Final = 60.0  # the usual server hangs up after 75 to 120 s; a race with it fails a call
MAX_RETRY_AFTER_S: Final = 300.0
_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
_HEADERS: Final = {
    "Accept": "application/json",
    "Content-Type": "application/json",
    "User-Agent": f"kms-service/{__version__}",
}
_UNREACHABLE: Final = frozenset(
    {HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
)
_BUSY: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.PRECONDITION_FAILED})
Shape = TypeVar("Shape")


@dataclass(frozen=True, slots=True)
class Tls:
    """Whom to trust, and as whom to appear; for ``https://`` only. Files are in PEM, read once."""

    verify: bool = True
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


@dataclass(frozen=True, slots=True)
class PeerServer:
    """Where a server is and what it should be.

    ``url`` is ``http[s]://host[:port][/prefix]``, checked by the settings; ``product`` is what errors call
    it ("OpenBao or Vault"), ``setting`` the key of its address, which they point to. ``proxy`` is
    ``http://[user:password@]host:port``.
    """

    url: str = field(repr=False)
    product: str
    setting: str
    timeout_s: float
    tls: Tls = field(default=Tls())
    proxy: str | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """Product, host and port; no user, path or query."""
        url = urlsplit(self.url)
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
        return f"{self.product} at {host}{f':{url.port}' if url.port else ''}"


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """A status that the protocol has to judge, and a body that may or may not be what it expects."""

    server: PeerServer
    status: int
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES

    def read(self, shape: type[Shape]) -> Shape:
        """The body as JSON of this shape. BackendUnavailable if it is something else, and thus the server."""
        try:
            return msgspec.json.decode(self.body, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self.odd() from None  # the cause may quote the body

    def odd(self) -> BackendUnavailable:
        """The error for an answer that only another kind of server would give."""
        return _odd(self.server, f"status {self.status}")


class Peer:
    """One server, and the connections to it."""

    def __init__(self, server: PeerServer) -> None:
        """Reads the TLS files, and connects to nothing. ConfigurationError if one cannot be used."""
        self.server = server
        self._trust = _tls(server) if server.url.startswith("https:") else None
        self._network = DeadlineTransport()
        self._pool, self._owner = self._connections(), os.getpid()

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = _NO_HEADERS,
        judged: Container[int] = (),
    ) -> PeerAnswer:
        """One request, all of it within the server's timeout; ``path`` is quoted and begins with a slash.

        ``headers`` carry what may change between calls, such as a token, and win over the standing ones.
        Statuses in ``judged`` are answered as they are, as all below 300 and other 4xx are. Else Unreachable
        (no connection, time out, 502 to 504), Busy (429, 412, other 5xx), BackendUnavailable (redirects,
        endless bodies, a certificate that is not trusted).
        """
        url = self.server.url.rstrip("/") + path
        with transport_errors(self.server), self.one_timeout():
            extensions = {"timeout": {"pool": self._network.left()}}
            sent = _encoded({**headers, **tracing.headers()})
            with self._own_pool().stream(
                method, url, headers=sent, content=body, extensions=extensions
            ) as response:
                answer = PeerAnswer(self.server, response.status, _read(self.server, response))
        if answer.status not in judged:
            _judge(answer, response)
        return answer

    def one_timeout(self) -> AbstractContextManager[None]:
        """The calls of this thread within it share one timeout."""
        return self._network.until(time.monotonic() + self.server.timeout_s)

    def left_s(self) -> float:
        """Seconds that this thread has left of ``one_timeout``. Raises Unreachable if there are none."""
        with transport_errors(self.server):
            return self._network.left()

    def close(self) -> None:
        """Close what is open. A later call connects again."""
        self._pool.close()

    def _own_pool(self) -> httpcore.ConnectionPool:
        if self._owner != os.getpid():  # two processes on one connection would read each other's answers
            self._pool, self._owner = self._connections(), os.getpid()
        return self._pool

    def _connections(self) -> httpcore.ConnectionPool:
        pool = httpcore.ConnectionPool(
            ssl_context=self._trust,
            max_connections=CONNECTIONS,
            keepalive_expiry=KEEP_ALIVE_S,
            network_backend=self._network,
            proxy=proxy_of(self.server.proxy),
        )
        weakref.finalize(self, pool.close).atexit = False
        return pool


def proxy_of(address: str | None) -> httpcore.Proxy | None:
    """The proxy at ``[scheme://][user:password@]host:port``; None without an address."""
    if address is None:
        return None
    url = urlsplit(address if "://" in address else f"http://{address}")
    named = (unquote(url.username), unquote(url.password or "")) if url.username else None
    return httpcore.Proxy(f"{url.scheme}://{url.netloc.rpartition('@')[2]}", auth=named)


def _tls(server: PeerServer) -> ssl.SSLContext:
    section, tls = server.setting.rpartition(".")[0], server.tls
    trust = client_context(tls.ca_file, f"{section}.ca_file")
    if not tls.verify:
        trust.check_hostname = False
        trust.verify_mode = ssl.CERT_NONE
    if tls.client_cert:
        try:
            trust.load_cert_chain(tls.client_cert, tls.client_key, password=_no_password)
        except (OSError, ValueError) as exc:
            raise ConfigurationError(
                f"{section}: {tls.client_cert} is no certificate in PEM with its key, in {tls.client_key}, "
                "without a password"
            ) from exc
    return trust


def _no_password() -> str:
    """OpenSSL would otherwise ask the terminal."""
    raise ValueError


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes | str, bytes | str]]:
    """The standing headers and these; UnicodeEncodeError, which quotes the value, unless they are ASCII."""
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in {**_HEADERS, **headers}.items()]


def _read(server: PeerServer, response: httpcore.Response) -> bytes:
    body = bytearray()
    for piece in response.iter_stream():
        body += piece
        if len(body) > ANSWER_BYTES:
            raise _odd(server, f"more than {ANSWER_BYTES} bytes")
    return bytes(body)


def _judge(answer: PeerAnswer, response: httpcore.Response) -> None:
    """Raise for the statuses that mean the same in every protocol."""
    status = answer.status
    text = f"{answer.server.where} answers {status}"
    if status in _UNREACHABLE:
        raise Unreachable(text)
    if status in _BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise Busy(text, retry_after_s=_retry_after(response))
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        raise BackendUnavailable(
            f"{text}, a redirect, which is not followed: "
            f"set {answer.server.setting} to the address of the server itself"
        )


def _retry_after(response: httpcore.Response) -> float:
    """Seconds or an HTTP date (RFC 9110 §10.2.3), at most five minutes; 0 if the server says nothing."""
    given = next((value for name, value in response.headers if name.lower() == b"retry-after"), b"")
    text = given.decode("ascii", "replace").strip()
    try:
        seconds = float(text) if text.isdecimal() else _until(parsedate_to_datetime(text))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _until(moment: datetime) -> float:
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - datetime.now(UTC)).total_seconds()


def _odd(server: PeerServer, what: str) -> BackendUnavailable:
    url = urlsplit(server.url)
    return BackendUnavailable(
        f"The server at {url.hostname} does not answer as {server.product} does ({what}): "
        f"check {server.setting}"
    )


_TROUBLE: Final = (  # the first that fits; the text of the last two may quote what came
    (httpcore.PoolTimeout, Busy, "All connections to {where} are in use"),
    (httpcore.TimeoutException, Unreachable, "No answer from {where} within {timeout_s:g} s"),
    (httpcore.NetworkError, Unreachable, "The connection to {where} broke"),
    (httpcore.ProtocolError, Unreachable, "The connection to {where} broke, or it does not speak HTTP"),
    (httpcore.ProxyError, Unreachable, "The proxy does not connect us to {where}"),
)


@contextmanager
def transport_errors(server: PeerServer) -> Iterator[None]:
    """Whatever httpcore raises, as an error of ours."""
    try:
        yield
    except httpcore.ConnectError as exc:
        raise _no_connection(server, exc) from exc
    except (httpcore.LocalProtocolError, UnicodeEncodeError):  # its text quotes the header
        raise BackendUnavailable(
            f"A header for {server.where} holds characters that HTTP does not allow: check its token"
        ) from None
    except tuple(raised for raised, _, _ in _TROUBLE) as exc:
        kind, text = next((kind, text) for raised, kind, text in _TROUBLE if isinstance(exc, raised))
        quotes = isinstance(exc, httpcore.ProtocolError | httpcore.ProxyError)
        trouble = kind(text.format(where=server.where, timeout_s=server.timeout_s))
        raise trouble from (None if quotes else exc)


def _no_connection(server: PeerServer, exc: httpcore.ConnectError) -> BackendUnavailable:
    if "CERTIFICATE_VERIFY_FAILED" not in str(exc):
        return Unreachable(f"No connection to {server.where} ({exc})")
    section = server.setting.rpartition(".")[0]
    return BackendUnavailable(
        f"The certificate of {server.where} is for another name or not trusted: "
        f"name its authority in {section}.ca_file"
    )
