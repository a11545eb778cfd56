"""HTTP clients: pooled connections on httpcore2, one deadline for a whole call, and our errors.

``Peer`` calls the server of a backend or of an issuer. ``DeadlineTransport`` is the network side of every
pool in the service; webhooks use it with pools of their own. A call ends at its deadline (``within``) however
slowly the server answers, since each wait on the socket gets the time that is left; only the lookup of a host
name is bounded by the system. Errors contain nothing of a request or of an answer's body. No redirect is
followed, no cookie kept and no proxy used except the one of ``PeerServer``. Safe for several threads; after a
fork the child opens connections of its own.
"""

import math
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import unquote, urlsplit

import httpcore2
import msgspec

from kms_core.observability import tracing
from kms_protocol import __version__
from kms_protocol.errors import BackendUnavailable, ConfigurationError
from kms_protocol.tls_client import client_context, load_pair
from kms_protocol.units import retry_after_s

ANSWER_BYTES: Final = 1024 * 1024
CONNECTIONS: Final = 64
KEEP_ALIVE_S: Final = 60.0  # the usual server hangs up after 75 to 120 s; a race with it fails a call
MAX_RETRY_AFTER_S: Final = 300.0
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
T = TypeVar("T")


class Unreachable(BackendUnavailable):
    """No connection, a timeout, or 502 to 504. The next call, or another backend, may succeed."""


class Busy(BackendUnavailable):
    """A temporary refusal (429, 412, other 5xx): worth a retry, after ``retry_after_s`` if that is known."""

    def __init__(self, detail: str = "", *, retry_after_s: float = 0.0) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)


# -- the time of a thread ----------------------------------------------------------------------------


class _Bound(threading.local):
    ends = math.inf


