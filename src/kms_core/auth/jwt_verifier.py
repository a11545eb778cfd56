"""Verification of JWTs (RFC 7519, RFC 8725) of configured issuers, by the claims that settings name.

It checks the algorithm (asymmetric, in the settings, and fit for the issuer's key), signature, issuer,
audience, expiry and start. Keys are those of the issuer's JWKS (RFC 7517); Kubernetes may be asked for a
review of a token. A verified token is cached for a minute.
"""

import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import jwt
import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK
from jwt import exceptions as jwt_errors
from jwt.exceptions import InvalidSignatureError, PyJWTError

from kms_core import scopes
from kms_core.auth.policy import Grant, Principal
from kms_core.auth.tokens import NAME, REFUSED, UnknownToken
from kms_core.http_client import Peer, PeerServer, Tls
from kms_core.patterns import Pattern
from kms_core.reload import Stamp, stamp_of
from kms_core.sections import check_https
from kms_core.settings.model import ClaimGrant, IssuerSection
from kms_protocol import small_files
from kms_protocol.errors import BackendUnavailable, ConfigurationError, KmsError, Unauthenticated, Unavailable
from kms_protocol.wire import NOT_JSON

AGAIN_S: Final = 5.0
_REMEMBERED_S: Final = 60.0
_MOST_REMEMBERED: Final = 4096
_log = structlog.get_logger(__name__)


# Reviews of tokens by a Kubernetes API server (TokenReview, authentication.k8s.io/v1).

_REVIEWS: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
_NO_REVIEW: Final = "The API server that reviews this token does not answer as it should"


class _User(msgspec.Struct):
    username: str = ""


class _Status(msgspec.Struct):
    authenticated: bool = False
    user: _User = msgspec.field(default_factory=_User)
    audiences: list[str] = []
    error: str = ""


class _Review(msgspec.Struct, rename="camel"):
    api_version: Literal["authentication.k8s.io/v1"]
    kind: Literal["TokenReview"]
    status: _Status


