"""Public keys of issuers of JWTs (JWKS, RFC 7517), from a file or by HTTPS.

Only asymmetric signature keys are used. Each key has the algorithms that fit it (RFC 8725 §3.1), so that a
token cannot choose. The URL of a key set may come from OpenID Connect Discovery 1.0 §4.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from kms_core.http_client import Peer, PeerServer, Tls
from kms_core.reload import Stamp, stamp_of
from kms_core.sections import check_https
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, KmsError, Unavailable
from kms_protocol.wire import NOT_JSON

PublicKeyType = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey
AGAIN_S: Final = 5.0
KEEP_S: Final = 600.0
STALE_S: Final = 24 * 3600.0
WAIT_S: Final = 5.0
NO_KEYS: Final = "The keys of the token's issuer cannot be fetched"
_MOST_KEYS: Final = 64
_MOST_TRIED: Final = 8
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
WELL_KNOWN: Final = "/.well-known/openid-configuration"
_WITHIN_S: Final = 10.0
_log = structlog.get_logger(__name__)


def issuer_peer(url: str, ca_file: Path | None, setting: str) -> Peer:
    """The server at a URL, by the proxy of the environment. ``setting`` is the key of the URL.

    A call takes at most 10 seconds, without the lookup of the host's name. Raises ConfigurationError for a
    ``ca_file`` that cannot be used.
    """
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy_bypass(parts.hostname or ""):
        proxy = None
    return Peer(PeerServer(urlunsplit(parts), "the issuer", setting, _WITHIN_S, Tls(ca_file=ca_file), proxy))


def fetch(url: str, ca_file: Path | None, setting: str) -> bytes:
    """GET a URL: no redirects, at most 1 MiB. Raises as ``issuer_peer`` and ``Peer.call``; ValueError."""
    parts = urlsplit(url)
    with closing(issuer_peer(f"{parts.scheme}://{parts.netloc}", ca_file, setting)) as issuer:
        path = f"{parts.path or '/'}?{parts.query}".removesuffix("?")
        answer = issuer.call("GET", path, headers={"Accept-Encoding": "identity"})
    if not answer.ok:
        raise answer.unexpected_error()
    return answer.body


class _DiscoveryDocument(msgspec.Struct):
    issuer: str
    jwks_uri: str


def discover(issuer: str, fetch: Callable[[str], bytes], *, in_dev: bool) -> bytes:
    """Fetch an issuer's key set by the issuer's URL (OpenID Connect Discovery 1.0 §4).

    The discovery document must name exactly this issuer: a forged document could name forged keys. ``fetch``
    GETs a URL. Raises what ``fetch`` does; ValueError for a wrong document; ConfigurationError if the URL of
    its keys is not over TLS, or in dev to loopback.
    """
    try:
        text = fetch(issuer.removesuffix("/") + WELL_KNOWN)
        document = msgspec.json.decode(text, type=_DiscoveryDocument)
    except NOT_JSON as exc:
        raise ValueError("the discovery document is not JSON with an issuer and a jwks_uri") from exc
    if document.issuer != issuer:
        raise ValueError("the discovery document is of another issuer than that of the settings")
    check_https("jwks_uri of the discovery document", document.jwks_uri, in_dev=in_dev, query=True)
    return fetch(document.jwks_uri)


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """A key for verifying signatures, and the algorithms that fit it."""

    kid: str | None
    key: PublicKeyType = field(repr=False)
    algorithms: frozenset[str]


class _KeySet(msgspec.Struct):
    keys: list[dict[str, object]]


def parse(data: bytes) -> tuple[IssuerKey, ...]:
    """The usable keys of a set. Raises ValueError if it is not a key set or has none."""
    try:
        found = msgspec.json.decode(data, type=_KeySet).keys
    except NOT_JSON as exc:
        raise ValueError("not a JSON Web Key Set") from exc
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


def _candidates(keys: Sequence[IssuerKey], kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
    """The keys to try for a token, at most 8: those with its key id, if it has one, and its algorithm."""
    return [key for key in keys if algorithm in key.algorithms and kid in {None, key.kid}][:_MOST_TRIED]


class FileKeys:
    """A key set in a file, which is read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigurationError if it cannot be used."""
        self._path = path
        try:
            self._stamp, self._keys = self._read()
        except (OSError, ValueError) as exc:
            raise ConfigurationError(f"The issuer's key set {path} cannot be used: {exc}") from exc

    def candidate_keys(self, kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
        """The keys that may have made a signature. Raises Unavailable if they cannot be read."""
        try:
            if stamp_of([self._path]) != self._stamp:
                self._stamp, self._keys = self._read()
        except (OSError, ValueError) as exc:
            _log.error("jwks.unreadable", path=str(self._path), reason=str(exc))
            raise Unavailable("The keys of the token's issuer cannot be read") from exc
        return _candidates(self._keys, kid, algorithm)

    def _read(self) -> tuple[Stamp, tuple[IssuerKey, ...]]:
        stamp = stamp_of([self._path])
        return stamp, parse(small_files.read(self._path))


class KeysPending(Unavailable):
    """A token cannot be verified before ``look_up`` returns, which blocks for up to 5 seconds."""

    def __init__(self, look_up: Callable[[], None], source: object) -> None:
        """``source``: as of ``UnknownToken``."""
        super().__init__(NO_KEYS, retry_after_s=AGAIN_S)
        self.look_up, self.source = look_up, source


class RemoteKeys:
    """A key set by HTTPS. Uses the keys that are known, and does no network access in the caller's thread.

    The set is fetched again in the background when it is 5 minutes old, and for an unknown key id, at most
    once in 5 seconds. A caller has to wait (KeysPending) only for an unknown key id, or if the set is older
    than 10 minutes and no fetch has failed since. While fetches fail, a set is used for a day.
    """

    def __init__(self, fetch: Callable[[], bytes], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetch = fetch
        self._clock = clock
        self._lock = threading.Lock()
        self._thread = threading.Thread()
        self._keys: tuple[IssuerKey, ...] = ()
        self._fetched = self._began = self._ended = float("-inf")
        self._is_failing = False

    def candidate_keys(self, kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
        """The keys that may have made a signature. Does no network access.

        Raises KeysPending while keys are being fetched; Unavailable while none are known.
        """
        found, now = _candidates(self._keys, kid, algorithm), self._clock()
        age_s = now - self._fetched
        if found and age_s <= KEEP_S / 2:
            return found
        is_fetching = self._is_fetching(now)
        is_late = is_fetching and now - self._began >= WAIT_S
        if is_fetching and not is_late and (not found or (age_s > KEEP_S and not self._is_failing)):
            raise KeysPending(partial(self._wait, now + WAIT_S), self)
        found = _candidates(self._keys, kid, algorithm)  # a fetch may have ended since the first lookup
        if self._clock() - self._fetched > STALE_S or (not found and (is_late or self._is_failing)):
            raise Unavailable(NO_KEYS, retry_after_s=AGAIN_S)
        return found

    def _is_fetching(self, now: float) -> bool:
        """Return whether a fetch runs. One begins here, unless the last one ended within 5 seconds.

        At most one thread fetches. A fetch whose thread was lost by a fork counts as ended.
        """
        with self._lock:
            if not self._thread.is_alive() and now - self._ended >= AGAIN_S:
                self._began = now
                self._thread = threading.Thread(target=self._run, name="jwks", daemon=True)
                self._thread.start()
            return self._thread.is_alive()

    def _wait(self, until: float) -> None:
        """Block until the fetch has ended, at most until a time of the clock."""
        self._thread.join(max(0.0, until - self._clock()))

    def _run(self) -> None:
        is_failing = True
        try:
            self._keys = parse(self._fetch())
            self._fetched = self._clock()
            is_failing = False
        except (KmsError, OSError, ValueError) as exc:
            _log.warning("jwks.not_fetched", error=type(exc).__name__, reason=str(exc))
        finally:
            self._is_failing, self._ended = is_failing, self._clock()


IssuerKeys: TypeAlias = FileKeys | RemoteKeys
