"""Webhooks: endpoints from settings, the event that is sent, its signature and the request; knows no Redis.

One POST for one event: a CloudEvents 1.0 JSON body in structured mode, signed (``sign``). The endpoint's name
is resolved once for each request, every address found is checked, and the connection goes to those addresses
while TLS and ``Host`` keep the name: a name that changes its address in between changes nothing. No redirect
is followed and no body is read.
"""

import hashlib
import hmac
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import httpcore
import msgspec
import structlog

from kms_core.jobs.events.addresses import Address, is_of_host, is_public
from kms_core.jobs.model import Job
from kms_core.secure_files import open_to_others
from kms_core.settings.model import EndpointSection as Section
from kms_core.settings.model import Settings
from kms_core.settings.validate_backends import is_loopback
from kms_protocol import __version__, small_files, wire
from kms_protocol.errors import ConfigurationError
from kms_protocol.tls_client import client_context

CONTENT_TYPE: Final = "application/cloudevents+json"
SOURCE: Final = f"{wire.PREFIX}/jobs"
SECRET_BYTES: Final = 32
CONNECT_S: Final = 2.0
TOTAL_S: Final = 10.0
_READ_BYTES: Final = 4096
_MAKE: Final = "make one with `(umask 077; openssl rand -hex 32 > {path})`"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WebhookEndpoint:
    """One receiver. ``loopback_only``: dev's receivers on this machine, which may lack TLS."""

    url: str = field(repr=False)
    secret_file: Path
    events: frozenset[str]
    allow_private: bool = False
    loopback_only: bool = False
    tenants: frozenset[str] | None = None
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def is_for(self, tenant: str) -> bool:
        """Whether jobs of a tenant may name it."""
        return self.tenants is None or tenant in self.tenants

    def allows(self, address: Address) -> bool:
        if self.loopback_only:
            return address.is_loopback
        return is_public(address) or (self.allow_private and not is_of_host(address))


class EventData(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to which job; the same words as ``GET /jobs/{id}``."""

    job_id: str
    kind: wire.JobKind
    state: wire.JobState
    attempt: int
    error: wire.ErrorCode | None
    progress: wire.JobProgress


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True):
    """CloudEvents 1.0.2 §3.1; ``id`` is the delivery id, ``subject`` the job id, ``time`` RFC 3339."""

    specversion: str = "1.0"
    id: str
    type: str
    source: str = SOURCE
    subject: str
    time: str
    datacontenttype: str = "application/json"
    data: EventData


@dataclass(frozen=True, slots=True)
class WebhookRequest:
    """One signed request: ``body`` is the same in every attempt, the signature's time is not."""

    delivery_id: str
    job_id: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DeliveryOutcome:
    """How a request ended; ``reason`` is a word for logs, such as ``http_500`` or ``address_refused``."""

    result: Literal["delivered", "gone", "failed"]
    reason: str = ""


class AddressRefused(Exception):
    """The endpoint's name stands for an address that its section does not allow."""


_FAILURES: Final[Mapping[type[Exception], str]] = {  # the first that fits
    ConfigurationError: "secret_unreadable",
    AddressRefused: "address_refused",
    socket.gaierror: "name_not_found",
    httpcore.TimeoutException: "timeout",
    httpcore.ConnectError: "connect_failed",
    httpcore.NetworkError: "connection_broken",
    httpcore.ProtocolError: "connection_broken",
}
_KINDS: Final = tuple(_FAILURES)


# -- endpoints ---------------------------------------------------------------------------------------


def endpoints(settings: Settings) -> dict[str, WebhookEndpoint]:
    """The endpoints by name. ConfigurationError if a secret or a CA file cannot be used; warns as keys do."""
    found = settings.kms.jobs.endpoints
    return {name: _endpoint(section, settings, name) for name, section in found.items()}


def _endpoint(section: Section, settings: Settings, name: str) -> WebhookEndpoint:
    url = urlsplit(section.url)
    read_secret(section.secret_file)
    _check_mode(section.secret_file, strict=settings.is_prod)
    ca_setting = f"kms.jobs.endpoints.{name}.ca_file"
    tls = client_context(section.ca_file, ca_setting) if url.scheme == "https" else None
    return WebhookEndpoint(
        url=section.url,
        secret_file=section.secret_file,
        events=frozenset(section.events),
        allow_private=section.allow_private,
        loopback_only=settings.environment == "dev" and is_loopback(url.hostname or ""),
        tenants=None if section.tenants is None else frozenset(section.tenants),
        tls=tls,
    )


def read_secret(path: Path) -> bytes:
    """The file without its final newline, at least 32 bytes. Raises ConfigurationError.

    It is read for each delivery, so a new secret needs no restart.
    """
    try:
        secret = small_files.read(path).rstrip(b"\r\n")
    except OSError as exc:
        hint = _MAKE.format(path=path)
        raise ConfigurationError(f"Cannot read the webhook secret {path} ({exc.strerror}): {hint}") from exc
    if len(secret) < SECRET_BYTES:
        hint = _MAKE.format(path=path)
        raise ConfigurationError(f"The webhook secret {path} is below {SECRET_BYTES} bytes: {hint}")
    return secret


def _check_mode(path: Path, *, strict: bool) -> None:
    mode = open_to_others(path)
    if not mode:
        return
    advice = f"{path} can be read by others (mode {mode:04o}): run `chmod 600 {path}`"
    if strict:
        raise ConfigurationError(advice)
    _log.warning("webhook.secret_open_to_others", path=str(path), mode=f"{mode:04o}", advice=advice)


# -- what is sent ------------------------------------------------------------------------------------


def event_body(delivery_id: str, job: Job, at: float) -> bytes:
    """The body for a job as one event found it; ``at`` in seconds since the epoch."""
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    data = EventData(
        job_id=job.job_id,
        kind=job.kind,
        state=job.state,
        attempt=job.attempt,
        error=wire.ErrorCode(code=job.error) if job.error else None,
        progress=wire.JobProgress(
            items=job.items,
            items_done=job.items_done,
            items_failed=job.items_failed,
            bytes=job.bytes,
            bytes_done=job.bytes_done,
        ),
    )
    event = CloudEvent(
        id=delivery_id, type=f"kms.job.{job.state}", subject=job.job_id, time=moment, data=data
    )
    return msgspec.json.encode(event)


def sign(secret: bytes, timestamp: int, message: WebhookRequest) -> str:
    """``v1=`` and 64 hex digits: HMAC-SHA256 over ``<timestamp>.<delivery id>.<job id>.<body>``."""
    head = f"{timestamp}.{message.delivery_id}.{message.job_id}.".encode()
    return "v1=" + hmac.new(secret, head + message.body, hashlib.sha256).hexdigest()


def _headers(secret: bytes, message: WebhookRequest) -> dict[bytes | str, bytes | str]:
    now = int(time.time())
    return {
        "Content-Type": CONTENT_TYPE,
        "User-Agent": f"kms-service/{__version__}",
        "Connection": "close",
        "X-KMS-Delivery": message.delivery_id,
        "X-KMS-Job": message.job_id,
        "X-KMS-Timestamp": str(now),
        "X-KMS-Signature": sign(secret, now, message),
    }


# -- the request -------------------------------------------------------------------------------------


def post(endpoint: WebhookEndpoint, message: WebhookRequest, total_s: float = TOTAL_S) -> DeliveryOutcome:
    """Send once, in ``total_s`` besides the name's lookup. What is not answered 2xx or 410 has failed."""
    try:
        return _judged(_status(endpoint, message, time.monotonic() + total_s))
    except _KINDS as exc:
        word = next(word for kind, word in _FAILURES.items() if isinstance(exc, kind))
        tls = isinstance(exc.__context__, ssl.SSLError)  # the pool drops the cause
        return DeliveryOutcome("failed", "tls_failed" if tls else word)


def resolve(endpoint: WebhookEndpoint) -> list[Address]:
    """All addresses of the endpoint's name. Raises AddressRefused for any forbidden one, socket.gaierror."""
    url = urlsplit(endpoint.url)
    found = socket.getaddrinfo(url.hostname, url.port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(sockaddr[0])) for *_, sockaddr in found]
    if not all(map(endpoint.allows, addresses)):
        raise AddressRefused
    return addresses


