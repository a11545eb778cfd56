"""Checks of settings that need several keys, and of the address to listen on.

Reads no files except symlinks.
"""

import ipaddress
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from kms_core import proxies, scopes
from kms_core.backends import SCHEMES, table_of
from kms_core.backends.age_settings import AgeSection, document_of
from kms_core.sections import check_address, check_https, check_pair
from kms_core.secure_files import in_shell
from kms_core.settings.model import (
    CertificateSection,
    IssuerSection,
    KmsSection,
    LoginSection,
    ServerSection,
    Settings,
    StoreSection,
)
from kms_core.settings.redis_urls import check_redis
from kms_core.settings.toml_reader import nearest
from kms_protocol.addresses import is_loopback
from kms_protocol.errors import ConfigurationError

SUBJECTS: Final = ("DNS:", "URI:", "email:", "subject:")
_NO_MOUNTS: Final = frozenset({"token", ".", ".."})  # of auth/token/lookup-self, and what clients shorten
BUILT_IN_ENVIRONMENTS: Final = ("dev", "prod")
_ORIGIN: Final = re.compile(
    r"(?:https://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:]+\])(?!:443$)"
    r"|http://(?:localhost|127\.0\.0\.1|\[::1\])(?!:80$))"
    r"(?::(?:[1-5][0-9]{0,4}|[6-9][0-9]{0,3}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
)
"""Origins as browsers send them (RFC 6454 §6.2): in lower case, without the default port."""
SECRETS: Final = (
    "server.tls_key",
    "auth.tokens_path",
    "auth.issuers.review_token_file",
    "redis.password_file",
    "redis.client_key_file",
    *(f"{table_of(scheme)}.{key}" for scheme, shape in SCHEMES.items() for key in shape.SECRET_FILES),
    "jobs.buckets.secret_key_file",
    "jobs.spool_bucket.secret_key_file",
    "jobs.endpoints.secret_file",
    "jobs.endpoints.previous_secret_file",
    "jobs.spool_identity_path",
    "jobs.intake_identity_path",
    "audit.key_path",
    "audit.signing_key_path",
)
"""Settings of secret files, without the names of buckets and similar entries."""
_PRIVATE: Final = (
    *SECRETS,
    "server.tls_cert",
    "server.client_ca",
    "server.client_crl",
    "auth.issuers.jwks_file",  # a writer of this file could authenticate as any caller
    "age.public_key_path",
    "jobs.spool_dir",
    "audit.path",
    "audit.anchor_dir",
    "audit.copies",
)


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
    for name, tenant in settings.kms.tenants.items():
        if tenant.burst is not None and tenant.requests_per_s is None:
            raise ConfigurationError(f"kms.tenants.{name}.burst: it needs requests_per_s")


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


def _check_scopes(where: str, lines: Sequence[str]) -> None:
    for index, line in enumerate(lines):
        try:
            scopes.parse(line)
        except ValueError as exc:
            raise ConfigurationError(f"{where}[{index}]: {exc}") from exc


_REQUIRE: Final = """ (`mkdir -p {} && printf '\\n[kms.auth]\\nmode = "required"\\n' >> {}`)"""


def check_exposure(settings: Settings, file: Path | None = None) -> None:
    """Refuse to serve prod, or an address off loopback, while authentication is undecided.

    Raises ConfigurationError, with a command that requires it in ``file``. ``localhost`` and loopback
    addresses count as loopback, other names do not.
    """
    if settings.kms.auth.mode is not None:
        return
    if settings.is_prod:
        reason = "The environment is prod"
    elif not is_loopback(settings.kms.bind):
        reason = "kms.bind is not a loopback address"
    else:
        return
    require = _REQUIRE.format(in_shell(file.parent), in_shell(file)) if file else ""
    raise ConfigurationError(
        f'{reason}, and callers are not authenticated: write mode = "required" under [kms.auth]{require} and '
        "make tokens with kms token create; if something in front of the service authenticates callers, "
        'write mode = "none" under [kms.auth]; if neither, bind to 127.0.0.1 and leave prod'
    )


def check(settings: Settings, literals: Collection[str]) -> None:
    """Refuse settings that are incomplete, contradictory or unsafe. Raises ConfigurationError.

    ``literals`` are the schemes whose credential is written in the file itself.
    """
    check_keys(settings)
    check_backends(settings, literals)
    check_redis(settings)
    check_endpoints(settings)
    check_server(settings)
    check_auth(settings)
    check_buckets(settings)
    check_roots(settings)
    check_jobs(settings)


