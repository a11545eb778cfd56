"""The sync client: the async one's methods over a transport that blocks instead of awaiting.

SyncTransport's coroutines never suspend, so ``run`` finishes any coroutine over it in one step, without an
event loop, and works inside one as well (where it blocks it, as sync code does).

It uses ``http.client``: httpcore2 takes 25 ms to import, a quarter of a short command (ADR 64).
"""

import contextlib
import functools
import http.client
import selectors
import socket
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec, Self, TypeVar, Unpack, cast
from urllib.parse import urlsplit

from kms_client.aio import AsyncClient
from kms_client.http_client import (
    KEPT_S,
    MOST_KEPT,
    HttpAnswer,
    HttpRequest,
    broken_error,
    connect_error,
    timeout_error,
)
from kms_client.settings import ClientSettings, Options, credentials_of
from kms_protocol.errors import ConfigurationError, InvalidRequest
from kms_protocol.tls_client import client_context

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

T = TypeVar("T")
P = TypeVar("P")
A = ParamSpec("A")


def run(work: Coroutine[object, object, T]) -> T:
    """Run a coroutine that never suspends, and return its value."""
    try:
        work.send(None)
    except StopIteration as end:
        answer: T = end.value
        return answer
    work.close()
    raise RuntimeError("a coroutine over the sync transport must not suspend")


def each(items: AsyncGenerator[T]) -> Iterator[T]:
    """Iterate over an async generator that never suspends."""
    try:
        while True:
            yield run(items.__anext__())
    except StopAsyncIteration:
        return
    finally:
        run(items.aclose())


# -- the transport -----------------------------------------------------------------------------------

_CHUNK_BYTES: Final = 64 * 1024


class _SendError(Exception):
    """The service stopped reading and ended the connection; its answer may have arrived."""


class _Sending(http.client.HTTPConnection):
    """A connection whose timeout limits each wait to send; that of ``sendall`` limits the whole."""

    def send(self, data: "ReadableBuffer") -> None:  # type: ignore[override]  # all that endheaders sends
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self.sock.send(rest) :]
        except OSError as exc:
            raise _SendError from exc


class _Plain(_Sending):
    def connect(self) -> None:
        """Connect by the name as bytes: text loads the codec of international names."""
        self.sock = socket.create_connection((cast("str", self.host.encode()), self.port), self.timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _Secure(_Sending, http.client.HTTPSConnection):
    """A connection by TLS."""


@contextlib.contextmanager
def reading_errors(url: str) -> Iterator[None]:
    """Convert exceptions of ``http.client`` while an answer is read to ServiceUnreachable."""
    try:
        yield
    except TimeoutError as exc:
        raise timeout_error(url) from exc
    except (OSError, http.client.HTTPException) as exc:
        raise broken_error(url) from exc


class SyncAnswer:
    """An answer of ``http.client``. ``end`` takes back its connection: True if it can be used again.

    A body that only the end of the connection delimits, or a head that broke off, is taken for incomplete.
    """

    def __init__(self, response: http.client.HTTPResponse, url: str, end: Callable[[bool], None]) -> None:
        self._response, self._url, self._end = response, url, end
        self._is_read = False
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}

    async def chunks(self) -> AsyncGenerator[bytes]:
        with reading_errors(self._url):
            while data := self._response.read1(_CHUNK_BYTES):
                yield data
            left = self._response.length
            if left or (left is None and not self._response.chunked and self.status < HTTPStatus.BAD_REQUEST):
                raise http.client.IncompleteRead(b"", left)
        self._is_read = True

    async def close(self) -> None:
        self._response.close()
        self._end(self._is_read and not self._response.will_close)