_bound: Final = _Bound()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Bound all waits of this thread for peers within the block, with their retries, by so many seconds.

    An enclosing block that ends earlier counts.
    """
    before, _bound.ends = _bound.ends, min(_bound.ends, time.monotonic() + seconds)
    try:
        yield
    finally:
        _bound.ends = before


def left_s() -> float:
    """Seconds that ``within`` leaves to this thread: infinite outside of it, 0 or less once they are over."""
    return _bound.ends - time.monotonic()


def _wait_s(timeout: float | None = None) -> float:
    """Seconds that this thread may wait, at most ``timeout``. Raises httpcore2.ReadTimeout if it is over."""
    left = left_s()
    if left <= 0:
        raise httpcore2.ReadTimeout
    return left if timeout is None else min(timeout, left)


# -- connections -------------------------------------------------------------------------------------


class DeadlineTransport(httpcore2.SyncBackend):
    """Opens connections whose every wait ends at the bound of the calling thread (``within``).

    httpcore2 bounds each read by itself, so that a server could keep a call alive with one byte at a time.
    """

    def __init__(self, addresses: Sequence[str] = ()) -> None:
        """``addresses``: IP addresses to connect to, in this order, whatever the host's name resolves to."""
        self._addresses = addresses

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """Try each address in turn, each for an equal share of the time that is left."""
        addresses = self._addresses or _lookup(host, port)
        last: httpcore2.ConnectError | httpcore2.ConnectTimeout | None = None
        for tried, address in enumerate(addresses):
            share = _wait_s() / (len(addresses) - tried)
            share = share if timeout is None else min(timeout, share)
            try:
                stream = super().connect_tcp(address, port, share, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as exc:
                last = exc
            else:
                return _DeadlineConnection(stream)
        raise last or httpcore2.ConnectError


def _lookup(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:  # gaierror is one; UnicodeError cannot be, settings are ASCII
        raise httpcore2.ConnectError(exc.strerror) from exc
    return [str(address[0]) for *_, address in found]


class _DeadlineConnection(httpcore2.NetworkStream):
    """A connection of ``DeadlineTransport``."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _wait_s(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _wait_s(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        return _DeadlineConnection(self._stream.start_tls(ssl_context, server_hostname, _wait_s(timeout)))

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def proxy_of(address: str | None) -> httpcore2.Proxy | None:
    """The proxy at ``[scheme://][user:password@]host:port``; None without an address."""
    if address is None:
        return None
    url = urlsplit(address if "://" in address else f"http://{address}")
    credentials = (unquote(url.username), unquote(url.password or "")) if url.username else None
    return httpcore2.Proxy(f"{url.scheme}://{url.netloc.rpartition('@')[2]}", auth=credentials)


# -- the server of a backend -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tls:
    """Trusted authorities and our client certificate, for ``https://`` only. Files are in PEM, read once."""

    verify: bool = True
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


@dataclass(frozen=True, slots=True)
class PeerServer:
    """The address of a server and its product.

    ``url`` is ``http[s]://host[:port][/prefix]``, checked by the settings. Errors name ``product`` ("OpenBao
    or Vault") and ``setting``, the key of the address. ``proxy`` is ``http://[user:password@]host:port``.
    """

    url: str = field(repr=False)
    product: str
    setting: str
    timeout_s: float
    tls: Tls = field(default=Tls())
    proxy: str | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """Product, host and port, without user, path and query."""
        url = urlsplit(self.url)
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
        return f"{self.product} at {host}{f':{url.port}' if url.port else ''}"

    def unexpected_error(self, what: str) -> BackendUnavailable:
        """The error for an answer (``what``) that only another kind of server would give."""
        url = urlsplit(self.url)
        return BackendUnavailable(
            f"The server at {url.hostname} does not answer as {self.product} does ({what}): "
            f"check {self.setting}"
        )


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """The status and body of an answer, for the caller's protocol to interpret."""

    server: PeerServer
    status: int
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES

    def read(self, shape: type[Shape]) -> Shape:
        """The body as JSON of this shape. Raises BackendUnavailable for any other body."""
        try:
            return msgspec.json.decode(self.body, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self.unexpected_error() from None  # the cause may quote the body

    def unexpected_error(self) -> BackendUnavailable:
        """The error for an answer that only another kind of server would give."""
        return self.server.unexpected_error(f"status {self.status}")


class Peer:
    """One server, and the connections to it."""

    def __init__(self, server: PeerServer) -> None:
        """Read the TLS files, without connecting. Raises ConfigurationError for an unusable file."""
        self.server = server
        self._tls = _tls_context(server) if server.url.startswith("https:") else None
        self._pool, self._owner = self._connections(), os.getpid()

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        expected: Container[int] = (),
    ) -> PeerAnswer:
        """Send one request within the server's timeout; ``path`` is quoted and begins with a slash.

        ``headers`` are those of this call, such as a token, and replace the default ones. Returns each status
        below 300, 4xx other than 412 and 429, and those in ``expected``. Raises Unreachable (no connection,
        timeout, 502 to 504), Busy (429, 412, other 5xx) and BackendUnavailable (a redirect, a body above
        1 MiB, a certificate that is not trusted).
        """
        url = self.server.url.rstrip("/") + path
        with transport_errors(self.server), self.one_timeout():
            extensions = {"timeout": {"pool": _wait_s()}}
            sent = _encoded({**(headers or {}), **tracing.headers()})
            with self._own_pool().stream(
                method, url, headers=sent, content=body, extensions=extensions
            ) as response:
                answer = PeerAnswer(self.server, response.status, _read(self.server, response))
        if answer.status not in expected:
            _raise_for_status(answer, response)
        return answer

    def one_timeout(self) -> AbstractContextManager[None]:
        """Bound all calls of this thread within the block by one timeout of the server (``within``)."""
        return within(self.server.timeout_s)

    def close(self) -> None:
        """Close all connections. A later call connects again."""
        self._pool.close()

    def in_time(self, wait: Callable[[float], T]) -> T:
        """The result of ``wait``, which gets the seconds that this thread may wait, at most one timeout.

        Raises Unreachable if there are none, or if ``wait`` raises TimeoutError.
        """
        with transport_errors(self.server), self.one_timeout():
            try:
                return wait(_wait_s())
            except TimeoutError:
                raise httpcore2.ReadTimeout from None

    @contextmanager
    def holding(self, lock: threading.Lock) -> Iterator[None]:
        """Hold a lock, for which the thread waits as in ``in_time``. Raises Unreachable."""
        if not self.in_time(lambda left_s: lock.acquire(timeout=left_s)):
            raise Unreachable(f"Another call waits for {self.server.where}")
        try:
            yield
        finally:
            lock.release()

    def _own_pool(self) -> httpcore2.ConnectionPool:
        if self._owner != os.getpid():  # two processes on one connection would read each other's answers
            self._pool, self._owner = self._connections(), os.getpid()
        return self._pool

    def _connections(self) -> httpcore2.ConnectionPool:
        pool = httpcore2.ConnectionPool(
            ssl_context=self._tls,
            max_connections=CONNECTIONS,
            keepalive_expiry=KEEP_ALIVE_S,
            network_backend=DeadlineTransport(),
            proxy=proxy_of(self.server.proxy),
        )
        weakref.finalize(self, pool.close).atexit = False
        return pool


def _tls_context(server: PeerServer) -> ssl.SSLContext:
    section, tls = server.setting.rpartition(".")[0], server.tls
    context = client_context(tls.ca_file, f"{section}.ca_file")
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.client_cert:
        try:
            load_pair(context, tls.client_cert, tls.client_key)
        except OSError as exc:
            raise ConfigurationError(
                f"{section}: {tls.client_cert} is no certificate in PEM with its key, in {tls.client_key}, "
                "without a password"
            ) from exc
    return context


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes | str, bytes | str]]:
    """The default headers and these, in ASCII. Raises UnicodeEncodeError, which quotes the value."""
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in {**_HEADERS, **headers}.items()]


