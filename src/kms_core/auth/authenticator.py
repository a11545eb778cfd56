"""Authentication: the principal of a token, a JWT or a client certificate, and the current scopes of it.

A credential is named ``token:<id>``, ``jwt:<issuer>:<digest>``, or ``cert:<name>:<identity>`` (see
``PresentedCertificate``). After a login with a JWT ``:<role>`` is appended. Jobs keep that name. When a job
runs, its token must exist, its JWT or login must not be expired and the role be configured, its certificate
must have an entry in the settings, be neither expired nor revoked, and have authorities that are in the
settings. ``MetricsAccess`` says who may read the metrics.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from kms_core import scopes
from kms_core.auth import client_certificates, jwks, logins, tokens
from kms_core.auth.client_certificates import PresentedCertificate, Revocations
from kms_core.auth.jwks import FileKeys, IssuerKeys, KeysPending, RemoteKeys
from kms_core.auth.jwt_verifier import Jwts, Trusted
from kms_core.auth.logins import Logins
from kms_core.auth.policy import Grant, Policy, Principal, allows
from kms_core.auth.token_review import Reviews
from kms_core.auth.tokens import Tokens, UnknownToken
from kms_core.observability import metrics
from kms_core.proxies import Proxies
from kms_core.scopes import Scope
from kms_core.settings.model import CertificateSection, IssuerSection, Settings
from kms_protocol.addresses import is_loopback
from kms_protocol.errors import Forbidden, Unauthenticated, Unavailable
from kms_protocol.tls_client import client_context

NONE_SHOWN: Final = (
    "No credential was sent: send a token as Authorization: Bearer (kms: --token-file or KMS_TOKEN_FILE)"
)


class Authenticator:
    """Authenticates by all methods of the settings. Safe in several threads."""

    def __init__(
        self,
        tokens_: Tokens,
        jwts: Jwts,
        certificates: Mapping[str, CertificateSection],
        revocations: Revocations | None = None,
        logins_: Logins | None = None,
    ) -> None:
        """``revocations`` None: no authority of client certificates is configured. ``logins_`` None: none."""
        self.logins = logins_
        self.revocations = revocations
        self.tokens = tokens_
        self._jwts = jwts
        self._certificates = certificates
        self._names = {section.subject: name for name, section in certificates.items()}

    def authenticate(self, token: str, certificate: PresentedCertificate | None = None) -> Principal:
        """The principal of a token or, without a token, of a certificate. Does no network access.

        Raises Unauthenticated; Unavailable if the credential cannot be verified now. After ``look_up`` of an
        UnknownToken or KeysPending it may be.
        """
        if token.startswith(tokens.PREFIX):
            found = self.tokens.authenticate(token)
            return Principal(found.name, found.tenant, f"token:{found.id}")
        if self.logins and token.startswith(logins.PREFIX):
            return self.logins.authenticate(token)
        if token:
            return self._jwts.verify(token)
        if certificate is None:
            raise Unauthenticated(NONE_SHOWN, reason="missing")
        return self._of_certificate(certificate)

    def principal(self, token: str) -> Principal:
        """The principal of a token. Raises as ``authenticate``, and may block for seconds for one look-up."""
        try:
            return self.authenticate(token)
        except (UnknownToken, KeysPending) as exc:
            exc.look_up()
        return self.authenticate(token)

    def scopes_of(self, who: Principal) -> Iterator[Scope]:
        """The current scopes of a credential. A line that cannot be parsed allows nothing.

        Raises Forbidden if it is not valid any more; Unavailable if that cannot be verified now.
        """
        lines = self._lines(who)
        if lines is None:
            raise Forbidden("The credential was revoked or has expired since the request")
        return filter(None, map(scopes.parse_or_none, lines))

    def until(self, who: Principal) -> float | None:
        """The time at which a credential expires (epoch seconds), if it does. Raises Unavailable."""
        kind, _, rest = who.credential.partition(":")
        until = who.grant.until if who.grant else None
        if kind == "jwt" and until is not None:
            return until - self._jwts.grace_s(rest.partition(":")[0])
        if kind != "token" or until is not None:
            return until
        token = self.tokens.by_id(rest)
        return token.expires_at.timestamp() if token and token.expires_at else None

    def made_at(self, who: Principal) -> float | None:
        """The time at which a token was made (epoch seconds); None if not known. Raises Unavailable."""
        kind, _, rest = who.credential.partition(":")
        token = self.tokens.by_id(rest) if kind == "token" and who.grant is None else None
        return token.created_at.timestamp() if token else None

    def _of_certificate(self, certificate: PresentedCertificate) -> Principal:
        """Check again what TLS verified when the connection began, which may be long ago."""
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

    def _lines_of_certificate(self, who: Principal, rest: str) -> Sequence[str] | None:
        """Return ``_lines`` for a certificate. ``rest`` is a name and the identity of a certificate."""
        name, _, identity = rest.partition(":")
        section = self._certificates.get(name)
        if section is None or section.tenant != who.tenant:
            return None
        if self.revocations is not None and self.revocations.is_revoked(identity):
            return None
        return section.scopes

    def _lines(self, who: Principal) -> Sequence[str] | None:
        """The lines of a credential's scopes; None if it is not valid any more."""
        kind, _, rest = who.credential.partition(":")
        if who.grant and time.time() >= who.grant.until:
            return None
        if kind == "token":
            token = self.tokens.by_id(rest)
            return token.scopes if token and token.tenant == who.tenant else None
        if kind == "cert":
            return self._lines_of_certificate(who, rest)
        issuer, _, rest = rest.partition(":")
        if kind == "jwt" and who.grant and self._jwts.is_configured(issuer, rest.partition(":")[2]):
            return who.grant.scopes
        return None


