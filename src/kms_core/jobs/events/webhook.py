"""Webhooks: endpoints from settings, the event, its signature and the request. Does not use Redis.

One POST for one event: a CloudEvents 1.0 JSON body in structured mode, signed (``sign_standard``). The name
of the endpoint is resolved once for each request, every address found is checked, and the connection goes to
those addresses while TLS and ``Host`` keep the name: a name that changes its address in between changes
nothing. No redirect is followed and no body is read.
"""

import base64
import hashlib
import hmac
import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import httpcore2
import msgspec
import structlog

from kms_core.http_client import DeadlineTransport, within
from kms_core.jobs import failures
from kms_core.jobs.events.address_classes import Address, is_of_host, is_public
from kms_core.jobs.model import Job
from kms_core.secure_files import check_secret
from kms_core.settings.model import EndpointSection as Section
from kms_core.settings.model import Settings
from kms_protocol import __version__, small_files, wire
from kms_protocol.addresses import is_loopback
from kms_protocol.errors import ConfigurationError
from kms_protocol.tls_client import client_context
from kms_protocol.units import time_text

CONTENT_TYPE: Final = "application/cloudevents+json"
SOURCE: Final = f"{wire.PREFIX}/jobs"
SECRET_BYTES: Final = 32
STANDARD_PREFIX: Final = b"whsec_"
STANDARD_SECRET_BYTES: Final = 24
CONNECT_S: Final = 2.0
TOTAL_S: Final = 10.0
_MAKE: Final = "make one with `(umask 077; echo whsec_$(openssl rand -base64 32) > {path})`"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WebhookEndpoint:
    """One receiver. ``loopback_only``: dev's receivers on this machine, which may lack TLS."""

    section: Section = field(repr=False)
    loopback_only: bool = False
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def allows(self, address: Address) -> bool:
        if self.loopback_only:
            return address.is_loopback
        return is_public(address) or (self.section.allow_private and not is_of_host(address))


class EventData(msgspec.Struct, frozen=True, kw_only=True):
    """The job and its transition, in the terms of ``GET /jobs/{id}``."""

    job_id: str
    kind: wire.JobKind
    state: wire.JobState
    attempt: int
    error: wire.JobError | None
    progress: wire.JobProgress
    labels: Mapping[str, str] | msgspec.UnsetType = msgspec.UNSET
    metadata: Mapping[str, str] | msgspec.UnsetType = msgspec.UNSET


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True):
    """CloudEvents 1.0.2 §3.1; ``id`` is the delivery id, ``subject`` the job id, ``time`` RFC 3339."""

    specversion: str = "1.0"
    id: str
    type: str
    source: str = SOURCE
    subject: str
    time: str
    datacontenttype: str = "application/json"
    data: EventData | wire.GroupOut


class WebhookRequest(msgspec.Struct, frozen=True):
    """One signed request: ``body`` is the same in every attempt, the signature's time is not."""

    delivery_id: str
    job_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class DeliveryOutcome:
    """The outcome of a request; ``reason`` is for logs, such as ``http_500`` or ``address_refused``."""

    result: Literal["delivered", "gone", "failed"]
    reason: str = ""


class AddressRefused(Exception):
    """The endpoint's name stands for an address that its section does not allow."""


_FAILURES: Final[Mapping[type[Exception], str]] = {  # the first that fits
    ConfigurationError: "secret_unreadable",
    AddressRefused: "address_refused",
    socket.gaierror: "name_not_found",
    httpcore2.TimeoutException: "timeout",
    httpcore2.ConnectError: "connect_failed",
    httpcore2.NetworkError: "connection_broken",
    httpcore2.ProtocolError: "connection_broken",
}


# -- endpoints ---------------------------------------------------------------------------------------


def endpoints(settings: Settings) -> dict[str, WebhookEndpoint]:
    """The endpoints by name. ConfigurationError if a secret or a CA file cannot be used; warns as keys do."""
    found = settings.kms.jobs.endpoints
    return {name: _endpoint(section, settings, name) for name, section in found.items()}


def _endpoint(section: Section, settings: Settings, name: str) -> WebhookEndpoint:
    url, event = urlsplit(section.url), "webhook.secret_open_to_others"
    for path in secret_files(section):
        read_secret(path)
        check_secret(path, _log.warning, event, strict=settings.is_prod)
    ca_setting = f"kms.jobs.endpoints.{name}.ca_file"
    tls = client_context(section.ca_file, ca_setting) if url.scheme == "https" else None
    return WebhookEndpoint(section, settings.environment == "dev" and is_loopback(url.hostname), tls)


def secret_files(section: Section) -> list[Path]:
    """The files of the secrets that sign, the current one first."""
    return [path for path in (section.secret_file, section.previous_secret_file) if path]


