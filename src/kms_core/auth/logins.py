"""Logins of the Vault API: a JWT, or a token of this service, for a short token of the same rights (ADR 34).

The short token is not stored: ``kmsl_<body>.<tag>`` is MessagePack and its HMAC-SHA-256 in base64url, under a
key that all hosts of an install derive from the spool key. With each use its login, and the role or the token
that it came from, must be as they were; so it ends with them.
"""

import hashlib
import hmac
import re
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from kms_core.auth.jwt_verifier import Jwts
from kms_core.auth.policy import Grant, Principal
from kms_core.auth.tokens import REFUSED, Tokens
from kms_core.settings.model import AuthSection, ClaimGrant, IssuerSection
from kms_protocol.errors import Unauthenticated

PREFIX: Final = "kmsl_"
INFO: Final = b"kms-service/login/1"
_TEXT: Final = re.compile(r"kmsl_([A-Za-z0-9_-]{1,2000})\.([A-Za-z0-9_-]{43})", re.ASCII)


class _TokenBody(msgspec.Struct, frozen=True, array_like=True):
    """Times are epoch seconds. ``stamp`` is the digest of the role (``_stamp``) or of the token's text."""

    mount: str
    role: str
    name: str
    tenant: str
    credential: str
    made: int
    until: int
    stamp: bytes


@dataclass(frozen=True, slots=True)
class Issued:
    """A short token: its text, valid for ``ttl_s`` seconds, its principal, and the role or name given."""

    text: str = field(repr=False)
    ttl_s: int
    who: Principal
    role: str


@dataclass(frozen=True, slots=True)
class _Role:
    grant: ClaimGrant
    grace_s: int
    stamp: bytes


class Logins:
    """Issues and verifies short tokens. Safe in several threads."""

    def __init__(self, key: bytes, auth: AuthSection, jwts: Jwts, tokens: Tokens) -> None:
        """``key`` is 32 bytes, the same on all hosts."""
        self.sections: Final = auth.logins
        self._key, self._jwts, self._tokens = key, jwts, tokens
        self._roles: Mapping[tuple[str, str], _Role] = {
            (mount, name): _Role(grant, issuer.job_grace_s, _stamp(issuer, grant))
            for mount, section in auth.logins.items()
            if (issuer := auth.issuers.get(section.issuer or ""))
            for name, grant in issuer.grants.items()
        }

    def by_jwt(self, mount: str, role: str, text: str) -> Issued:
        """A token for the caller of a JWT, with the scopes of one grant. Raises as ``Jwts.verify``."""
        who, expires = self._jwts.in_role(text, self.sections[mount].issuer or "", role)
        return self._issued(mount, role, who, expires, self._roles[mount, role].stamp)

    def by_token(self, mount: str, name: str, text: str) -> Issued:
        """A token with the rights of a token of this service, which has this id, name or tenant/name.

        Raises as ``Tokens.authenticate``.
        """
        token = self._tokens.authenticate(text)
        if not token.is_named(name):
            raise Unauthenticated(REFUSED, reason="claims")
        who = Principal(token.name, token.tenant, f"token:{token.id}")
        expires = token.expires_at.timestamp() if token.expires_at else float("inf")
        return self._issued(mount, name, who, expires, hashlib.sha256(text.encode("ascii")).digest())

    def authenticate(self, text: str) -> Principal:
        """The principal of a short token. Raises as ``Tokens.authenticate``."""
        match = _TEXT.fullmatch(text)
        if match is None or not hmac.compare_digest(match[2], self._tag(match[1])):
            raise Unauthenticated(REFUSED, reason="malformed")
        body = msgspec.msgpack.decode(urlsafe_b64decode(match[1] + "=="), type=_TokenBody)
        section = self.sections.get(body.mount)
        until = min(body.until, body.made + section.ttl_s) if section else 0
        if time.time() >= until:
            raise Unauthenticated("This token has expired: log in again", reason="expired")
        if section and section.method == "approle" and body.credential.startswith("token:"):
            self._tokens.of_digest(body.credential.removeprefix("token:"), body.stamp)
            return Principal(body.name, body.tenant, body.credential, Grant((), until))
        role = self._roles.get((body.mount, body.role))
        if role is None or not hmac.compare_digest(role.stamp, body.stamp):
            raise Unauthenticated(REFUSED, reason="revoked")
        return Principal(
            body.name, body.tenant, body.credential, Grant(role.grant.scopes, until + role.grace_s)
        )

    def _issued(self, mount: str, role: str, who: Principal, expires: float, stamp: bytes) -> Issued:
        now = int(time.time())
        until = int(min(now + self.sections[mount].ttl_s, expires))
        if until <= now:  # within the leeway for clocks, which a new token does not get
            raise Unauthenticated("This token has expired: ask for a new one", reason="expired")
        body = _TokenBody(mount, role, who.name, who.tenant, who.credential, now, until, stamp)
        text = urlsafe_b64encode(msgspec.msgpack.encode(body)).decode("ascii").rstrip("=")
        return Issued(f"{PREFIX}{text}.{self._tag(text)}", until - now, who, role)

    def _tag(self, text: str) -> str:
        tag = hmac.digest(self._key, text.encode("ascii"), "sha256")
        return urlsafe_b64encode(tag).decode("ascii").rstrip("=")


def _stamp(issuer: IssuerSection, grant: ClaimGrant) -> bytes:
    """A digest of all that says who may log in as a role: a change of it ends the role's tokens."""
    keys = issuer.issuer, issuer.audience, issuer.jwks_url, issuer.review_url, sorted(issuer.algorithms)
    tenants = issuer.tenant, issuer.tenant_claim, sorted(issuer.tenants)
    who = (*keys, issuer.principal_claim, *tenants, sorted(grant.when.items()))
    return hashlib.sha256(msgspec.json.encode(who)).digest()
