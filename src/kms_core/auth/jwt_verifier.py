"""Verification of JWTs (RFC 7519, RFC 8725) of configured issuers, by the claims that settings name.

It checks the algorithm (asymmetric, in the settings, and fit for the issuer's key), signature, issuer,
audience, expiry and start. A verified token is cached for a minute.
"""

import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import jwt
from jwt import exceptions as jwt_errors
from jwt.exceptions import InvalidSignatureError, PyJWTError

from kms_core import scopes
from kms_core.auth.jwks import IssuerKey, IssuerKeys
from kms_core.auth.policy import Grant, Principal
from kms_core.auth.token_review import MOST_REMEMBERED, REMEMBERED_S, Reviews
from kms_core.auth.tokens import NAME, REFUSED
from kms_core.patterns import Pattern
from kms_core.settings.model import ClaimGrant, IssuerSection
from kms_protocol.errors import Unauthenticated

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
        self._seen: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()

    def is_configured(self, issuer: str, role: str = "") -> bool:
        """Return whether the settings have an issuer of this name, and this role of it if one is given."""
        section = self._sections.get(issuer)
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
        self._seen[digest] = who, min(until, time.time() + REMEMBERED_S)
        if len(self._seen) > MOST_REMEMBERED:  # two threads may drop one more than needed
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
        """Return ``job_grace_s`` of the issuer ``name``; 0 for one that is not configured.

        For so many seconds after the expiry of a token its jobs may run.
        """
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
    keys = issuer.keys.candidate_keys(kid if isinstance(kid, str) else None, algorithm)
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
        if isinstance(text, str) and scopes.parse_or_none(text):
            yield text


def _fits(claims: Claims, grant: ClaimGrant) -> bool:
    return all(_matches(claims.get(claim), text) for claim, text in grant.when.items())


def _matches(claim: object, text: str) -> bool:
    """Return whether a claim, or an element of a claim that is a list, matches a pattern."""
    pattern = Pattern.parse(text)
    values = claim if isinstance(claim, list) else [claim]
    return any(isinstance(value, str) and pattern.matches(value) for value in values)