def _read(server: PeerServer, response: httpcore2.Response) -> bytes:
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > ANSWER_BYTES:
            raise server.unexpected_error(f"more than {ANSWER_BYTES} bytes")
    return bytes(body)


def _raise_for_status(answer: PeerAnswer, response: httpcore2.Response) -> None:
    """Raise for the statuses whose meaning is the same in every protocol."""
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


def _retry_after(response: httpcore2.Response) -> float:
    """Seconds of a Retry-After header (RFC 9110 §10.2.3), at most five minutes; 0 without one."""
    given = next((value for name, value in response.headers if name.lower() == b"retry-after"), b"")
    return min(retry_after_s(given.decode("ascii", "replace").strip()) or 0.0, MAX_RETRY_AFTER_S)


_ERRORS: Final = (  # the first that fits; the text of the last two may quote what came
    (httpcore2.PoolTimeout, Busy, "All connections to {where} are in use"),
    (httpcore2.TimeoutException, Unreachable, "No answer from {where} within {timeout_s:g} s"),
    (httpcore2.NetworkError, Unreachable, "The connection to {where} broke"),
    (httpcore2.ProtocolError, Unreachable, "The connection to {where} broke, or it does not speak HTTP"),
    (httpcore2.ProxyError, Unreachable, "The proxy does not connect us to {where}"),
)


@contextmanager
def transport_errors(server: PeerServer) -> Iterator[None]:
    """Convert the errors of httpcore2 to ours."""
    try:
        yield
    except httpcore2.ConnectError as exc:
        raise _no_connection_error(server, exc) from exc
    except (httpcore2.LocalProtocolError, UnicodeEncodeError):  # its text quotes the header
        raise BackendUnavailable(
            f"A header for {server.where} holds characters that HTTP does not allow: check its token"
        ) from None
    except tuple(raised for raised, _, _ in _ERRORS) as exc:
        kind, text = next((kind, text) for raised, kind, text in _ERRORS if isinstance(exc, raised))
        quotes = isinstance(exc, httpcore2.ProtocolError | httpcore2.ProxyError)
        error = kind(text.format(where=server.where, timeout_s=server.timeout_s))
        raise error from (None if quotes else exc)


def _no_connection_error(server: PeerServer, exc: httpcore2.ConnectError) -> BackendUnavailable:
    if "CERTIFICATE_VERIFY_FAILED" not in str(exc):
        return Unreachable(f"No connection to {server.where} ({exc})")
    section = server.setting.rpartition(".")[0]
    return BackendUnavailable(
        f"The certificate of {server.where} is for another name or not trusted: "
        f"name its authority in {section}.ca_file"
    )
