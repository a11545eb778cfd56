"""The public keys of an issuer of JWTs (JWKS, RFC 7517): from a file or by HTTPS, kept until rollover.

Only asymmetric signature keys are taken; each says which algorithms fit it (RFC 8725 §3.1), so that no token
can choose.
"""

import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import httpx
import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from kms_core.errors import ConfigurationError, Unavailable
from kms_core.wire import NOT_JSON

PublicKeyType = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey
KEEP_S: Final = 600.0
AGAIN_S: Final = 5.0
STALE_S: Final = 24 * 3600.0
_TIMEOUT_S: Final = 5.0
_MOST_BYTES: Final = 256 * 1024
_MOST_KEYS: Final = 64
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """A key that signatures are verified with, and the algorithms that fit it."""

    kid: str | None
    key: PublicKeyType = field(repr=False)
    algorithms: frozenset[str]


class Keys(Protocol):
    """The keys of one issuer."""

    def fitting(self, kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
        """Those that may have signed; they may be fetched first. Raises Unavailable while none are known."""


class _KeySet(msgspec.Struct):
    keys: list[dict[str, object]]


def parse(data: bytes) -> tuple[IssuerKey, ...]:
    """The usable keys of a set; others are passed over. ValueError if it is no set or none is usable."""
    try:
        found = msgspec.json.decode(data, type=_KeySet).keys
    except NOT_JSON as exc:
        raise ValueError("this is not a JSON Web Key Set") from exc
    keys = tuple(_usable(found[:_MOST_KEYS]))
    if not keys:
        raise ValueError("the key set has no RSA, P-256, P-384, P-521 or Ed25519 key for signatures")
    return keys


def _usable(found: Sequence[dict[str, object]]) -> Iterator[IssuerKey]:
    for entry in found:
        if entry.get("use", "sig") != "sig" or entry.get("kty") == "oct":
            continue
        with suppress(PyJWTError, ValueError, TypeError):
            key = PyJWK(entry).key
            if isinstance(key, RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey):
                named = entry.get("alg")
                fits = _algorithms(key)
                kid = entry.get("kid")
                yield IssuerKey(
                    kid if isinstance(kid, str) else None,
                    key,
                    fits & {named} if isinstance(named, str) else fits,
                )


def _algorithms(key: PublicKeyType) -> frozenset[str]:
    match key:
        case RSAPublicKey():
            return _RSA
        case EllipticCurvePublicKey():
            return frozenset({_CURVES.get(key.curve.name, "")}) - {""}
        case _:
            return frozenset({"EdDSA"})


def _fitting(keys: Sequence[IssuerKey], kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
    """A token without a key id is tried with every key that fits its algorithm."""
    return [key for key in keys if algorithm in key.algorithms and kid in {None, key.kid}]


class FileKeys:
    """A key set in a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigurationError if it cannot be used."""
        self._path = path
        try:
            self._stamp, self._keys = self._read()
        except (OSError, ValueError) as exc:
            raise ConfigurationError(f"The issuer's key set {path} cannot be used: {exc}") from exc

    def fitting(self, kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
        try:
            if self._stamped() != self._stamp:
                self._stamp, self._keys = self._read()
        except (OSError, ValueError) as exc:
            _log.error("jwks.unreadable", path=str(self._path), reason=str(exc))
            raise Unavailable("The keys of the token's issuer cannot be read") from exc
        return _fitting(self._keys, kid, algorithm)

    def _read(self) -> tuple[tuple[int, ...], tuple[IssuerKey, ...]]:
        stamp = self._stamped()
        return stamp, parse(self._path.read_bytes())

    def _stamped(self) -> tuple[int, ...]:
        found = self._path.stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class RemoteKeys:
    """A key set by HTTPS, fetched when it is old or lacks a key, and at most every five seconds.

    While the issuer is away its keys are used for a day.
    """

    def __init__(self, fetch: Callable[[], bytes], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: tuple[IssuerKey, ...] = ()
        self._fetched = self._tried = float("-inf")

    def fitting(self, kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
        found = _fitting(self._keys, kid, algorithm)
        if not found or self._clock() - self._fetched > KEEP_S:
            self._refresh()
            found = _fitting(self._keys, kid, algorithm)
        if self._clock() - self._fetched > STALE_S:
            raise Unavailable("The keys of the token's issuer cannot be fetched", retry_after_s=AGAIN_S)
        return found

    def _refresh(self) -> None:
        """Neither a flood of unknown key ids nor an issuer that is away is passed on."""
        with self._lock:
            if self._clock() - self._tried < AGAIN_S:
                return
            self._tried = self._clock()
            try:
                self._keys = parse(self._fetch())
                self._fetched = self._clock()
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as exc:
                reason = str(exc) if isinstance(exc, ValueError) else ""
                _log.warning("jwks.not_fetched", error=type(exc).__name__, reason=reason)


def fetching(ca_file: Path | None) -> Callable[[str], bytes]:
    """How to get what is at a URL: no redirects, 5 seconds, at most 256 KiB. Raises ConfigurationError."""
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as exc:
        raise ConfigurationError(f"Cannot read the certificate authorities in {ca_file}") from exc

    def fetch(url: str) -> bytes:
        with (
            httpx.Client(verify=context, timeout=_TIMEOUT_S) as client,
            client.stream("GET", url, headers={"Accept": "application/json"}) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                raise ValueError("the issuer did not answer 200")
            data = b""
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > _MOST_BYTES:
                    raise ValueError("the answer is above 256 KiB")
            return data

    return fetch