def check_environment(kms: KmsSection) -> None:
    """Require a section for other environments: a misspelt prod must not run with the checks of dev."""
    known = (*BUILT_IN_ENVIRONMENTS, *kms.environments)
    for name in BUILT_IN_ENVIRONMENTS:
        if name in kms.environments:
            raise ConfigurationError(f"kms.environments.{name}: set kms.{name}_backend instead")
    if kms.environment not in known:
        raise ConfigurationError(
            f"kms.environment: expected one of {', '.join(known)}{nearest(kms.environment, known)}"
            "; another environment needs a section [kms.environments.<name>] with its backend"
        )


def check_backends(settings: Settings, literals: Collection[str]) -> None:
    """Refuse age in prod unless it is allowed, and the tables of used backends that their own checks refuse.

    ``literals`` are the schemes whose credential is written in the file itself.
    """
    allows_age = settings.kms.allow_age_in_prod or settings.backend(AgeSection).sealed_only
    if settings.is_prod and "age" in settings.used_backends and not allows_age:
        raise ConfigurationError(
            "The age backend is in use and the environment is prod: seal its keys and write "
            "sealed_only = true under [kms.age], set kms.prod_backend to another one, or write "
            "allow_age_in_prod = true under [kms] if plain key files on this host are what you want"
        )
    for scheme in SCHEMES.keys() & settings.used_backends:
        where, key = f"kms.{table_of(scheme)}", SCHEMES[scheme].CREDENTIAL
        settings.backends[scheme].check(where, in_prod=settings.is_prod)
        if settings.is_prod and scheme in literals:
            raise ConfigurationError(
                f"{where}.{key}: a credential in the settings themselves is refused in prod; use {key}_file, "
                f'or a variable: {key} = "${{NAME}}"'
            )


def check_keys(settings: Settings) -> None:
    """Require a scheme in each key URI; the keyring refuses unknown ones."""
    for key_id, uri in settings.kms.key_uris:
        try:
            scheme = urlsplit(uri).scheme
        except ValueError:  # its text quotes the URI
            scheme = ""
        if not scheme:
            raise ConfigurationError(
                f"kms.keys.{key_id}: expected a URI such as age:///path/to/private_key.txt"
            )
        if document := document_of(urlsplit(uri)):
            check_document(settings, f"kms.keys.{key_id}", document)
    for key_id, key in settings.kms.all_keys.items():
        if key.use == "seal" and key_id == settings.kms.default_key_id:
            raise ConfigurationError(
                f'kms.default_key_id: the key {key_id} seals key files (use = "seal") and takes no calls; '
                "name another"
            )


def check_endpoints(settings: Settings) -> None:
    """Require TLS for webhooks; http:// is for loopback in dev."""
    for name, endpoint in settings.kms.jobs.endpoints.items():
        where = f"kms.jobs.endpoints.{name}.url"
        check_https(where, endpoint.url, in_dev=settings.environment == "dev", query=True)


def check_buckets(settings: Settings) -> None:
    """Refuse incomplete and unsafe sections of buckets. Raises ConfigurationError, which names the key."""
    for name, section in settings.kms.jobs.buckets.items():
        where = f"kms.jobs.buckets.{name}"
        for setting, prefixes in (("read", section.read), ("write", section.write)):
            _check_prefixes(f"{where}.{setting}", prefixes)
        _check_store(settings, where, section)
    _check_spool(settings)


def _check_store(settings: Settings, where: str, section: StoreSection) -> None:
    """Refuse half of the credentials, and an unsafe address."""
    if (section.access_key_id is None) != (section.secret_key_file is None):
        raise ConfigurationError(
            f"{where}.access_key_id and {where}.secret_key_file belong together: set both, or neither "
            "for the credentials that AWS tools would find"
        )
    if section.endpoint is not None:
        check_address(f"{where}.endpoint", section.endpoint, in_prod=settings.is_prod)
        _check_http(f"{where}.allow_http", section, in_dev=settings.environment == "dev")


def _check_spool(settings: Settings) -> None:
    """Refuse a bucket of the spool in which jobs could read or write."""
    spool = settings.kms.jobs.spool_bucket
    if spool is None:
        return
    where = "kms.jobs.spool_bucket"
    _check_prefixes(f"{where}.url", (spool.prefix,))
    _check_store(settings, where, spool)
    bucket = settings.kms.jobs.buckets.get(spool.bucket)
    for prefix in (*bucket.read, *bucket.write) if bucket else ():
        if prefix.startswith(spool.prefix) or spool.prefix.startswith(prefix):
            raise ConfigurationError(
                f'{where}.url overlaps "{prefix}" of kms.jobs.buckets.{spool.bucket}: jobs could reach the '
                "uploads and results of others; name another prefix or bucket"
            )