def _status(endpoint: WebhookEndpoint, message: WebhookRequest, deadline: float) -> int:
    headers = _headers(read_secret(endpoint.secret_file), message)
    timeouts = {"connect": CONNECT_S, "read": TOTAL_S, "write": TOTAL_S, "pool": TOTAL_S}
    network = _Pinned(resolve(endpoint), deadline)
    with (
        httpcore.ConnectionPool(ssl_context=endpoint.tls, network_backend=network) as pool,
        pool.stream(
            "POST",
            endpoint.url,
            headers=headers,
            content=message.body,
            extensions={"timeout": timeouts},
        ) as answer,
    ):
        return answer.status


def _judged(status: int) -> DeliveryOutcome:
    if status == HTTPStatus.GONE:
        return DeliveryOutcome("gone", f"http_{status}")
    if HTTPStatus(200) <= status < HTTPStatus.MULTIPLE_CHOICES:
        return DeliveryOutcome("delivered")
    return DeliveryOutcome("failed", f"http_{status}")


class _Pinned(httpcore.SyncBackend):
    """Connects to the addresses that were checked, in their order, whatever host is asked for."""

    def __init__(self, addresses: Sequence[Address], deadline: float) -> None:
        self._addresses = addresses
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        del host
        last: httpcore.ConnectError | httpcore.ConnectTimeout | None = None
        for address in self._addresses:
            left = _left(timeout, self._deadline)
            try:
                stream = super().connect_tcp(str(address), port, left, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                last = exc
            else:
                return _BoundedConnection(stream, self._deadline)
        raise last or httpcore.ConnectError


class _BoundedConnection(httpcore.NetworkStream):
    """A connection that ends at a deadline, however slowly the other side drips."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(min(max_bytes, _READ_BYTES), _left(timeout, self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(timeout, self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = _left(timeout, self._deadline)
        return _BoundedConnection(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def _left(timeout: float | None, deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left if timeout is None else min(timeout, left)
