"""HTTP requests to an object store, signed by Signature Version 4, over pooled connections, with retries.

``http.client`` reads a body straight into the memory where it is encrypted, which takes a quarter of the time
of httpcore2 (ADR 23). Errors contain nothing of an answer's body except the store's error code. No proxy,
cookie or redirect is used. Safe for several threads; after a fork the child opens connections of its own.
"""

import hashlib
import hmac
import http.client
import os
import re
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit
from xml.sax.saxutils import unescape  # nosec B406  # text to text: nothing is parsed

import structlog

from kms_core.backoff import jittered_wait_s
from kms_core.secure_files import check_secret, secret_text
from kms_protocol import __version__
from kms_protocol.errors import ConfigurationError, Unavailable

_log = structlog.get_logger(__name__)
# AWS Signature Version 4 for S3, and the sources of its credentials.
#
# Source: "Signature Calculations for the Authorization Header", Amazon S3 API reference. Unlike other
# services, S3 encodes a path once and requires the digest of the body in each request.

ALGORITHM: Final = "AWS4-HMAC-SHA256"
_SERVICE: Final = "s3"
_END: Final = "aws4_request"
TRIES: Final = 4
FIRST_WAIT_S: Final = 0.1
SILENCES: Final = 2  # a connection that was kept may be dead: so a new one is tried once
_SLOW: Final = 10  # times the timeout
ANSWER_BYTES: Final = 8 * 1024 * 1024
"""Above the size of a page of 1,000 keys of 1 KiB."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """An access key; ``token`` belongs to a temporary one."""

    access_key_id: str
    secret_key: str = field(repr=False)
    token: str = field(default="", repr=False)


Source = Callable[[], Credentials]
"""Returns the current credentials. Raises Unavailable without any."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request to sign.

    ``path`` is encoded, ``query`` and ``headers`` are not; ``digest`` is that of the body.
    """

    method: str
    host: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    digest: str

    @property
    def target(self) -> str:
        """The path and the encoded query."""
        text = encoded(self.query)
        return f"{self.path}?{text}" if text else self.path


def sign(request: Request, credentials: Credentials, region: str, now: datetime) -> dict[str, str]:
    """All headers to send: the given ones, those that S3 requires, and the signature over all of it."""
    stamp = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{region}/{_SERVICE}/{_END}"
    headers = {"Host": request.host, **request.headers}
    headers |= {"x-amz-content-sha256": request.digest, "x-amz-date": stamp}
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    signed = {name.lower(): " ".join(value.split()) for name, value in headers.items()}
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    canonical = "\n".join(
        (request.method, request.path, encoded(request.query), lines, names, request.digest)
    )
    text = "\n".join((ALGORITHM, stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{credentials.secret_key}".encode()
    for part in (stamp[:8], region, _SERVICE, _END):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    headers["Authorization"] = (
        f"{ALGORITHM} Credential={credentials.access_key_id}/{scope}, "
        f"SignedHeaders={names}, Signature={signature}"
    )
    return headers


def encoded(query: Mapping[str, str]) -> str:
    """A query in the order and encoding of the signature."""
    return "&".join(f"{quote(name, safe='')}={quote(query[name], safe='')}" for name in sorted(query))


# -- credentials -------------------------------------------------------------------------------------


def credentials_from_file(access_key_id: str, path: Path, setting: str, *, strict: bool) -> Source:
    """An access key whose secret is the content of a file, read now.

    A file that others can read is logged, and refused if ``strict``. Raises ConfigurationError.
    """
    found = Credentials(access_key_id, secret_text(path, setting))
    check_secret(path, _log.warning, "s3.secret_open_to_others", strict=strict, setting=setting)
    return lambda: found


def credentials_from_environment(setting: str) -> Source:
    """The credentials that AWS tools find: ``AWS_*`` variables, ``~/.aws``, a role; renewed before expiry.

    Raises ConfigurationError without botocore.
    """
    try:
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415 -- of an extra
        from botocore.session import Session  # noqa: PLC0415 -- as above
    except ImportError as exc:
        raise ConfigurationError(
            f"{setting}: name an access_key_id and a secret_key_file, or run "
            "`pip install botocore` to use the credentials of the environment"
        ) from exc
    session = Session()

    def current() -> Credentials:
        try:
            held = session.get_credentials()
            frozen = held and held.get_frozen_credentials()
        except BotoCoreError as exc:
            raise Unavailable("The AWS credentials of the environment are not available now") from exc
        if not frozen or not frozen.access_key or not frozen.secret_key:
            raise Unavailable(
                f"There are no AWS credentials for {setting}: set access_key_id and secret_key_file, "
                "AWS_* variables, or give the service a role"
            )
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token or "")

    return current


_SEND_BYTES: Final = 1024 * 1024
_NO_LINGER: Final = struct.pack("ii", 1, 0)
_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")
_BROKEN: Final = (OSError, http.client.HTTPException)  # ssl.SSLError and TimeoutError are OSErrors
_TEMPORARY: Final = frozenset(
    {"ExpiredToken", "InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
)
_Reader = Callable[[http.client.HTTPResponse, http.client.HTTPConnection], bytes | None]
"""Reads a body; None leaves it, and the connection, to the caller of ``stream``."""


class StoreAway(Unavailable):
    """A store without a usable answer; ``status`` is that of its last one, 0 for none."""

    def __init__(self, detail: str, status: int) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True, slots=True)
class S3Endpoint:
    """Address, region and credentials.

    ``endpoint`` is ``http[s]://host[:port][/prefix]``, already checked.
    """

    endpoint: str
    region: str
    credentials: Source = field(repr=False)
    trust: ssl.SSLContext | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class S3Request:
    """One request. ``path`` is encoded; ``slow`` allows ten times the timeout for the answer.

    ``subdomain`` is that of the endpoint's host, if the store is to be asked there.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: memoryview | bytes = b""
    slow: bool = False
    subdomain: str = ""


