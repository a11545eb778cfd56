"""Requests over a transport: bounded retries, and streamed bodies that can be resumed.

The code is written once, as coroutines over ``Transport``. The async transport (async_transport.py) suspends;
the sync one (sync.py) never does, so ``sync.run`` finishes each coroutine in one step, without an event loop.

A retry never repeats an effect: only a ``repeatable`` call is repeated, a submission carries its
Idempotency-Key, and a streamed body is repeated only if its source can be read again.
"""

import contextlib
import copy
import io
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol, Self, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import hashlib

from msgspec.structs import replace

from kms_client.attempts import Attempts
from kms_client.requests import (
    RETRYABLE,
    ClientRequest,
    NotThisService,
    Reply,
    ServiceUnreachable,
    UnexpectedAnswer,
    answer_error,
)
from kms_client.settings import ClientSettings
from kms_protocol import __version__
from kms_protocol.errors import InvalidRequest, KmsError
from kms_protocol.wire import Hidden

T = TypeVar("T")
P = TypeVar("P")

SILENCE_S: Final = 60.0  # the wait after a timeout: the service did not answer for a whole one
KEPT_S: Final = 5.0  # for an idle connection
MOST_KEPT: Final = 20
CA_HINT: Final = "name the authority that signed the server's certificate with SSL_CERT_FILE or ca_file"
DEADLINE_HINT: Final = "set a longer deadline_s, or None for as long as it takes"
Progress = Callable[[int, int | None], None]
PART_BYTES: Final = 1024 * 1024
CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+)", re.ASCII)
_SHORTEST_SILENCE_S: Final = 0.05
_CHECK_S: Final = 5.0  # for the answer of /livez, which depends on nothing


class HttpRequest(Hidden, frozen=True):
    """One request, with all its headers. ``url`` begins with the address of the service.

    ``timeout_s`` limits connecting and each wait to send, ``silence_s`` each wait for data of the answer.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | Iterator[bytes] | AsyncIterator[bytes] | None
    timeout_s: float
    silence_s: float


class HttpAnswer(Protocol):
    """An answer whose body is not read yet."""

    @property
    def status(self) -> int:
        """The status code."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, with names in lower case."""

    def chunks(self) -> AsyncGenerator[bytes]:
        """Yield the rest of the body as it arrives. Raises ServiceUnreachable if it breaks off."""

    async def close(self) -> None:
        """Keep the connection for further requests, or drop it if the body was not read to its end."""


class Transport(Protocol):
    """The connections to one service."""

    async def open(self, request: HttpRequest) -> HttpAnswer:
        """Send a request and return the answer, which the caller closes. Raises ServiceUnreachable."""

    async def sleep(self, seconds: float) -> None:
        """Wait without blocking other tasks."""

    async def call(self, work: Callable[[P], T], given: P) -> T:
        """Run blocking file operations without blocking the event loop."""

    def body(self, parts: Iterator[bytes]) -> Iterator[bytes] | AsyncIterator[bytes]:
        """Return a request body of these parts."""

    async def shut(self) -> None:
        """Close every connection."""


