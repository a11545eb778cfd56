"""What settings may not say of callers: scopes that cannot be read, half a door, a door that nobody minds."""

import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from kms_core import proxies, scopes
from kms_core.settings.model import CertificateSection, IssuerSection, ServerSection, Settings, TenantSection
from kms_protocol.errors import ConfigurationError

SUBJECTS: Final = ("DNS:", "URI:", "email:", "subject:")
_EXPECTED: Final = "https://host[:port]/path; http:// is for loopback in dev alone"


def check_auth(settings: Settings) -> None:
    """Refuse settings of callers and tenants that would not do what they say."""
    auth, server = settings.kms.auth, settings.kms.server
    if auth.mode != "required":
        for name in ("issuers", "certificates"):
            if getattr(auth, name):
                raise ConfigurationError(
                    f'kms.auth.{name}: nobody is asked; write mode = "required" under [kms.auth]'
                )
    for name, issuer in auth.issuers.items():
        _check_issuer(f"kms.auth.issuers.{name}", issuer, in_dev=settings.environment == "dev")
    if len({issuer.issuer for issuer in auth.issuers.values()}) != len(auth.issuers):
        raise ConfigurationError("kms.auth.issuers: two sections have the same issuer; name each once")
    for name, certificate in auth.certificates.items():
        _check_certificate(f"kms.auth.certificates.{name}", certificate, server)
    _check_server(server)
    for name, tenant in settings.kms.tenants.items():
        _check_tenant(f"kms.tenants.{name}", tenant)


def auth_files(settings: Settings) -> Iterator[tuple[str, Path, bool]]:
    """What jobs must not reach: name of the setting, path, and whether all below it is private too."""
    yield "kms.auth.tokens_path", settings.kms.auth.tokens_path, True
    for name, issuer in settings.kms.auth.issuers.items():
        if issuer.jwks_file:  # whoever writes it can let himself in
            yield f"kms.auth.issuers.{name}.jwks_file", issuer.jwks_file, True
    for key in ("tls_cert", "tls_key", "client_ca", "client_crl"):
        path = getattr(settings.kms.server, key)
        if path:
            yield f"kms.server.{key}", path, True


def _check_issuer(where: str, issuer: IssuerSection, *, in_dev: bool) -> None:
    _check_keys(where, issuer, in_dev=in_dev)
    if (issuer.tenant_claim is None) != (not issuer.tenants):
        raise ConfigurationError(f"{where}: tenants lists what tenant_claim may say; set both or neither")
    _check_scopes(f"{where}.scopes", issuer.scopes)
    for name, grant in issuer.grants.items():
        if not grant.when:
            raise ConfigurationError(
                f"{where}.grants.{name}.when: name a claim; scopes for all stand in {where}.scopes"
            )
        _check_scopes(f"{where}.grants.{name}.scopes", grant.scopes)


def _check_keys(where: str, issuer: IssuerSection, *, in_dev: bool) -> None:
    """A key set has one source: a file, a URL, or what the issuer says of itself."""
    if issuer.jwks_url is not None and issuer.jwks_file is not None:
        raise ConfigurationError(f"{where}: name its keys by jwks_url, or by jwks_file, and not by both")
    if issuer.jwks_url is not None:
        if not may_fetch(issuer.jwks_url, in_dev=in_dev):
            raise ConfigurationError(f"{where}.jwks_url: expected {_EXPECTED}")
    elif issuer.jwks_file is None and (not may_fetch(issuer.issuer, in_dev=in_dev) or "?" in issuer.issuer):
        raise ConfigurationError(
            f"{where}.issuer: without jwks_url and jwks_file its keys are found by discovery, so expected "
            f"{_EXPECTED}"
        )


def may_fetch(text: str, *, in_dev: bool) -> bool:
    """Whether keys may come from a URL: by TLS, or in dev from this machine; without a password in it."""
    try:
        url = urlsplit(text)
        host = url.hostname
    except ValueError:  # its text quotes the URL
        return False
    loopback = in_dev and host in {"127.0.0.1", "::1", "localhost"}
    secure = url.scheme == "https" or (url.scheme == "http" and loopback)
    return bool(host) and secure and url.username is None and not url.fragment


def _check_certificate(where: str, certificate: CertificateSection, server: ServerSection) -> None:
    if server.client_ca is None:
        raise ConfigurationError(f"{where}: client certificates need client_ca under [kms.server]")
    if not certificate.subject.startswith(SUBJECTS):
        raise ConfigurationError(
            f"{where}.subject: expected DNS:name, URI:spiffe://…, email:address or subject:CN=name,O=…"
        )
    _check_scopes(f"{where}.scopes", certificate.scopes)


def _check_server(server: ServerSection) -> None:
    if (server.tls_cert is None) != (server.tls_key is None):
        raise ConfigurationError("kms.server.tls_cert and kms.server.tls_key belong together: set both")
    if server.client_ca is not None and server.tls_cert is None:
        raise ConfigurationError(
            "kms.server.client_ca: client certificates need TLS; set tls_cert and tls_key"
        )
    if server.client_cert == "required" and server.client_ca is None:
        raise ConfigurationError("kms.server.client_cert: name the authority that signs them in client_ca")
    if server.client_crl is not None and server.client_ca is None:
        raise ConfigurationError("kms.server.client_crl: name the authority that signs it in client_ca")
    _check_proxies(server.trusted_proxies)


def _check_proxies(lines: Sequence[str]) -> None:
    """Refuse what is no network, and networks that together hold every address."""
    where = "kms.server.trusted_proxies"
    for index, line in enumerate(lines):
        try:
            ipaddress.ip_network(line)
        except ValueError as exc:
            raise ConfigurationError(
                f'{where}[{index}]: expected an address or a network without host bits, such as "10.0.0.0/8"'
            ) from exc
    if any(network.prefixlen == 0 for network in proxies.collapsed(lines)):
        raise ConfigurationError(
            f"{where}: this trusts every address, so that callers could choose theirs: name the proxies only"
        )


def _check_tenant(where: str, tenant: TenantSection) -> None:
    if tenant.burst is not None and tenant.requests_per_s is None:
        raise ConfigurationError(f"{where}.burst: it needs requests_per_s")


def _check_scopes(where: str, lines: Sequence[str]) -> None:
    for index, line in enumerate(lines):
        try:
            scopes.parse(line)
        except ValueError as exc:
            raise ConfigurationError(f"{where}[{index}]: {exc}") from exc
