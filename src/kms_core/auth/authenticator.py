"""The doors: a token, a JWT or a client certificate becomes a Principal, whose worth can be asked for later.

A credential is named ``token:<id>``, ``jwt:<issuer>:<digest>`` or ``cert:<name>:<identity>`` (see
``PresentedCertificate``). Jobs keep that name: when one runs, the token must be there still, the JWT not
expired, the certificate's entry in the settings, the certificate neither expired nor revoked, and its
authorities in the settings. Jobs of earlier versions are named ``cert:<name>`` and are held to the entry
only.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from kms_core import scopes
from kms_core.auth import discovery, revocation, tokens
from kms_core.auth.certificates import PresentedCertificate
from kms_core.auth.jwks import FileKeys, IssuerKeys, RemoteKeys
from kms_core.auth.jwt_verifier import Jwts, Trusted
from kms_core.auth.key_endpoint import fetching
from kms_core.auth.policy import Grant, Principal
from kms_core.auth.revocation import Revocations
from kms_core.auth.tokens import TokenFile
from kms_core.scopes import Scope
from kms_core.settings.model import CertificateSection, IssuerSection, Settings
from kms_core.settings.validate_auth import may_fetch
from kms_protocol.errors import Forbidden, Unauthenticated

NONE_SHOWN: Final = (
    "No credential was sent: send a token as Authorization: Bearer (kms: --token-file or KMS_TOKEN_FILE)"
)


class Authenticator:
    """All ways in. Safe to call from several threads."""

    def __init__(
        self,
        token_file: TokenFile,
        jwts: Jwts,
        certificates: Mapping[str, CertificateSection],
        revocations: Revocations | None = None,
    ) -> None:
        """``revocations`` None: there is no authority of client certificates."""
        self.revocations = revocations
        self._tokens = token_file
        self._jwts = jwts
        self._certificates = certificates
        self._names = {section.subject: name for name, section in certificates.items()}

    def authenticate(self, token: str, certificate: PresentedCertificate | None = None) -> Principal:
        """The principal of this token, or where there is none, of this certificate. Waits for no network.

        Raises Unauthenticated; KeysPending if keys of the token's issuer are being fetched; Unavailable if
        the credential cannot be verified now.
        """
        return self._principal(token, certificate, self._jwts.verify)

    def principal(self, token: str, certificate: PresentedCertificate | None = None) -> Principal:
        """As ``authenticate``, but blocks this thread for up to 5 seconds while keys are fetched."""
        return self._principal(token, certificate, self._jwts.holder)

    def _principal(
        self, token: str, certificate: PresentedCertificate | None, of_jwt: Callable[[str], Principal]
    ) -> Principal:
        if token.startswith(tokens.PREFIX):
            found = self._tokens.holder(token)
            return Principal(found.name, found.tenant, f"token:{found.id}")
        if token:
            return of_jwt(token)
        if certificate is None:
            raise Unauthenticated(NONE_SHOWN, reason="missing")
        return self._bearer(certificate)

    def scopes_of(self, who: Principal) -> Iterator[Scope]:
        """What a credential is worth now. Raises Forbidden if nothing, Unavailable if that cannot be told."""
        lines = self._lines(who)
        if lines is None:
            raise Forbidden("The credential was revoked or has expired since this was asked for")
        return _parsed(lines)

    def until(self, who: Principal) -> float | None:
        """When a credential ends (epoch seconds), if it is known to. Raises Unavailable."""
        kind, _, rest = who.credential.partition(":")
        if kind != "token":
            return who.grant.until if who.grant else None
        token = self._tokens.by_id(rest)
        return token.expires_at.timestamp() if token and token.expires_at else None

    def _bearer(self, certificate: PresentedCertificate) -> Principal:
        """TLS has verified the certificate when the connection began, which may be long ago."""
        if time.time() > certificate.until:
            raise Unauthenticated(
                "The client certificate has expired: connect with a new one",
                reason="expired",
                ends_connection=True,
            )
        name = next((self._names[one] for one in certificate.subjects if one in self._names), None)
        if name is None:
            raise Unauthenticated(
                "The client certificate has no entry in the service's settings, and no token was sent",
                reason="certificate",
            )
        if self.revocations is not None and self.revocations.is_revoked(certificate.identity):
            raise Unauthenticated(
                "The client certificate was revoked, or its authority is no longer in client_ca: "
                "connect with a new one",
                reason="revoked",
                ends_connection=True,
            )
        credential = f"cert:{name}:{certificate.identity}"
        return Principal(
            f"cert:{name}", self._certificates[name].tenant, credential, Grant((), certificate.until)
        )

    def _of_certificate(self, who: Principal, rest: str) -> Sequence[str] | None:
        """As ``_lines``. ``rest`` is a name, followed in all but old jobs by a certificate's identity."""
        name, _, identity = rest.partition(":")
        section = self._certificates.get(name)
        if section is None or section.tenant != who.tenant:
            return None
        if who.grant is not None and time.time() > who.grant.until:
            return None
        if identity and self.revocations is not None and self.revocations.is_revoked(identity):
            return None
        return section.scopes

    def _lines(self, who: Principal) -> Sequence[str] | None:
        """The lines of its scopes, or None if it is worth nothing any more."""
        kind, _, rest = who.credential.partition(":")
        if kind == "token":
            token = self._tokens.by_id(rest)
            return token.scopes if token and token.tenant == who.tenant else None
        if kind == "cert":
            return self._of_certificate(who, rest)
        issuer = rest.partition(":")[0]
        if kind == "jwt" and who.grant and self._jwts.trusts(issuer) and time.time() < who.grant.until:
            return who.grant.scopes
        return None


def _parsed(lines: Sequence[str]) -> Iterator[Scope]:
    """A line that a later version wrote and this one does not know allows nothing."""
    for line in lines:
        try:
            yield scopes.parse(line)
        except ValueError:
            continue


def build(settings: Settings) -> Authenticator | None:
    """The doors of the settings; None where callers are not authenticated. Raises ConfigurationError."""
    auth = settings.kms.auth
    if auth.mode != "required":
        return None
    in_dev = settings.environment == "dev"
    issuers = [
        Trusted(name, section, _keys(name, section, in_dev=in_dev)) for name, section in auth.issuers.items()
    ]
    return Authenticator(
        TokenFile(auth.tokens_path, strict=settings.is_prod),
        Jwts(issuers),
        auth.certificates,
        revocation.build(settings.kms.server),
    )


def _keys(name: str, section: IssuerSection, *, in_dev: bool) -> IssuerKeys:
    """From a file, from a URL, or from where the issuer itself says that they are."""
    if section.jwks_file is not None:
        return FileKeys(section.jwks_file)
    fetch = fetching(section.ca_file, f"kms.auth.issuers.{name}.ca_file")
    if section.jwks_url is not None:
        return RemoteKeys(partial(fetch, section.jwks_url))
    return RemoteKeys(discovery.finding(section.issuer, fetch, partial(may_fetch, in_dev=in_dev)))