def connect_error(url: str, error: Exception) -> ServiceUnreachable:
    """Return the error of a connection that could not be made."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ServiceUnreachable(f"The certificate of {url} is not trusted", hint=CA_HINT)
    return ServiceUnreachable(f"Nothing answers at {url}")


def timeout_error(url: str) -> ServiceUnreachable:
    """Return the error of a wait that took too long."""
    return ServiceUnreachable(f"No answer from {url} in time", retry_after_s=SILENCE_S)


def deadline_error() -> ServiceUnreachable:
    """Return the error of a transfer that was still in progress at the deadline of its call."""
    return ServiceUnreachable("The transfer did not end in the time given", hint=DEADLINE_HINT)


def broken_error(url: str) -> ServiceUnreachable:
    """Return the error of a connection that ended too early."""
    return ServiceUnreachable(f"The connection to {url} broke")


# -- streamed bodies ---------------------------------------------------------------------------------


class Upload:
    """A source, read from its current position until ``until`` (time.monotonic).

    ``size_bytes`` is None if it is not seekable.
    """

    def __init__(self, source: BinaryIO, progress: Progress | None) -> None:
        self._source = source
        self._progress = progress
        self._sent = 0
        self._start: int | None = None
        self.size_bytes: int | None = None
        self.until = math.inf
        if source.seekable():
            self._start = source.tell()
            self.size_bytes = source.seek(0, io.SEEK_END) - self._start
            source.seek(self._start)

    def parts(self) -> Iterator[bytes]:
        """Yield the body in parts of at most 1 MiB, up to the size that the file had at first.

        ``progress`` receives the bytes sent and the total, if known. Raises InvalidRequest if the file
        shrinks, or is a pipe in non-blocking mode; ServiceUnreachable at the deadline.
        """
        while part := self._source.read(self._next_bytes()):
            if time.monotonic() > self.until:
                raise deadline_error()
            self._sent += len(part)  # before it is sent: a pipe cannot give it again
            yield part
            if self._progress is not None:
                self._progress(self._sent, self.size_bytes)
        if part is None:
            raise InvalidRequest("The source is a pipe in non-blocking mode")
        if self.size_bytes is not None and self._sent != self.size_bytes:
            raise InvalidRequest(
                "The source became shorter while it was sent: try again when no process writes to it"
            )

    def _next_bytes(self) -> int:
        return PART_BYTES if self.size_bytes is None else min(PART_BYTES, self.size_bytes - self._sent)

    def rewind(self) -> bool:
        """Go back to the start of the body. Return whether it can be sent from there."""
        if self._start is not None:
            self._source.seek(self._start)
            self._sent = 0
            return True
        return self._sent == 0


class Download:
    """A target that one answer fills, or several after broken connections (RFC 9110 §14).

    With ``hashed``, ``digest`` is the SHA-256 of what was written.
    """

    def __init__(self, target: BinaryIO, progress: Progress | None, *, hashed: bool = False) -> None:
        self._target = target
        self.hashed = hashed
        self._hasher: hashlib._Hash | None = None
        self._progress = progress
        self._start = target.tell() if target.seekable() else 0
        self._etag = ""
        self._total: int | None = None
        self.offset = 0

    def headers(self) -> Mapping[str, str]:
        """Return the request headers for the whole result, or for its missing part."""
        if not self.offset:
            return {}
        asked = {"Range": f"bytes={self.offset}-"}
        return {**asked, "If-Range": self._etag} if self._etag else asked

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Accept the head of an answer. Raises UnexpectedAnswer unless it has the missing part, or all."""
        if status == HTTPStatus.PARTIAL_CONTENT:
            self._resume(headers)
        elif status != HTTPStatus.OK:
            raise UnexpectedAnswer(f"The service answered {status}, without a result")
        else:
            self.restart()  # of a changed result, or the first one
            length = headers.get("content-length", "")
            self._total = int(length) if length.isdecimal() else None
            self._etag = headers.get("etag", "")

    def write(self, data: bytes) -> None:
        self._target.write(data)
        if self._hasher is not None:
            self._hasher.update(data)
        self.offset += len(data)
        if self._progress is not None:
            self._progress(self.offset, self._total)

    def digest(self) -> bytes:
        return self._hasher.digest() if self._hasher is not None else b""

    def end(self) -> None:
        """End an answer. Raises ServiceUnreachable if bytes are missing; the caller then fetches them."""
        if self._total is not None and self.offset != self._total:
            raise ServiceUnreachable(f"The result broke off at {self.offset} of {self._total} bytes")

    def _resume(self, headers: Mapping[str, str]) -> None:
        match = CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        if match is None or int(match[1]) != self.offset:
            raise UnexpectedAnswer("The service answered with another range than the requested one")
        self._total = int(match[2])

    def restart(self) -> None:
        """Drop what was written. Raises UnexpectedAnswer if the target cannot be written again."""
        if self.offset:
            if not self._target.seekable():
                raise UnexpectedAnswer(
                    "The result changed during the transfer, and the target is not seekable"
                )
            self._target.seek(self._start)
            self._target.truncate()
            self.offset = 0
        if self.hashed:
            from hashlib import sha256  # noqa: PLC0415 -- for files alone

            self._hasher = sha256()


# -- requests and retries -----------------------------------------------------------------------------


