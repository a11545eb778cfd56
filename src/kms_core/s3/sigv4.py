"""AWS Signature Version 4 for S3, and the sources of its credentials.

Source: "Signature Calculations for the Authorization Header", Amazon S3 API reference. Unlike other services,
S3 encodes a path once and requires the digest of the body in each request.
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

from kms_core.secure_files import check_secret
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, Unavailable

_log = structlog.get_logger(__name__)
ALGORITHM: Final = "AWS4-HMAC-SHA256"
_SERVICE: Final = "s3"
_END: Final = "aws4_request"


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


def from_file(access_key_id: str, path: Path, setting: str, *, strict: bool) -> Source:
    """An access key whose secret is the content of a file, read now.

    A file that others can read is logged, and refused if ``strict``. Raises ConfigurationError.
    """
    try:
        secret = small_files.text(path).strip()
        check_secret(path, _log.warning, "s3.secret_open_to_others", strict=strict, setting=setting)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{setting}: cannot read {path}; check the path and its mode") from exc
    if not secret:
        raise ConfigurationError(f"{setting}: {path} is empty")
    found = Credentials(access_key_id, secret)
    return lambda: found


def from_environment(setting: str) -> Source:
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
