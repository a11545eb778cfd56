"""The tables of ``[kms.auth]``: issuers of JWTs, client certificates, and logins."""

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, field

from kms_core.sections import KeyId, Positive, Section, Timeout

Algorithm = Literal[  # of JWTs: signatures by a private key, nothing else
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]


class ClaimGrant(Section, frozen=True, kw_only=True):
    """``[kms.auth.issuers.<name>.grants.<name>]``: scopes of tokens whose claims match ``when``."""

    when: dict[str, str]
    scopes: tuple[str, ...]


class IssuerSection(Section, frozen=True, kw_only=True):
    """``[kms.auth.issuers.<name>]``: an issuer of accepted JWTs, and the meaning of their claims.

    Without ``jwks_url`` and ``jwks_file`` its keys are found by discovery. An API server of Kubernetes at
    ``review_url`` verifies tokens in place of keys (TokenReview), for logins only; it is sent the token in
    ``review_token_file``. ``tenants`` are the values that
    ``tenant_claim`` may have. A token's jobs may run for ``job_grace_s`` seconds after its expiry.
    """

    issuer: Annotated[str, Meta(min_length=1)]
    audience: Annotated[str, Meta(min_length=1)]
    jwks_url: str | None = None
    jwks_file: Path | None = None
    review_url: str | None = None
    review_token_file: Path | None = None
    ca_file: Path | None = None
    algorithms: Annotated[tuple[Algorithm, ...], Meta(min_length=1)] = ("RS256", "ES256", "EdDSA")
    leeway_s: Annotated[int, Meta(ge=0, le=300)] = 30
    principal_claim: str = "sub"
    tenant: KeyId = "default"
    tenant_claim: str | None = None
    tenants: tuple[KeyId, ...] = ()
    scopes: tuple[str, ...] = ()
    scopes_claim: str | None = None
    grants: dict[KeyId, ClaimGrant] = field(default_factory=dict)
    job_grace_s: Annotated[int, Meta(ge=0, le=30 * 24 * 3600)] = 0


class CertificateSection(Section, frozen=True, kw_only=True):
    """``[kms.auth.certificates.<name>]``: a client certificate, by one of its names."""

    subject: Annotated[str, Meta(min_length=1)]
    tenant: KeyId = "default"
    scopes: tuple[str, ...]


class LoginSection(Section, frozen=True, kw_only=True):
    """``[kms.auth.logins.<mount>]``: ``POST /v1/auth/<mount>/login`` of the Vault API.

    ``jwt`` takes a JWT of ``issuer``, a name of ``[kms.auth.issuers]``, and the name of one of its grants as
    role; ``approle`` takes a token of this service and its name. Either hands out a token of the same rights
    that is valid for ``ttl_s`` seconds, and not longer than the credential.
    """

    method: Literal["jwt", "approle"]
    issuer: KeyId | None = None
    ttl_s: Annotated[int, Meta(ge=1, le=24 * 3600)] = 3600


class AuthSection(Section, frozen=True, kw_only=True):
    """``[kms.auth]``: mode None is undecided, enough on loopback in dev. ``tokens`` replaces the file."""

    mode: Literal["none", "required"] | None = None
    tokens_path: Path
    tokens: Annotated[str, Meta(pattern="^(s3|file)://")] | None = None
    max_stale_s: Timeout = 60.0
    failures_per_minute: Positive = 30
    issuers: dict[KeyId, IssuerSection] = field(default_factory=dict)
    certificates: dict[KeyId, CertificateSection] = field(default_factory=dict)
    logins: dict[KeyId, LoginSection] = field(default_factory=dict)