class Engine:
    """Sends requests with retries. Raises the KmsError of a problem, ServiceUnreachable without an answer."""

    def __init__(self, settings: ClientSettings, transport: Transport) -> None:
        self._settings = settings
        self._always = {
            "Host": urlsplit(settings.url).netloc,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": f"kms-client/{__version__}",
        }
        self.transport = transport
        self._unchecked = {settings.url} if settings.check_service else set()  # one for all deadlines

    def within(self, deadline_s: float | None) -> Self:
        """Return an engine with another deadline, over the same connections."""
        engine = copy.copy(self)
        engine._settings = replace(self._settings, deadline_s=deadline_s)  # noqa: SLF001 - its own class
        return engine

    def attempts(self, *, lasting: bool = False) -> Attempts:
        """Begin the attempts of one call."""
        return Attempts(self._settings, self.transport.sleep, lasting=lasting)

    async def send(
        self, call: ClientRequest[T], upload: Upload | None = None, attempts: Attempts | None = None
    ) -> T:
        """Return the answer, after further attempts if the call may be repeated."""
        attempts = attempts or self.attempts()
        if upload is not None:
            upload.until = attempts.until
        while True:
            try:
                reply = await self.exchange(call, attempts.until, upload)
                delay_s = _retry_delay_s(call, reply)
                if delay_s is None:
                    return call.read(reply)
                error: KmsError = answer_error(reply)
            except ServiceUnreachable as exc:
                error, delay_s = exc, None
            if not call.repeatable or (upload is not None and not upload.rewind()):
                raise error
            await attempts.pause(error, delay_s)

    async def exchange(self, call: ClientRequest[T], until: float, upload: Upload | None = None) -> Reply:
        """Make one attempt and read its whole answer. Without data it fails at ``until`` (time.monotonic)."""
        async with self.responding(call, upload=upload, silence_s=self._silence_s(until)) as answer:
            return await self._reply(answer)

    def _silence_s(self, until: float) -> float:
        return max(_SHORTEST_SILENCE_S, min(self._settings.timeout_s, until - time.monotonic()))

    @contextlib.asynccontextmanager
    async def responding(
        self, call: ClientRequest[T], *, upload: Upload | None = None, silence_s: float | None = None
    ) -> AsyncIterator[HttpAnswer]:
        """Make one attempt and yield its answer, whose body is not read yet.

        Before the first one the service is checked, if the settings say so. Raises UnexpectedAnswer.
        """
        if self._unchecked:
            await self._check_service(min(_CHECK_S, silence_s or self._settings.timeout_s))
        answer = await self.transport.open(self._request(call, upload, silence_s))
        try:
            yield answer
        finally:
            await answer.close()

    async def _check_service(self, silence_s: float) -> None:
        """Ask whether the address answers as this service, within ``silence_s`` and without a credential.

        Raises NotThisService, ServiceUnreachable, Unavailable.
        """
        named = {"X-Request-ID": uuid.uuid4().hex}  # this service answers with the same
        probe = ClientRequest("GET", "/livez", bytes, headers=named)
        answer = await self.transport.open(self._request(probe, None, silence_s))
        try:
            is_ours = answer.headers.get("x-request-id") == named["X-Request-ID"]
            reply = await self._reply(answer) if is_ours else Reply(answer.status, {}, b"")
        finally:
            await answer.close()
        if reply.status in RETRYABLE:  # it has no room for another request
            raise answer_error(reply)
        if reply.body != b"ok\n":
            text = f"What answers at {self._settings.url} is not this service, so no secret was sent there"
            raise NotThisService(text)
        self._unchecked.clear()

    @contextlib.asynccontextmanager
    async def answering(self, call: ClientRequest[T], attempts: Attempts) -> AsyncIterator[HttpAnswer]:
        """Open a response like ``responding``; raises the KmsError of a problem, retries refusals for now."""
        while True:
            async with self.responding(call, silence_s=self._silence_s(attempts.until)) as answer:
                if call.is_answer(answer.status):
                    yield answer
                    return
                reply = await self._reply(answer)
            delay_s = _retry_delay_s(call, reply)
            if delay_s is None:
                raise answer_error(reply)
            await attempts.pause(answer_error(reply), delay_s)

    async def stream(self, call: ClientRequest[T]) -> AsyncGenerator[bytes]:
        """Yield the body of one answer as it arrives."""
        attempts = self.attempts()
        async with self.answering(call, attempts) as answer, contextlib.aclosing(answer.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def fetch(self, call: ClientRequest[T], part: Download, attempts: Attempts) -> None:
        """Write the body of one answer to the target.

        Raises ServiceUnreachable if it is incomplete, or not complete by the deadline.
        """
        async with self.answering(call, attempts) as answer:
            part.begin(answer.status, answer.headers)
            async with contextlib.aclosing(answer.chunks()) as chunks:
                async for chunk in chunks:
                    await self.transport.call(part.write, chunk)
                    if time.monotonic() > attempts.until:
                        raise deadline_error()
        part.end()

    async def _reply(self, answer: HttpAnswer) -> Reply:
        return Reply(answer.status, answer.headers, b"".join([chunk async for chunk in answer.chunks()]))

    def _request(self, call: ClientRequest[T], upload: Upload | None, silence_s: float | None) -> HttpRequest:
        settings = self._settings
        credential = {} if self._unchecked else settings.authorization()
        return HttpRequest(
            call.method,
            settings.url + call.path,
            {**self._always, **call.headers, **_length(call, upload), **credential},
            call.body if upload is None else self.transport.body(upload.parts()),
            timeout_s=settings.timeout_s,
            silence_s=(silence_s or settings.timeout_s) + call.wait_s,
        )


def _length(call: ClientRequest[T], upload: Upload | None) -> dict[str, str]:
    """Return the header that delimits the body."""
    if upload is None:
        return {"Content-Length": str(len(call.body or b""))} if call.method == "POST" else {}
    if upload.size_bytes is None:
        return {"Transfer-Encoding": "chunked"}
    return {"Content-Length": str(upload.size_bytes)}


def _retry_delay_s(call: ClientRequest[T], reply: Reply) -> float | None:
    """Return the seconds to wait before another attempt; None if the answer is final."""
    if call.is_answer(reply.status) or reply.status not in RETRYABLE:
        return None
    return reply.retry_after_s()
