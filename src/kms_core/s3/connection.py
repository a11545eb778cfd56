"""The line to an object store: signed HTTP requests over kept connections, tried again; knows no operation.

``http.client`` reads a body straight into the memory where a slab is sealed, and lets other threads run
meanwhile. Nothing of an answer's body gets into an error but the store's own code for it. No proxy, cookie or
redirect is followed. Safe for threads, and after a fork the child makes connections of its own.
"""

import hashlib
import http.client
import os
import random
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

import structlog

from kms_core.observability import metrics
from kms_core.s3 import sigv4
from kms_core.s3.sigv4 import Request, Source
from kms_protocol import __version__
from kms_protocol.errors import Unavailable

TRIES: Final = 4
FIRST_WAIT_S: Final = 0.1
_SLOW: Final = 10  # times the usual patience
ANSWER_BYTES: Final = 8 * 1024 * 1024
"""More than a page of 1,000 keys of 1 KiB can have."""

_SEND_BYTES: Final = 1024 * 1024
_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")
_BROKEN: Final = (OSError, http.client.HTTPException)  # ssl.SSLError and TimeoutError are OSErrors
_PASSING: Final = frozenset(
    {"ExpiredToken", "InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class S3Endpoint:
    """Where a bucket is. ``endpoint`` is ``http[s]://host[:port][/prefix]``, checked by the settings."""

    endpoint: str
    region: str
    credentials: Source = field(repr=False)
    trust: ssl.SSLContext | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. ``path`` is encoded; ``slow`` says that the store works long before it answers."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: memoryview | bytes = b""
    slow: bool = False


@dataclass(frozen=True, slots=True)
class S3Answer:
    """A status, the headers by lower-case name, and a bounded body; ``code`` is the store's own word."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES and not self.code

    @property
    def code(self) -> str:
        """Empty if there is none. A 200 may hold one: some answers begin before their work has ended."""
        if b"<Error>" not in self.body[:512]:
            return ""
        found = _CODE.search(self.body)
        return found[1].decode() if found else ""

    @property
    def passing(self) -> bool:
        """Whether it may be another one the next time."""
        if self.status == HTTPStatus.NOT_IMPLEMENTED:
            return False
        return self.status >= HTTPStatus.INTERNAL_SERVER_ERROR or self.code in _PASSING


class S3Connection:
    """One endpoint with one set of credentials."""

    def __init__(self, place: S3Endpoint, *, first_wait_s: float = FIRST_WAIT_S) -> None:
        """Connects to nothing."""
        url = urlsplit(place.endpoint)
        self.place = place
        self.prefix = url.path.rstrip("/")
        self._host, self._port = url.hostname or "", url.port
        self._secure = url.scheme == "https"
        self._first_wait_s = first_wait_s
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._owner = os.getpid()

    def ask(self, ask: Ask, subdomain: str = "") -> S3Answer:
        """The answer, whatever its status below 500. Raises Unavailable when it is not to be had.

        Everything that is asked may arrive twice, since an answer can be lost.
        """
        return self._tried(ask, subdomain, _whole)

    def fetch(self, ask: Ask, views: Sequence[memoryview], subdomain: str = "") -> S3Answer:
        """As ``ask``; the body of a 200 or 206 goes into the views, which it must fill exactly."""

        def into(response: http.client.HTTPResponse) -> bytes:
            if response.status not in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT}:
                return _whole(response)
            if response.length != sum(map(len, views)):
                raise http.client.IncompleteRead(b"")  # its size is not that of the range
            for view in views:
                _fill(response, view)
            return b""

        return self._tried(ask, subdomain, into)

    def _tried(self, ask: Ask, subdomain: str, read: Callable[[http.client.HTTPResponse], bytes]) -> S3Answer:
        digest = hashlib.sha256(ask.body).hexdigest()
        trouble = ""
        for number in range(TRIES):
            if number:
                time.sleep(self._first_wait_s * 4.0 ** (number - 1) * random.uniform(0.5, 1.0))  # noqa: S311 -- jitter
            try:
                answer = self._once(ask, subdomain, digest, read)
            except _BROKEN as exc:
                metrics.S3_REQUESTS.labels(ask.method, "broken").inc()
                trouble = f"does not answer ({type(exc).__name__})"
                continue
            metrics.S3_REQUESTS.labels(ask.method, str(answer.status)).inc()
            if not answer.passing:
                return answer
            trouble = f"answers {answer.status} {answer.code}".rstrip()
        _log.warning("s3.unavailable", host=self._host, method=ask.method, trouble=trouble)
        raise Unavailable(f"The object store at {self._host} {trouble}")

    def _once(
        self, ask: Ask, subdomain: str, digest: str, read: Callable[[http.client.HTTPResponse], bytes]
    ) -> S3Answer:
        host = f"{subdomain}.{self._host}" if subdomain else self._host
        named = f"[{host}]" if ":" in host else host
        request = Request(
            ask.method,
            f"{named}:{self._port}" if self._port else named,
            self.prefix + ask.path,
            ask.query,
            ask.headers,
            digest,
        )
        headers = sigv4.sign(request, self.place.credentials(), self.place.region, datetime.now(UTC))
        headers |= {"User-Agent": f"kms-service/{__version__}", "Accept-Encoding": "identity"}
        if ask.body or ask.method in {"PUT", "POST"}:
            headers["Content-Length"] = str(len(ask.body))
        connection = self._connection(host, self.place.timeout_s * (_SLOW if ask.slow else 1))
        try:
            response = _exchange(connection, request, headers, memoryview(ask.body))
            body = read(response)
            answer = S3Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, body
            )
        except BaseException:
            connection.close()
            raise
        if response.will_close or not response.isclosed():
            connection.close()
        else:
            self._keep(connection)
        return answer

    # -- connections ---------------------------------------------------------------------------------

    def _connection(self, host: str, timeout_s: float) -> http.client.HTTPConnection:
        with self._lock:
            if self._owner != os.getpid():  # two processes on one connection would read each other's answers
                self._idle, self._owner = [], os.getpid()
            at = next((n for n, one in enumerate(self._idle) if one.host == host), None)
            kept = None if at is None else self._idle.pop(at)
        if kept and kept.sock and not _has_ended(kept.sock):
            kept.sock.settimeout(timeout_s)
            return kept
        if kept:
            kept.close()
        if self._secure:
            return http.client.HTTPSConnection(host, self._port, timeout=timeout_s, context=self.place.trust)
        return http.client.HTTPConnection(host, self._port, timeout=timeout_s)

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._idle.append(connection)

    def close(self) -> None:
        """Close what is open. A later request connects again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _exchange(
    connection: http.client.HTTPConnection, request: Request, headers: Mapping[str, str], body: memoryview
) -> http.client.HTTPResponse:
    connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    with suppress(BrokenPipeError, ConnectionResetError):  # a refusal may come before all is sent
        for start in range(0, len(body), _SEND_BYTES):  # each has its own timeout
            connection.send(body[start : start + _SEND_BYTES])
    return connection.getresponse()


def _whole(response: http.client.HTTPResponse) -> bytes:
    body = response.read(ANSWER_BYTES + 1)
    if len(body) > ANSWER_BYTES:
        raise http.client.HTTPException("an endless answer")
    return body


def _fill(response: http.client.HTTPResponse, view: memoryview) -> None:
    while view:
        got = response.readinto(view)
        if not got:
            raise http.client.IncompleteRead(b"")
        view = view[got:]


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side hung up, or says what nobody asked for."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))