def read_secret(path: Path) -> bytes:
    """The key of signatures: after ``whsec_`` base64 of at least 24 bytes (Standard Webhooks 1.0).

    Of another text the file without its final newline, at least 32 bytes. It is read for each delivery, so a
    new secret needs no restart. Raises ConfigurationError.
    """
    hint = _MAKE.format(path=path)
    try:
        secret = small_files.read(path).rstrip(b"\r\n")
    except OSError as exc:
        raise ConfigurationError(f"Cannot read the webhook secret {path} ({exc.strerror}): {hint}") from exc
    least = SECRET_BYTES
    if secret.startswith(STANDARD_PREFIX):
        least = STANDARD_SECRET_BYTES
        try:
            secret = base64.b64decode(secret.removeprefix(STANDARD_PREFIX), validate=True)
        except ValueError as exc:
            raise ConfigurationError(f"The webhook secret {path} is no base64 after whsec_: {hint}") from exc
    if len(secret) < least:
        raise ConfigurationError(f"The webhook secret {path} is below {least} bytes: {hint}")
    return secret


# -- what is sent ------------------------------------------------------------------------------------


def group_body(event_id: str, group: wire.GroupOut, at: float) -> bytes:
    """The body for the end of a group; ``at`` in seconds since the epoch."""
    return _body(event_id, "kms.group.ended", group.name, at, group)


def event_body(delivery_id: str, job: Job, at: float) -> bytes:
    """The body for a job as one event found it; ``at`` in seconds since the epoch."""
    data = EventData(
        job_id=job.job_id,
        kind=job.kind,
        state=job.state,
        attempt=job.attempt,
        error=failures.error_of(job),
        progress=job.progress,
        labels=job.labels or msgspec.UNSET,
        metadata=(job.accepted.metadata if job.accepted else None) or msgspec.UNSET,
    )
    return _body(delivery_id, f"kms.job.{job.state}", job.job_id, at, data)


def _body(name: str, kind: str, subject: str, at: float, data: EventData | wire.GroupOut) -> bytes:
    moment = time_text(at, "milliseconds")
    return msgspec.json.encode(CloudEvent(id=name, type=kind, subject=subject, time=moment, data=data))


def sign(secret: bytes, timestamp: int, message: WebhookRequest) -> str:
    """``v1=`` and 64 hex digits: HMAC-SHA256 over ``<timestamp>.<delivery id>.<job id>.<body>``."""
    head = f"{timestamp}.{message.delivery_id}.{message.job_id}.".encode()
    return "v1=" + hmac.new(secret, head + message.body, hashlib.sha256).hexdigest()


def sign_standard(secrets: Sequence[bytes], timestamp: int, message: WebhookRequest) -> str:
    """``v1,`` and base64 of HMAC-SHA256 over ``<delivery id>.<timestamp>.<body>``, once for each secret.

    https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
    """
    signed = f"{message.delivery_id}.{timestamp}.".encode() + message.body
    macs = (hmac.new(secret, signed, hashlib.sha256).digest() for secret in secrets)
    return " ".join("v1," + base64.b64encode(mac).decode() for mac in macs)


def _headers(section: Section, message: WebhookRequest) -> dict[bytes | str, bytes | str]:
    """The headers of a request. Raises ConfigurationError if a secret cannot be read."""
    now, secrets = int(time.time()), [read_secret(path) for path in secret_files(section)]
    own: dict[bytes | str, bytes | str] = {
        "X-KMS-Delivery": message.delivery_id,
        "X-KMS-Job": message.job_id,
        "X-KMS-Timestamp": str(now),
        "X-KMS-Signature": sign(secrets[0], now, message),
    }
    return {
        "Content-Type": CONTENT_TYPE,
        "User-Agent": f"kms-service/{__version__}",
        "Connection": "close",
        "webhook-id": message.delivery_id,
        "webhook-timestamp": str(now),
        "webhook-signature": sign_standard(secrets, now, message),
        **(own if section.kms_headers else {}),
    }


# -- the request -------------------------------------------------------------------------------------


def post(endpoint: WebhookEndpoint, message: WebhookRequest, total_s: float = TOTAL_S) -> DeliveryOutcome:
    """Send once, in ``total_s`` besides the name's lookup. Any answer but 2xx or 410 is a failure."""
    try:
        with within(total_s):
            return _judged(_status(endpoint, message))
    except tuple(_FAILURES) as exc:
        word = next(word for kind, word in _FAILURES.items() if isinstance(exc, kind))
        tls = isinstance(exc.__context__, ssl.SSLError)  # the pool drops the cause
        return DeliveryOutcome("failed", "tls_failed" if tls else word)


def resolve(endpoint: WebhookEndpoint) -> list[Address]:
    """All addresses of the endpoint's name. Raises AddressRefused for any forbidden one, socket.gaierror."""
    url = urlsplit(endpoint.section.url)
    found = socket.getaddrinfo(url.hostname, url.port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(sockaddr[0])) for *_, sockaddr in found]
    if not all(map(endpoint.allows, addresses)):
        raise AddressRefused
    return addresses


def _status(endpoint: WebhookEndpoint, message: WebhookRequest) -> int:
    headers = _headers(endpoint.section, message)
    timeouts = {"connect": CONNECT_S, "read": TOTAL_S, "write": TOTAL_S, "pool": TOTAL_S}
    network = DeadlineTransport([str(address) for address in resolve(endpoint)])
    with (
        httpcore2.ConnectionPool(ssl_context=endpoint.tls, network_backend=network) as pool,
        pool.stream(
            "POST",
            endpoint.section.url,
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