@dataclass(frozen=True, slots=True)
class S3Answer:
    """Status, headers by lower-case name, body of at most 8 MiB, and the store's error code."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES and not self.code

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    @property
    def code(self) -> str:
        """The error code, or an empty text. A 200 may have one: some answers begin before the work ends."""
        if b"<Error>" not in self.body[:512]:
            return ""
        found = _CODE.search(self.body)
        return found[1].decode() if found else ""

    def time(self, name: str) -> float:
        """A time of the headers in seconds since the epoch; 0 without one."""
        try:
            return parsedate_to_datetime(self.headers.get(name, "")).timestamp()
        except ValueError:
            return 0.0

    @property
    def is_temporary(self) -> bool:
        """Return whether a retry may succeed: a 5xx other than 501, or a throttling error code."""
        if self.status == HTTPStatus.NOT_IMPLEMENTED:
            return False
        return self.status >= HTTPStatus.INTERNAL_SERVER_ERROR or self.code in _TEMPORARY


class S3Connection:
    """One endpoint with one set of credentials. Safe for several threads."""

    def __init__(self, endpoint: S3Endpoint, *, first_wait_s: float = FIRST_WAIT_S) -> None:
        """Make no call."""
        url = urlsplit(endpoint.endpoint)
        self.endpoint = endpoint
        self.prefix = url.path.rstrip("/")
        self._host, self._port = url.hostname or "", url.port
        self._secure = url.scheme == "https"
        self._first_wait_s = first_wait_s
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._owner = os.getpid()

    def ask(self, request: S3Request) -> S3Answer:
        """Send a request, and return its answer.

        Raises StoreAway after four attempts without one, or two that ran into the timeout.
        The store may get a request twice, since an answer can be lost.
        """
        return self._tried(request, lambda response, _: _whole(response))

    def fetch(self, request: S3Request, views: Sequence[memoryview]) -> S3Answer:
        """Send a request, and read the body of a 200 or 206 into the views, which it must fill."""

        def into(response: http.client.HTTPResponse, _: http.client.HTTPConnection) -> bytes:
            if not _has_range(response, sum(map(len, views))):
                return _whole(response)
            for view in views:
                _fill(response, view)
            return b""

        return self._tried(request, into)

    def stream(self, request: S3Request, size: int) -> "S3Answer | S3Body":
        """Send a request; the caller reads the body of a 200 or 206, of ``size`` bytes, and closes it."""
        bodies: list[S3Body] = []

        def keep(response: http.client.HTTPResponse, connection: http.client.HTTPConnection) -> bytes | None:
            if not _has_range(response, size):
                return _whole(response)
            bodies.append(S3Body(response, connection, self._keep))
            return None

        answer = self._tried(request, keep)
        return bodies[0] if bodies else answer

    def _tried(self, request: S3Request, read: _Reader) -> S3Answer:
        digest = hashlib.sha256(request.body).hexdigest()
        problem, status, silences = "", 0, 0
        for number in range(TRIES):
            if number:
                time.sleep(jittered_wait_s(self._first_wait_s, number, factor=4.0))
            try:
                answer = self._once(request, digest, read)
            except _BROKEN as exc:
                problem, status = f"does not answer ({type(exc).__name__})", 0
                silences += isinstance(exc, TimeoutError)
                if silences == SILENCES:
                    break
                continue
            if not answer.is_temporary:
                return answer
            problem, status = f"answers {answer.status} {answer.code}".rstrip(), answer.status
        _log.warning("s3.unavailable", host=self._host, method=request.method, problem=problem)
        raise StoreAway(f"The object store at {self._host} {problem}", status)

    def _once(self, request: S3Request, digest: str, read: _Reader) -> S3Answer:
        host = f"{request.subdomain}.{self._host}" if request.subdomain else self._host
        named = f"[{host}]" if ":" in host else host
        to_sign = Request(
            request.method,
            f"{named}:{self._port}" if self._port else named,
            self.prefix + request.path,
            request.query,
            request.headers,
            digest,
        )
        headers = sign(to_sign, self.endpoint.credentials(), self.endpoint.region, datetime.now(UTC))
        headers |= {"User-Agent": f"kms-service/{__version__}", "Accept-Encoding": "identity"}
        if request.body or request.method in {"PUT", "POST"}:
            headers["Content-Length"] = str(len(request.body))
        connection = self._connection(host, self.endpoint.timeout_s * (_SLOW if request.slow else 1))
        try:
            response = _exchange(connection, to_sign, headers, memoryview(request.body))
            body = read(response, connection)
            headers = {name.lower(): value for name, value in response.getheaders()}
            answer = S3Answer(response.status, headers, body or b"")
        except BaseException:
            _abort(connection)
            raise
        if body is not None:
            S3Body(response, connection, self._keep).close()
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
            return http.client.HTTPSConnection(
                host, self._port, timeout=timeout_s, context=self.endpoint.trust
            )
        return http.client.HTTPConnection(host, self._port, timeout=timeout_s)

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._idle.append(connection)

    def close(self) -> None:
        """Close all connections. A later request connects again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


