"""AWS Signature Version 4 for S3, and where its credentials come from; sends nothing itself.

Source: "Signature Calculations for the Authorization Header", Amazon S3 API reference. S3 differs from other
services: a path is encoded once, and every request carries the digest of its body.
"""

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import quote

import structlog

from kms_core.secure_files import open_to_others
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, Unavailable

_log = structlog.get_logger(__name__)
ALGORITHM: Final = "AWS4-HMAC-SHA256"
_SERVICE: Final = "s3"
_END: Final = "aws4_request"


@dataclass(frozen=True, slots=True)
class Credentials:
    """An access key; ``token`` goes with a temporary one."""

    access_key_id: str
    secret_key: str = field(repr=False)
    token: str = field(default="", repr=False)


Source = Callable[[], Credentials]
"""Gives the credentials of now. Raises Unavailable where there are none."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is signed. ``path`` is encoded; ``query`` and ``headers`` are not; ``digest`` is of the body."""

    method: str
    host: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    digest: str

    @property
    def target(self) -> str:
        """Path and query as they are sent."""
        text = encoded(self.query)
        return f"{self.path}?{text}" if text else self.path


def sign(request: Request, credentials: Credentials, region: str, now: datetime) -> dict[str, str]:
    """All headers to send: the given ones, what S3 wants besides, and the signature over them and body."""
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
    """A query in the order and the form that the signature wants."""
    return "&".join(f"{quote(name, safe='')}={quote(query[name], safe='')}" for name in sorted(query))


# -- credentials -------------------------------------------------------------------------------------


def from_file(access_key_id: str, path: Path, setting: str, *, strict: bool) -> Source:
    """An access key whose secret is the content of a file, read now. ConfigurationError if it cannot be.

    A file that others can read is warned of, and refused if ``strict``.
    """
    try:
        secret = small_files.text(path).strip()
        mode = open_to_others(path)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{setting}: cannot read {path}; check the path and its mode") from exc
    if not secret:
        raise ConfigurationError(f"{setting}: {path} is empty")
    if mode:
        advice = f"{setting}: {path} can be read by others (mode {mode:04o}): run `chmod 600 {path}`"
        if strict:
            raise ConfigurationError(advice)
        _log.warning("s3.secret_open_to_others", advice=advice)
    found = Credentials(access_key_id, secret)
    return lambda: found


def from_surroundings(setting: str) -> Source:
    """What AWS tools would use: ``AWS_*`` variables, ``~/.aws``, a role; renewed before it expires.

    ConfigurationError without botocore, which finds them.
    """
    try:
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415 -- of an extra
        from botocore.session import Session  # noqa: PLC0415 -- as above
    except ImportError as exc:
        raise ConfigurationError(
            f"{setting}: name an access_key_id and a secret_key_file, or run "
            "`pip install 'kms-service[aws]'` to use the credentials of the surroundings"
        ) from exc
    session = Session()

    def found() -> Credentials:
        try:
            held = session.get_credentials()
            frozen = held and held.get_frozen_credentials()
        except BotoCoreError as exc:
            raise Unavailable("The AWS credentials of the surroundings cannot be had now") from exc
        if not frozen or not frozen.access_key or not frozen.secret_key:
            raise Unavailable(
                f"There are no AWS credentials for {setting}: set access_key_id and secret_key_file, "
                "AWS_* variables, or give the service a role"
            )
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token or "")

    return found