class SyncTransport:
    """Connections of ``http.client``, which block the calling thread. Safe for several threads.

    Raises ConfigurationError for unusable certificates or proxies.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self._url = settings.url
        self._service = urlsplit(settings.url)
        self._proxy = settings.proxy()
        self._peer = self._proxy or self._service
        self._tls = settings.tls() if self._service.scheme == "https" else None
        if self._proxy and self._peer.scheme == "https":
            if self._tls:
                raise ConfigurationError("A proxy for https:// addresses must itself be http://host:port")
            self._tls = client_context(None, "proxy")
        if self._tls:
            self._tls.set_alpn_protocols(["http/1.1"])
        self._idle: list[tuple[_Sending, float]] = []
        self._is_shut = False

    async def open(self, request: HttpRequest) -> HttpAnswer:
        connection = self._kept() or self._new(request.timeout_s)
        try:
            self._connect(connection)
            self._send(connection, request)
            connection.sock.settimeout(request.silence_s)
            with reading_errors(self._url):
                response = connection.getresponse()
        except BaseException:
            connection.close()
            raise
        return SyncAnswer(response, self._url, lambda usable: self._end(connection, keep=usable))

    def _kept(self) -> _Sending | None:
        """Return an idle connection that the service has not closed."""
        with contextlib.suppress(IndexError):  # none is left
            while True:
                connection, since = self._idle.pop()
                if time.monotonic() - since < KEPT_S and not _is_readable(connection.sock):
                    return connection
                connection.close()
        return None

    def _new(self, timeout_s: float) -> _Sending:
        host, port = self._peer.hostname or "", self._peer.port
        if not self._tls:
            return _Plain(host, port or http.client.HTTP_PORT, timeout=timeout_s)
        if not self._proxy or self._peer.scheme == "https":
            return _Secure(host, port or http.client.HTTPS_PORT, timeout=timeout_s, context=self._tls)
        connection = _Secure(host, port or http.client.HTTP_PORT, timeout=timeout_s, context=self._tls)
        service_port = self._service.port or http.client.HTTPS_PORT
        connection.set_tunnel(self._service.hostname or "", service_port, self._for_proxy())
        return connection

    def _connect(self, connection: _Sending) -> None:
        """Connect, unless it is done. Raises ServiceUnreachable."""
        try:
            if connection.sock is None:
                connection.connect()
        except TimeoutError as exc:
            raise timeout_error(self._url) from exc
        except (OSError, http.client.HTTPException, _SendError) as exc:
            from traceback import clear_frames  # noqa: PLC0415 -- for an error alone

            clear_frames(exc.__traceback__)  # where Python 3.11.2 holds a proxy's refusal, and so the socket
            raise connect_error(self._url, exc) from exc

    def _for_proxy(self) -> dict[str, str]:
        """Return the headers that only the proxy reads."""
        credentials = self._proxy and credentials_of(self._proxy)
        if not credentials:
            return {}
        return {"Proxy-Authorization": f"Basic {b64encode(':'.join(credentials).encode()).decode()}"}

    def _send(self, connection: _Sending, request: HttpRequest) -> None:
        """Send a request; what the service no longer reads, as after an early refusal, is left out."""
        headers = request.headers
        target = request.url.removeprefix(self._url.removesuffix(self._service.path))
        if self._proxy and self._service.scheme == "http":
            headers, target = {**headers, **self._for_proxy()}, request.url
        connection.sock.settimeout(request.timeout_s)
        try:
            connection.putrequest(request.method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
        except (ValueError, http.client.InvalidURL) as exc:
            raise InvalidRequest("The address or a header has a character that HTTP forbids") from exc
        body = cast("Iterable[bytes] | bytes | None", request.body)
        try:
            connection.endheaders(body, encode_chunked="Transfer-Encoding" in headers)
        except _SendError as exc:
            if isinstance(exc.__cause__, TimeoutError):
                raise timeout_error(self._url) from exc

    def _end(self, connection: _Sending, *, keep: bool) -> None:
        if keep and not self._is_shut and len(self._idle) < MOST_KEPT:
            self._idle.append((connection, time.monotonic()))
        else:
            connection.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  # never on an event loop: see run

    async def call(self, work: Callable[[P], T], given: P) -> T:
        return work(given)

    def body(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        return parts

    async def shut(self) -> None:
        self._is_shut = True
        while self._idle:
            self._idle.pop()[0].close()


def _is_readable(sock: socket.socket) -> bool:
    """Return whether data or the end of the connection has arrived."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _blocking(
    method: Callable[Concatenate[AsyncClient, A], Coroutine[object, object, T]],
) -> Callable[Concatenate["Client", A], T]:
    """Return the method of Client that finishes a coroutine of AsyncClient."""

    @functools.wraps(method)
    def call(client: "Client", /, *args: A.args, **named: A.kwargs) -> T:
        return run(method(client._api, *args, **named))  # noqa: SLF001 - a method of it

    return call