@dataclass(frozen=True, slots=True)
class S3Body:
    """The body of an answer, read piece by piece."""

    _response: http.client.HTTPResponse
    _connection: http.client.HTTPConnection
    _keep: Callable[[http.client.HTTPConnection], None]

    def fill(self, view: memoryview) -> int:
        """Fill a view; fewer bytes only if the body breaks off."""
        filled = 0
        with suppress(*_BROKEN):
            while filled < len(view) and (got := self._response.readinto(view[filled:])):
                filled += got
        return filled

    def close(self) -> None:
        """Keep the connection for others, if all of the body was read."""
        response = self._response
        if response.will_close or not response.isclosed():
            response.close()
            self._connection.close()
        else:
            self._keep(self._connection)


def _exchange(
    connection: http.client.HTTPConnection, request: Request, headers: Mapping[str, str], body: memoryview
) -> http.client.HTTPResponse:
    connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    with suppress(BrokenPipeError, ConnectionResetError):  # a refusal may come before all of it is sent
        for start in range(0, len(body), _SEND_BYTES):  # each has its own timeout
            connection.send(body[start : start + _SEND_BYTES])
    return connection.getresponse()


def _abort(connection: http.client.HTTPConnection) -> None:
    """Close it, and send nothing that waits: a write that arrives after its retry could follow a deletion."""
    if connection.sock:
        with suppress(OSError):
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    connection.close()


def _whole(response: http.client.HTTPResponse) -> bytes:
    body = response.read(ANSWER_BYTES + 1)
    if len(body) > ANSWER_BYTES:
        raise http.client.HTTPException("an endless answer")
    return body


def _has_range(response: http.client.HTTPResponse, size: int) -> bool:
    """True if the body is the range that was asked for. Raises IncompleteRead for one of another size."""
    if response.status not in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT}:
        return False
    if response.length != size:
        raise http.client.IncompleteRead(b"")
    return True


def _fill(response: http.client.HTTPResponse, view: memoryview) -> None:
    while view:
        got = response.readinto(view)
        if not got:
            raise http.client.IncompleteRead(b"")
        view = view[got:]


def _has_ended(connection: socket.socket) -> bool:
    """Return whether the server closed the connection, or sent data without a request."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def tag(text: str, name: str) -> str:
    """The text of the first element of this name, or an empty text."""
    found = next(elements(text, name), "")
    return unescape(found, {"&quot;": '"', "&#34;": '"', "&apos;": "'", "&#39;": "'"})


def elements(text: str, name: str) -> Iterator[str]:
    """The texts of the elements of this name, which are not nested; in one pass over the text."""
    for begun in text.split(f"<{name}>")[1:]:
        inner, end, _ = begun.partition(f"</{name}>")
        if end:
            yield inner