class Reviews:
    """Reviews tokens for one audience, and remembers accepted ones for a minute. Safe in several threads."""

    def __init__(
        self, server: Peer, token_file: Path, audience: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``token_file`` has the token of the reviewer for ``server``, and is read for each review."""
        self._server, self._token_file, self._audience, self._clock = server, token_file, audience, clock
        self._lock = threading.Lock()
        self._accepted: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def check(self, text: str, subject: object) -> None:
        """Return if the API server has accepted a token as this user. Does no network access.

        Raises Unauthenticated for another user; UnknownToken, whose look-up asks the API server, before.
        """
        digest = hashlib.sha256(text.encode("ascii")).digest()
        username, until = self._accepted.get(digest, ("", 0.0))
        if self._clock() >= until:
            raise UnknownToken(partial(self._review, text, digest), self)
        if username != subject:
            raise Unauthenticated(REFUSED, reason="review")

    def _review(self, text: str, digest: bytes) -> None:
        """Blocks for at most ten seconds. Raises Unauthenticated; Unavailable without a good answer."""
        asked = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": text, "audiences": [self._audience]},
        }
        try:
            own = small_files.read(self._token_file).decode("ascii").strip()
            headers = {"Authorization": f"Bearer {own}"}
            answer = self._server.call("POST", _REVIEWS, msgspec.json.encode(asked), headers=headers)
            if not answer.ok:
                raise answer.unexpected_error()
            status = answer.read(_Review).status
        except (BackendUnavailable, OSError, ValueError) as exc:
            _log.warning("token_review.failed", error=type(exc).__name__)
            raise Unavailable(_NO_REVIEW, retry_after_s=AGAIN_S) from exc
        # An API server that knows no audiences leaves them out, and has accepted any.
        is_for_us = self._audience in status.audiences
        if not status.authenticated or status.error or not is_for_us or not status.user.username:
            raise Unauthenticated(REFUSED, reason="review")
        with self._lock:
            self._accepted[digest] = status.user.username, self._clock() + _REMEMBERED_S
            if len(self._accepted) > _MOST_REMEMBERED:
                self._accepted.popitem(last=False)


# Public keys of issuers of JWTs (JWKS, RFC 7517), from a file or by HTTPS.
#
# Only asymmetric signature keys are used. Each key has the algorithms that fit it (RFC 8725 §3.1), so that
# a token cannot choose. The URL of a key set may come from OpenID Connect Discovery 1.0 §4.

WELL_KNOWN: Final = "/.well-known/openid-configuration"
_WITHIN_S: Final = 10.0


def issuer_at(url: str, ca_file: Path | None, setting: str) -> Peer:
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
    """GET a URL: no redirects, at most 1 MiB. Raises as ``issuer_at`` and ``Peer.call``; ValueError."""
    parts = urlsplit(url)
    with closing(issuer_at(f"{parts.scheme}://{parts.netloc}", ca_file, setting)) as issuer:
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


PublicKeyType = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey
KEEP_S: Final = 600.0
STALE_S: Final = 24 * 3600.0
WAIT_S: Final = 5.0
NO_KEYS: Final = "The keys of the token's issuer cannot be fetched"
_MOST_KEYS: Final = 64
_MOST_TRIED: Final = 8
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


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


def _fitting(keys: Sequence[IssuerKey], kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
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

    def fitting(self, kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
        """The keys that may have made a signature. Raises Unavailable if they cannot be read."""
        try:
            if stamp_of([self._path]) != self._stamp:
                self._stamp, self._keys = self._read()
        except (OSError, ValueError) as exc:
            _log.error("jwks.unreadable", path=str(self._path), reason=str(exc))
            raise Unavailable("The keys of the token's issuer cannot be read") from exc
        return _fitting(self._keys, kid, algorithm)

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

    def fitting(self, kid: str | None, algorithm: str) -> Sequence[IssuerKey]:
        """The keys that may have made a signature. Does no network access.

        Raises KeysPending while keys are being fetched; Unavailable while none are known.
        """
        found, now = _fitting(self._keys, kid, algorithm), self._clock()
        age_s = now - self._fetched
        if found and age_s <= KEEP_S / 2:
            return found
        is_fetching = self._is_fetching(now)
        is_late = is_fetching and now - self._began >= WAIT_S
        if is_fetching and not is_late and (not found or (age_s > KEEP_S and not self._is_failing)):
            raise KeysPending(partial(self._wait, now + WAIT_S), self)
        found = _fitting(self._keys, kid, algorithm)  # a fetch may have ended since the first lookup
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


Claims = Mapping[str, object]
MOST_CHARS: Final = 8192
_MOST_SCOPES: Final = 64
_MOST_NAME_CHARS: Final = 200
_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*", re.ASCII)  # RFC 7515 §7.1
_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})
_BAD_ALGORITHM: Final = "The issuer of this token may not use its algorithm or type"
_NO_KEY: Final = "The issuer of this token has no key with its key id and algorithm"
_BAD_SIGNATURE: Final = "The signature of this token is not by a key of its issuer"


@dataclass(frozen=True, slots=True)
class Trusted:
    """An issuer of the settings, and its keys, or the reviews that replace them for logins."""

    name: str
    section: IssuerSection
    keys: IssuerKeys | Reviews


class Jwts:
    """Verifies JWTs. Safe in several threads."""

    def __init__(self, issuers: Sequence[Trusted]) -> None:
        self._issuers = {issuer.section.issuer: issuer for issuer in issuers}
        self._sections = {issuer.name: issuer.section for issuer in issuers}
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()

    def trusts(self, name: str, role: str = "") -> bool:
        """Return whether an issuer of this name is configured, with this role if one is given."""
        section = self._sections.get(name)
        return section is not None and (not role or role in section.grants)

    def verify(self, text: str) -> Principal:
        """The principal of a token. Does no network access; the cheapest checks come first.

        Raises Unauthenticated; KeysPending if the issuer's keys are being fetched; Unavailable if they cannot
        be fetched.
        """
        digest = _digest(text)
        seen = self._seen.get(digest)
        if seen is not None and time.time() < seen[1]:
            return seen[0]
        issuer, claims = self._checked(text)
        until = _expiry(claims) + issuer.section.leeway_s
        grant = Grant(tuple(_scopes(claims, issuer.section)), until + issuer.section.job_grace_s)
        who = _principal(issuer, claims, _credential(issuer, digest), grant)
        with self._lock:
            self._seen[digest] = who, min(until, time.time() + _REMEMBERED_S)
            if len(self._seen) > _MOST_REMEMBERED:
                self._seen.popitem(last=False)
        return who

    def in_role(self, text: str, name: str, role: str) -> tuple[Principal, float]:
        """The principal of a token of issuer ``name`` with the scopes of its grant ``role``, and no others.

        Its credential names the role. Also returns the token's expiry. Raises as ``verify``.
        """
        digest = _digest(text)
        issuer, claims = self._checked(text, name)
        section = issuer.section
        grant = section.grants.get(role)
        if grant is None or not _fits(claims, grant):
            raise Unauthenticated(REFUSED, reason="claims")
        until = _expiry(claims)
        allowed = Grant(grant.scopes, until + section.job_grace_s)
        return _principal(issuer, claims, f"{_credential(issuer, digest)}:{role}", allowed), until

    def grace_s(self, name: str) -> int:
        """Seconds for which jobs may run after the expiry of a token of this issuer."""
        section = self._sections.get(name)
        return section.job_grace_s if section else 0

    def _checked(self, text: str, name: str | None = None) -> tuple[Trusted, Claims]:
        """The issuer of a token, which is ``name`` if that is given, and its claims after all checks."""
        try:
            header = jwt.get_unverified_header(text)
            named = jwt.decode(text, options={"verify_signature": False}).get("iss")
        except (PyJWTError, ValueError) as exc:
            raise Unauthenticated(REFUSED, reason="malformed") from exc
        issuer = self._issuers.get(named) if isinstance(named, str) else None
        if issuer is None or name not in {None, issuer.name}:
            raise Unauthenticated("The issuer of this token is not accepted here", reason="untrusted")
        if not name and isinstance(issuer.keys, Reviews):
            raise Unauthenticated("Tokens of this issuer are accepted at its login", reason="untrusted")
        return issuer, _claims(text, header, issuer)


def _digest(text: str) -> bytes:
    """SHA-256 of a token's text. Raises Unauthenticated for one that is too long or no JWT."""
    if len(text) > MOST_CHARS or not _COMPACT.fullmatch(text):
        raise Unauthenticated(REFUSED, reason="malformed")
    return hashlib.sha256(text.encode("ascii")).digest()


def _credential(issuer: Trusted, digest: bytes) -> str:
    return f"jwt:{issuer.name}:{digest.hex()[:16]}"


def _principal(issuer: Trusted, claims: Claims, credential: str, grant: Grant) -> Principal:
    """The principal of verified claims."""
    section = issuer.section
    return Principal(f"{issuer.name}:{_name(claims, section)}", _tenant(claims, section), credential, grant)


def _claims(text: str, header: Claims, issuer: Trusted) -> Claims:
    """The claims of a token after all checks. Raises as ``Jwts.verify``."""
    section, algorithm, kid = issuer.section, header.get("alg"), header.get("kid")
    kind = str(header.get("typ", "JWT")).lower()
    if not isinstance(algorithm, str) or algorithm not in section.algorithms or kind not in _TYPES:
        raise Unauthenticated(_BAD_ALGORITHM, reason="untrusted")
    if isinstance(issuer.keys, Reviews):
        claims = _decoded(text, None, algorithm, section)
        issuer.keys.check(text, claims.get("sub"))
        return claims
    keys = issuer.keys.fitting(kid if isinstance(kid, str) else None, algorithm)
    for key in keys:
        with suppress(InvalidSignatureError):
            return _decoded(text, key, algorithm, section)
    raise Unauthenticated(_BAD_SIGNATURE if keys else _NO_KEY, reason="signature")


def _decoded(text: str, key: IssuerKey | None, algorithm: str, section: IssuerSection) -> Claims:
    """The claims after all checks, but that of the signature without a key.

    Raises InvalidSignatureError, Unauthenticated.
    """
    try:
        return jwt.decode(
            text,
            key.key if key else "",
            algorithms=[algorithm],
            issuer=section.issuer,
            audience=section.audience,
            leeway=section.leeway_s,
            options={
                "require": ["exp", "iss", "aud", section.principal_claim],
                "enforce_minimum_key_length": True,
                "verify_signature": key is not None,
                "verify_aud": True,
                "verify_exp": True,
                "verify_iat": True,
                "verify_iss": True,
                "verify_jti": True,
                "verify_nbf": True,
                "verify_sub": True,
            },
        )
    except InvalidSignatureError:
        raise
    except jwt_errors.ExpiredSignatureError as exc:  # the signature is right: the caller may know
        raise Unauthenticated("This token has expired: ask for a new one", reason="expired") from exc
    except jwt_errors.InvalidAudienceError as exc:
        raise Unauthenticated("This token is for another audience", reason="claims") from exc
    except jwt_errors.ImmatureSignatureError as exc:
        raise Unauthenticated("This token is not valid yet: compare the clocks", reason="claims") from exc
    except jwt_errors.MissingRequiredClaimError as exc:
        raise Unauthenticated(f"This token lacks the claim {exc.claim}", reason="claims") from exc
    except PyJWTError as exc:
        raise Unauthenticated(REFUSED, reason="claims") from exc


def _expiry(claims: Claims) -> float:
    """The expiry in seconds since the epoch."""
    try:
        return float(claims["exp"])  # type: ignore[arg-type]  # PyJWT has read it as a number
    except OverflowError:  # JSON has whole numbers of any size
        raise Unauthenticated(REFUSED, reason="claims") from None


def _name(claims: Claims, section: IssuerSection) -> str:
    name = claims.get(section.principal_claim)
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _MOST_NAME_CHARS:
        raise Unauthenticated(REFUSED, reason="claims")
    return name


def _tenant(claims: Claims, section: IssuerSection) -> str:
    """The tenant of the settings, or the one in the token, which its issuer must be allowed to name."""
    if section.tenant_claim is None:
        return section.tenant
    tenant = claims.get(section.tenant_claim)
    if not isinstance(tenant, str) or not NAME.fullmatch(tenant) or tenant not in section.tenants:
        raise Unauthenticated("The tenant in this token is not one of its issuer", reason="claims")
    return tenant


def _scopes(claims: Claims, section: IssuerSection) -> Iterator[str]:
    """The scopes of the settings, for all tokens and for matching claims; and the valid ones in the token."""
    yield from section.scopes
    for grant in section.grants.values():
        if _fits(claims, grant):
            yield from grant.scopes
    own = claims.get(section.scopes_claim) if section.scopes_claim else None
    for text in own[:_MOST_SCOPES] if isinstance(own, list) else ():
        if isinstance(text, str) and _is_scope(text):
            yield text


def _fits(claims: Claims, grant: ClaimGrant) -> bool:
    return all(_matches(claims.get(claim), text) for claim, text in grant.when.items())


def _matches(claim: object, text: str) -> bool:
    """Return whether a claim, or an element of a claim that is a list, matches a pattern."""
    pattern = Pattern.parse(text)
    values = claim if isinstance(claim, list) else [claim]
    return any(isinstance(value, str) and pattern.matches(value) for value in values)


def _is_scope(text: str) -> bool:
    try:
        scopes.parse(text)
    except ValueError:
        return False
    return True
