"""Checks of the settings for authentication, tenants and TLS of the server."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from kms_core import proxies, scopes
from kms_core.sections import check_https, check_pair
from kms_core.settings.auth import CertificateSection, IssuerSection, LoginSection
from kms_core.settings.model import ServerSection, Settings, TenantSection
from kms_protocol.errors import ConfigurationError

SUBJECTS: Final = ("DNS:", "URI:", "email:", "subject:")
_NO_MOUNTS: Final = frozenset({"token", ".", ".."})  # of auth/token/lookup-self, and what clients shorten


def check_auth(settings: Settings) -> None:
    """Refuse incomplete and contradictory settings. Raises ConfigurationError."""
    auth, server = settings.kms.auth, settings.kms.server
    if auth.mode != "required":
        for name in ("issuers", "certificates", "logins"):
            if getattr(auth, name):
                raise ConfigurationError(
                    f'kms.auth.{name}: requests need no credentials; write mode = "required" under [kms.auth]'
                )
    check_document(settings, "kms.auth.tokens", auth.tokens or "")
    _check_issuers(auth.issuers, in_dev=settings.environment == "dev")
    for name, certificate in auth.certificates.items():
        _check_certificate(f"kms.auth.certificates.{name}", certificate, server)
    for mount, login in auth.logins.items():
        _check_login(f"kms.auth.logins.{mount}", mount, login, settings)
    _check_server(server)
    for name, tenant in settings.kms.tenants.items():
        _check_tenant(f"kms.tenants.{name}", tenant)


def check_document(settings: Settings, where: str, text: str) -> None:
    """Require the URL of a signed document: a file, or an object of a bucket with a section.

    ``where`` is its place in the settings. Raises ConfigurationError, also if jobs could reach it.
    """
    url = urlsplit(text)
    if url.scheme == "file" and (url.netloc or not url.path.strip("/") or url.query or url.fragment):
        raise ConfigurationError(f"{where}: expected file:///path, or s3://bucket/key")
    if url.scheme != "s3":
        return
    section = settings.kms.jobs.buckets.get(url.netloc)
    if section is None:
        raise ConfigurationError(
            f"{where}: add a section [kms.jobs.buckets.{url.netloc}], which says where the bucket is "
            "and needs no read and no write"
        )
    key = url.path.lstrip("/")
    if not re.fullmatch(r"[A-Za-z0-9_.=-]+(/[A-Za-z0-9_.=-]+)*", key):
        raise ConfigurationError(f"{where}: expected s3://bucket/key, of letters, digits, / _ . = and -")
    if {".", ".."}.intersection(key.split("/")):
        raise ConfigurationError(f"{where}: a part of the key is . or .., which stores read differently")
    spool = settings.kms.jobs.spool_bucket
    if spool and spool.bucket == url.netloc and key.startswith(spool.prefix):
        raise ConfigurationError(f"{where}: it is in the spool of kms.jobs.spool_bucket, name another key")
    if any(key.startswith(prefix) for prefix in (*section.read, *section.write)):
        raise ConfigurationError(
            f"{where}: jobs could read or write it: [kms.jobs.buckets.{url.netloc}] allows its key"
        )


def _check_issuers(issuers: Mapping[str, IssuerSection], *, in_dev: bool) -> None:
    for name, issuer in issuers.items():
        _check_issuer(f"kms.auth.issuers.{name}", issuer, in_dev=in_dev)
    if len({issuer.issuer for issuer in issuers.values()}) != len(issuers):
        raise ConfigurationError("kms.auth.issuers: two sections have the same issuer; name each once")


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
    """Require one source of a key set (a file, a URL, or discovery), or a server that reviews tokens."""
    check_pair(where, issuer, "review_url", "review_token_file")
    if issuer.review_url is not None:
        if issuer.jwks_url is not None or issuer.jwks_file is not None:
            raise ConfigurationError(f"{where}.review_url: it replaces jwks_url and jwks_file")
        check_https(f"{where}.review_url", issuer.review_url, in_dev=in_dev)
    elif issuer.jwks_url is not None and issuer.jwks_file is not None:
        raise ConfigurationError(f"{where}: name its keys by jwks_url, or by jwks_file, and not by both")
    elif issuer.jwks_url is not None:
        check_https(f"{where}.jwks_url", issuer.jwks_url, in_dev=in_dev, query=True)
    elif issuer.jwks_file is None:
        found = "whose keys are found by discovery, without jwks_url and jwks_file"
        check_https(f"{where}.issuer, {found}", issuer.issuer, in_dev=in_dev)


def _check_certificate(where: str, certificate: CertificateSection, server: ServerSection) -> None:
    if server.client_ca is None:
        raise ConfigurationError(f"{where}: client certificates need client_ca under [kms.server]")
    if not certificate.subject.startswith(SUBJECTS):
        raise ConfigurationError(
            f"{where}.subject: expected DNS:name, URI:spiffe://…, email:address or subject:CN=name,O=…"
        )
    _check_scopes(f"{where}.scopes", certificate.scopes)


def _check_login(where: str, mount: str, login: LoginSection, settings: Settings) -> None:
    if mount in _NO_MOUNTS:
        raise ConfigurationError(f"{where}: no login can have this name, choose another")
    if not settings.kms.facade.enabled:
        raise ConfigurationError(f"{where}: it is a part of the Vault API: set enabled under [kms.facade]")
    if login.method == "jwt" and login.issuer not in settings.kms.auth.issuers:
        raise ConfigurationError(f"{where}.issuer: expected the name of a section of [kms.auth.issuers]")
    if login.method != "jwt" and login.issuer is not None:
        raise ConfigurationError(f'{where}.issuer: it is for method = "jwt"')


def _check_server(server: ServerSection) -> None:
    check_pair("kms.server", server, "tls_cert", "tls_key")
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
    """Refuse invalid networks, and networks that together contain every address."""
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
