"""The sync client: the async one's methods over a transport that blocks instead of awaiting.

SyncTransport's coroutines never suspend, so ``run`` finishes any coroutine over it in one step, without an
event loop, and works inside one as well (where it blocks it, as sync code does).

It uses ``http.client``: httpcore2 takes 25 ms to import, a quarter of a short command (ADR 64).
"""

import contextlib
import http.client
import selectors
import socket
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, BinaryIO, Final, Self, TypeVar, Unpack, cast
from urllib.parse import urlsplit

from kms_client.aio import AsyncClient, JobProgress
from kms_client.http_client import (
    KEPT_S,
    MOST_KEPT,
    HttpAnswer,
    HttpRequest,
    Progress,
    broken_error,
    connect_error,
    timeout_error,
)
from kms_client.requests import UploadOptions
from kms_client.settings import DEFAULT_URL, ClientSettings, Options, credentials_of
from kms_protocol import admin, wire
from kms_protocol.errors import ConfigurationError, InvalidRequest
from kms_protocol.tls_client import client_context
from kms_protocol.wire import ContextIn

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

T = TypeVar("T")
P = TypeVar("P")


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


class Client:
    """A blocking client of the service, with the methods of AsyncClient.

    >>> with Client("https://kms.example.com", token_file="/run/secrets/kms") as kms:  # doctest: +SKIP
    ...     sealed = kms.encrypt(b"secret-data", context={"env": "prod"})
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Unpack[Options]) -> None:
        settings = ClientSettings(url, **options)
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

    def close(self) -> None:
        run(self._api.close())

    # -- single calls --------------------------------------------------------------------------------

    def encrypt(
        self, plaintext: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.EncryptOut:
        """Encrypt up to 1 MiB. Raises TooLarge: use ``upload_encrypt``."""
        return run(self._api.encrypt(plaintext, context=context, key_id=key_id))

    def decrypt(
        self, ciphertext: bytes, *, context: ContextIn = None, key_id: str | None = None
    ) -> wire.DecryptOut:
        """Decrypt a ciphertext. Raises DecryptFailed for a wrong key, a wrong context or damage."""
        return run(self._api.decrypt(ciphertext, context=context, key_id=key_id))

    def generate_data_key(
        self,
        spec: wire.KeySpec = "AES_256",
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        without_plaintext: bool = False,
    ) -> wire.GenerateKeyOut:
        """Generate a data key, plain and encrypted. Raises DataKeysUnsupported if the backend has none."""
        return run(
            self._api.generate_data_key(
                spec, context=context, key_id=key_id, without_plaintext=without_plaintext
            )
        )

    def rewrap(
        self,
        ciphertext: bytes,
        *,
        context: ContextIn = None,
        new_context: ContextIn = None,
        key_id: str | None = None,
    ) -> wire.EncryptOut:
        """Rewrap a ciphertext under its current key or ``key_id``; ``new_context`` replaces its context."""
        return run(self._api.rewrap(ciphertext, context=context, new_context=new_context, key_id=key_id))

    def wrap(self, file_key: bytes, *, context: ContextIn = None, key_id: str | None = None) -> wire.WrapOut:
        """Wrap the 16-byte file key of an age file. The answer has the stanza for its header."""
        return run(self._api.wrap(file_key, context=context, key_id=key_id))

    def unwrap(
        self,
        stanzas: bytes,
        *,
        context: ContextIn = None,
        key_id: str | None = None,
        nonce: bytes | None = None,
    ) -> wire.UnwrapOut:
        """Return the file key of an age file. The caller must check the MAC of the header.

        ``nonce`` is that of the payload, which proves the origin of files of any key.
        """
        return run(self._api.unwrap(stanzas, context=context, key_id=key_id, nonce=nonce))

    def batch(self, operation: wire.JobKind, items: Iterable[wire.BatchItem]) -> wire.BatchOut:
        """Send up to 1,000 items in one call. A failed item has an ``error`` in its result."""
        return run(self._api.batch(operation, items))

    def health(self) -> admin.HealthOut:
        """Return the health of the active backend. An unhealthy backend raises no exception."""
        return run(self._api.health())

    def status(self) -> admin.StatusOut:
        """Return backend, version, uptime, and counts of operations and jobs."""
        return run(self._api.status())

    def audit(self, *, after: str | None = None, limit: int | None = None, **filters: str) -> admin.AuditOut:
        """Return a page of the audit log of the tenant, oldest first. ``after`` is the ``next`` of a page.

        ``filters`` are those of the API: operation, key_id, principal, result, job_id, since and so on.
        """
        return run(self._api.audit(after=after, limit=limit, **filters))

    def keys(self) -> admin.KeysOut:
        """Return the keys that the caller may see, with their versions."""
        return run(self._api.keys())

    def key(self, key_id: str) -> admin.KeyOut:
        """Return one key, with the number of encryptions of each version."""
        return run(self._api.key(key_id))

    def rotate(self, key_id: str) -> admin.RotateOut:
        """Create a new version of a key. Never retried: if no answer arrives, check with ``key``."""
        return run(self._api.rotate(key_id))

    # -- jobs ----------------------------------------------------------------------------------------

    def submit(
        self, job: wire.JobIn, *, idempotency_key: str | None = None, wait_s: int = 0
    ) -> wire.JobAccepted:
        """Submit a job. Once this returns, the job survives the end of any process.

        With ``wait_s`` (at most 60) this returns once the job has ended, or after so many seconds.
        """
        return run(self._api.submit(job, idempotency_key=idempotency_key, wait_s=wait_s))

    def job(self, job_id: str, *, wait_s: int = 0) -> wire.JobOut:
        """Return the state of a job: now, or at its end if that comes within ``wait_s`` (at most 60) seconds.

        Raises UnknownJob.
        """
        return run(self._api.job(job_id, wait_s=wait_s))

    def many(self, job_ids: Iterable[str]) -> wire.JobsOut:
        """Return the current states of up to 1,000 jobs in one call."""
        return run(self._api.many(job_ids))

    def jobs(
        self,
        *,
        state: wire.JobState | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> wire.JobList:
        """Return a page of jobs that have all ``labels``, newest first.

        Its ``next`` is the ``cursor`` of the following page.
        """
        return run(self._api.jobs(state=state, labels=labels, limit=limit, cursor=cursor))

    def cancel(self, job_id: str) -> wire.JobOut:
        """Cancel a job. Raises JobCommitting if it is too late."""
        return run(self._api.cancel(job_id))

    def group(self, name: str, *, wait_s: int = 0) -> wire.GroupOut:
        """Return the counts of a group, at its end if that comes within ``wait_s`` (at most 60) seconds.

        Raises UnknownJob.
        """
        return run(self._api.group(name, wait_s=wait_s))

    def release(self, job_id: str) -> wire.JobOut:
        """Delete the result of an ended job now, which frees its room. Raises JobNotFinished."""
        return run(self._api.release(job_id))

    def dead(self, *, limit: int = 100) -> wire.JobList:
        """Return the jobs that used up their attempts, newest first."""
        return run(self._api.dead(limit=limit))

    def retry(self, job_id: str) -> wire.JobOut:
        """Retry a job that used up its attempts. Raises JobNotDead for any other job."""
        return run(self._api.retry(job_id))

    def wait(
        self, job_id: str, *, progress: JobProgress | None = None, timeout_s: float | None = None
    ) -> wire.JobOut:
        """Wait until a job ends in any state. ``progress`` receives changes, about once a second."""
        return run(self._api.wait(job_id, progress=progress, timeout_s=timeout_s))

    # -- streams -------------------------------------------------------------------------------------

    def upload_encrypt(
        self, source: BinaryIO, *, progress: Progress | None = None, **options: Unpack[UploadOptions]
    ) -> wire.JobAccepted:
        """Send a file of any size. ``progress`` receives the bytes sent and the total, if known."""
        return run(self._api.upload_encrypt(source, progress=progress, **options))

    def upload_decrypt(
        self, source: BinaryIO, *, progress: Progress | None = None, **options: Unpack[UploadOptions]
    ) -> wire.JobAccepted:
        """Send a ciphertext of any size, as ``upload_encrypt``."""
        return run(self._api.upload_decrypt(source, progress=progress, **options))

    def result(self, job_id: str) -> Iterator[bytes]:
        """Yield the result as it arrives. Raises JobNotFinished, ResultExpired. ``download`` can resume."""
        return each(self._api.result(job_id))

    def items(self, job_id: str) -> Iterator[wire.ItemResult]:
        """Yield the results of a bulk job in item order. A failed item has an ``error``."""
        return each(self._api.items(job_id))

    def download(
        self, job_id: str, target: BinaryIO, *, progress: Progress | None = None, release: bool = False
    ) -> int:
        """Write the result to ``target``, resuming broken connections. Return its size in bytes.

        With ``release`` the service deletes the result once it has been written.
        """
        return run(self._api.download(job_id, target, progress=progress, release=release))