def _iterating(
    method: Callable[Concatenate[AsyncClient, A], AsyncGenerator[T]],
) -> Callable[Concatenate["Client", A], Iterator[T]]:
    """Return the method of Client that iterates over an async generator of AsyncClient."""

    @functools.wraps(method)
    def call(client: "Client", /, *args: A.args, **named: A.kwargs) -> Iterator[T]:
        return each(method(client._api, *args, **named))  # noqa: SLF001 - as above

    return call


class Client:
    """A blocking client of the service, with the methods of AsyncClient.

    Without an address it is DEFAULT_URL, whose service is checked first.

    >>> with Client("https://kms.example.com", token_file="/run/secrets/kms") as kms:  # doctest: +SKIP
    ...     sealed = kms.encrypt(b"secret-data", context={"env": "prod"})
    """

    def __init__(self, url: str | None = None, **options: Unpack[Options]) -> None:
        settings = ClientSettings.of(url, options)
        self._api = AsyncClient.over(settings, SyncTransport(settings))

    @classmethod
    def over(cls, settings: ClientSettings, transport: SyncTransport) -> Self:
        """Return a client over a custom transport that never suspends."""
        client = cls.__new__(cls)
        client._api = AsyncClient.over(settings, transport)  # noqa: SLF001 - its own class
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    close = _blocking(AsyncClient.close)

    def within(self, deadline_s: float | None) -> Self:
        """Return this client with another ``deadline_s``, over the same connections: close one of them."""
        client = type(self).__new__(type(self))
        client._api = self._api.within(deadline_s)  # noqa: SLF001 - its own class
        return client

    # -- single calls --------------------------------------------------------------------------------

    encrypt = _blocking(AsyncClient.encrypt)
    decrypt = _blocking(AsyncClient.decrypt)
    generate_data_key = _blocking(AsyncClient.generate_data_key)
    rewrap = _blocking(AsyncClient.rewrap)
    wrap = _blocking(AsyncClient.wrap)
    unwrap = _blocking(AsyncClient.unwrap)
    batch = _blocking(AsyncClient.batch)
    health = _blocking(AsyncClient.health)
    status = _blocking(AsyncClient.status)
    audit = _blocking(AsyncClient.audit)
    keys = _blocking(AsyncClient.keys)
    key = _blocking(AsyncClient.key)
    rotate = _blocking(AsyncClient.rotate)

    # -- jobs ----------------------------------------------------------------------------------------

    submit = _blocking(AsyncClient.submit)
    job = _blocking(AsyncClient.job)
    many = _blocking(AsyncClient.many)
    jobs = _blocking(AsyncClient.jobs)
    cancel = _blocking(AsyncClient.cancel)
    group = _blocking(AsyncClient.group)
    release = _blocking(AsyncClient.release)
    dead = _blocking(AsyncClient.dead)
    retry = _blocking(AsyncClient.retry)
    wait = _blocking(AsyncClient.wait)

    # -- streams -------------------------------------------------------------------------------------

    upload_encrypt = _blocking(AsyncClient.upload_encrypt)
    upload_decrypt = _blocking(AsyncClient.upload_decrypt)
    download = _blocking(AsyncClient.download)
    encrypt_file = _blocking(AsyncClient.encrypt_file)
    decrypt_file = _blocking(AsyncClient.decrypt_file)
    rewrap_file = _blocking(AsyncClient.rewrap_file)
    download_to = _blocking(AsyncClient.download_to)
    result = _iterating(AsyncClient.result)
    items = _iterating(AsyncClient.items)