def build(settings: Settings, tokens_: Tokens, login_key: bytes = b"") -> Authenticator | None:
    """The authenticator of the settings; None if they require no credentials. Raises ConfigurationError.

    Without ``login_key`` no token of a login is accepted.
    """
    auth = settings.kms.auth
    if auth.mode != "required":
        return None
    in_dev = settings.environment == "dev"
    issuers = [
        Trusted(name, section, _keys(name, section, in_dev=in_dev)) for name, section in auth.issuers.items()
    ]
    jwts = Jwts(issuers)
    return Authenticator(
        tokens_,
        jwts,
        auth.certificates,
        client_certificates.build_revocations(settings.kms.server),
        Logins(login_key, auth, jwts, tokens_) if login_key and auth.logins else None,
    )


def _keys(name: str, section: IssuerSection, *, in_dev: bool) -> IssuerKeys | Reviews:
    """The keys of an issuer: from a file, from a URL, or by OpenID Connect Discovery; or its reviews."""
    where = f"kms.auth.issuers.{name}"
    if section.review_url is not None and section.review_token_file is not None:
        server = jwks.issuer_peer(section.review_url, section.ca_file, f"{where}.review_url")
        return Reviews(server, section.review_token_file, section.audience)
    if section.jwks_file is not None:
        return FileKeys(section.jwks_file)
    client_context(section.ca_file, f"{where}.ca_file")  # an unusable file is refused at the start
    setting = f"{where}.{'issuer' if section.jwks_url is None else 'jwks_url'}"
    fetch = partial(jwks.fetch, ca_file=section.ca_file, setting=setting)
    if section.jwks_url is not None:
        return RemoteKeys(partial(fetch, section.jwks_url))
    return RemoteKeys(partial(jwks.discover, section.issuer, fetch, in_dev=in_dev))


_FORWARDED: Final = frozenset({"forwarded", "x-forwarded-for", "x-real-ip", "via"})


@dataclass(frozen=True, slots=True)
class MetricsAccess:
    """The rule for /metrics. ``authenticator`` None: no token is valid.

    A trusted proxy never counts as this machine, even if its address is a loopback address.
    """

    mode: Literal["loopback", "open", "token"]
    authenticator: Authenticator | None
    policy: Policy
    proxies: Proxies

    def is_open_to(self, address: str | None, header_names: Iterable[str]) -> bool:
        """True if a request needs no credential: it is from this machine, and no proxy forwarded it."""
        if self.mode != "loopback":
            return self.mode == "open"
        if address is None or not is_loopback(address) or self.proxies.trust(address):
            return False
        return _FORWARDED.isdisjoint(map(str.lower, header_names))

    def allows(self, token: str) -> bool:
        """Return whether a token allows to read the metrics. May block for up to 5 seconds."""
        if self.authenticator is None:
            return False
        try:
            return allows(self.policy, self.authenticator.principal(token), "metrics")
        except Unauthenticated as exc:
            metrics.AUTH_FAILURES.labels(exc.reason).inc()
        except Unavailable:
            pass
        return False