def _check_prefixes(where: str, prefixes: tuple[str, ...]) -> None:
    for prefix in prefixes:
        if prefix and (not prefix.endswith("/") or {"", ".", ".."} & set(prefix[:-1].split("/"))):
            raise ConfigurationError(
                f'{where}: a prefix ends in a slash and begins with none, as "incoming/"; "" is all of it'
            )


def _check_http(where: str, section: StoreSection, *, in_dev: bool) -> None:
    """Refuse ``http://``, which discloses plaintext, unless it is allowed and on loopback or in dev."""
    url = urlsplit(section.endpoint or "")
    if url.scheme != "http":
        return
    if not section.allow_http:
        raise ConfigurationError(f"{where}: the endpoint is http://; use https://, or set this to true")
    if not in_dev and not is_loopback(url.hostname):
        raise ConfigurationError(f"{where}: http:// is for loopback, and for dev; use https://")


def check_server(settings: Settings) -> None:
    """Refuse half of the settings of TLS, unusable proxies, and origins that no browser sends."""
    server = settings.kms.server
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
    for index, origin in enumerate(server.codec_origins):
        if not _ORIGIN.fullmatch(origin):
            raise ConfigurationError(
                f"kms.server.codec_origins[{index}]: expected one origin as browsers send it, such as "
                "https://temporal.example.com or http://localhost:8233: in lower case, without path, final "
                'slash or default port; http:// is for this machine only, and "*" and "null" are refused'
            )


def check_roots(settings: Settings) -> None:
    """Refuse roots of file jobs that overlap private files of the service, with symlinks followed.

    A root of its own within the state directory is what ``kms up`` makes.
    """
    # before Python 3.13 Path.resolve raises RuntimeError for a link to itself
    state = Path(os.path.realpath(settings.state_dir))
    files = [(name, Path(os.path.realpath(path))) for name, path in private(settings)]
    for index, root in enumerate(settings.kms.jobs.roots):
        where, found = f"kms.jobs.roots[{index}]", Path(os.path.realpath(root))
        if not root.is_absolute():
            raise ConfigurationError(f"{where}: expected an absolute path")
        names = ["kms.state_dir"] if state.is_relative_to(found) else []
        names += [name for name, path in files if path.is_relative_to(found) or found.is_relative_to(path)]
        if names:
            raise ConfigurationError(
                f"{where} overlaps {names[0]}: jobs could reach keys or records; move one"
            )


def check_jobs(settings: Settings) -> None:
    """Refuse bounds of resources that there are not."""
    jobs = settings.kms.jobs
    known = {f"root:{root}" for root in jobs.roots}
    known |= {f"bucket:{name}" for name in jobs.buckets}
    known |= {f"backend:{scheme}" for scheme in settings.used_backends}
    if unknown := sorted(jobs.resource_leases.keys() - known):
        raise ConfigurationError(
            f'kms.jobs.resource_leases has "{unknown[0]}", which is no resource of these settings: '
            f"there are {', '.join(sorted(known))}"
        )


# -- private files -----------------------------------------------------------------------------------


def paths(settings: Settings, setting: str) -> Iterator[tuple[str, Path]]:
    """Each path that a setting names, below the full name: one for each entry of a table of entries."""
    table, *names = setting.split(".")
    sections = {table_of(scheme): section for scheme, section in settings.backends.items()}
    section = sections[table] if table in sections else getattr(settings.kms, table)
    return _paths(section, names, f"kms.{table}")


def _paths(value: object, names: Sequence[str], where: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield where, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _paths(entry, names, f"{where}.{name}")
    elif value is not None:
        yield from _paths(getattr(value, names[0]), names[1:], f"{where}.{names[0]}")


def private(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Name and path of each file or directory that jobs must not reach, nor what is below it."""
    state = settings.state_dir
    yield "kms.state_dir's run/", state / "run"
    yield "kms.state_dir's documents/", state / "documents"
    for setting in _PRIVATE:
        yield from paths(settings, setting)
    tokens = urlsplit(settings.kms.auth.tokens or "")
    if tokens.scheme == "file":
        yield "kms.auth.tokens", Path(unquote(tokens.path))
    for key_id, uri in settings.kms.key_uris:
        parts = urlsplit(uri)
        if parts.scheme != "age":
            continue
        key_file = unquote(parts.path.removeprefix("file://"))
        for path in (key_file, *parse_qs(parts.query.replace("+", "%2B")).get("public", ())):
            if path.startswith("/"):  # else a document that is not on this disk
                yield f"the files of kms.keys.{key_id}", Path(path)
