"""JWTs (RFC 7519, 8725) of configured issuers become principals, by the claims that settings name.

What is verified before anything is believed: an asymmetric algorithm that the settings list and that fits the
issuer's key, signature, issuer, audience, expiry and start. A verified token is remembered for a minute.
"""

import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import jwt
from jwt.exceptions import (
    ExpiredSignatureError,
    InvalidAudienceError,
    InvalidSignatureError,
    PyJWTError,
)

from kms_core import scopes
from kms_core.auth.jwks import IssuerKeys, KeysPending
from kms_core.auth.policy import Grant, Principal
from kms_core.auth.tokens import NAME, REFUSED
from kms_core.observability import metrics
from kms_core.patterns import Pattern
from kms_core.settings.model import IssuerSection
from kms_protocol.errors import Unauthenticated

Claims = Mapping[str, object]
MOST_CHARS: Final = 8192
_REMEMBER_S: Final = 60.0
_MOST_REMEMBERED: Final = 4096
_MOST_SCOPES: Final = 64
_MOST_NAME_CHARS: Final = 200
_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*", re.ASCII)  # RFC 7515 §7.1
_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})


@dataclass(frozen=True, slots=True)
class Trusted:
    """An issuer of the settings, and its keys."""

    name: str
    section: IssuerSection
    keys: IssuerKeys


@dataclass(frozen=True, slots=True)
class _SeenToken:
    who: Principal = field(repr=False)
    until: float


class Jwts:
    """Verifies JWTs. Safe to call from several threads."""

    def __init__(self, issuers: Sequence[Trusted]) -> None:
        self._issuers = {issuer.section.issuer: issuer for issuer in issuers}
        self._names = frozenset(issuer.name for issuer in issuers)
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, _SeenToken] = OrderedDict()

    def trusts(self, name: str) -> bool:
        """Whether an issuer of this name is configured still."""
        return name in self._names

    def holder(self, text: str) -> Principal:
        """As ``verify``, but blocks this thread for up to 5 seconds while an issuer's keys are fetched."""
        try:
            return self.verify(text)
        except KeysPending as pending:
            pending.refresh.wait()
        return self.verify(text)

    def verify(self, text: str) -> Principal:
        """The principal of a token, without waiting: what costs least is checked first.

        Raises Unauthenticated; KeysPending if the issuer's keys are being fetched; Unavailable if they cannot
        be fetched.
        """
        if len(text) > MOST_CHARS or not _COMPACT.fullmatch(text):
            raise Unauthenticated(REFUSED, reason="malformed")
        digest = hashlib.sha256(text.encode("ascii")).digest()
        who = self._remembered(digest)
        if who is None:
            who, until = self._verified(text, digest)
            with self._lock:
                self._seen[digest] = _SeenToken(who, min(until, time.time() + _REMEMBER_S))
                if len(self._seen) > _MOST_REMEMBERED:
                    self._seen.popitem(last=False)
        return who

    def _remembered(self, digest: bytes) -> Principal | None:
        seen = self._seen.get(digest)
        return seen.who if seen and time.time() < seen.until else None

    def _verified(self, text: str, digest: bytes) -> tuple[Principal, float]:
        try:
            header = jwt.get_unverified_header(text)
            said = jwt.decode(text, options={"verify_signature": False}).get("iss")
        except (PyJWTError, ValueError) as exc:
            raise Unauthenticated(REFUSED, reason="malformed") from exc
        issuer = self._issuers.get(said) if isinstance(said, str) else None
        if issuer is None:
            raise Unauthenticated(REFUSED, reason="untrusted")
        claims = _claims(text, header, issuer)
        until = _expiry(claims) + issuer.section.leeway_s
        grant = Grant(tuple(_scopes(claims, issuer.section)), until + issuer.section.job_grace_s)
        return (
            Principal(
                f"{issuer.name}:{_name(claims, issuer.section)}",
                _tenant(claims, issuer.section),
                f"jwt:{issuer.name}:{digest.hex()[:16]}",
                grant,
            ),
            until,
        )


def _claims(text: str, header: Claims, issuer: Trusted) -> Claims:
    """The claims, once everything about the token has been verified."""
    section, algorithm, kid = issuer.section, header.get("alg"), header.get("kid")
    kind = str(header.get("typ", "JWT")).lower()
    if not isinstance(algorithm, str) or algorithm not in section.algorithms or kind not in _TYPES:
        raise Unauthenticated(REFUSED, reason="untrusted")
    for key in issuer.keys.fitting(kid if isinstance(kid, str) else None, algorithm):
        metrics.AUTH_JWT_WORK.labels("signature").inc()
        try:
            return jwt.decode(
                text,
                key.key,
                algorithms=[algorithm],
                issuer=section.issuer,
                audience=section.audience,
                leeway=section.leeway_s,
                options={
                    "require": ["exp", "iss", "aud", section.principal_claim],
                    "enforce_minimum_key_length": True,
                },
            )
        except InvalidSignatureError:
            continue
        except ExpiredSignatureError as exc:  # the signature holds: this is said to its holder
            raise Unauthenticated("This token has expired: ask for a new one", reason="expired") from exc
        except InvalidAudienceError as exc:
            raise Unauthenticated("This token is for another audience", reason="claims") from exc
        except PyJWTError as exc:
            raise Unauthenticated(REFUSED, reason="claims") from exc
    raise Unauthenticated(REFUSED, reason="signature")


def _expiry(claims: Claims) -> float:
    """Seconds since the epoch."""
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
    """The one of the settings, or the one that the token names among those that its issuer may name."""
    if section.tenant_claim is None:
        return section.tenant
    tenant = claims.get(section.tenant_claim)
    if not isinstance(tenant, str) or not NAME.fullmatch(tenant) or tenant not in section.tenants:
        raise Unauthenticated(REFUSED, reason="claims")
    return tenant


def _scopes(claims: Claims, section: IssuerSection) -> Iterator[str]:
    """Of the settings, for all and for fitting claims; and of the token, where a wrong line is left out."""
    yield from section.scopes
    for grant in section.grants.values():
        if all(_says(claims.get(claim), text) for claim, text in grant.when.items()):
            yield from grant.scopes
    told = claims.get(section.scopes_claim) if section.scopes_claim else None
    for text in told[:_MOST_SCOPES] if isinstance(told, list) else ():
        if isinstance(text, str) and _is_scope(text):
            yield text


def _says(claim: object, text: str) -> bool:
    """Whether a claim, or one of a list of them, is as a pattern says."""
    pattern = Pattern.parse(text)
    values = claim if isinstance(claim, list) else [claim]
    return any(isinstance(value, str) and pattern.matches(value) for value in values)


def _is_scope(text: str) -> bool:
    try:
        scopes.parse(text)
    except ValueError:
        return False
    return True
