"""What settings may not say about backends over a network: no address, no TLS in prod, half a credential."""

import ipaddress
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from kms_core.settings.backends import VaultSection
from kms_core.settings.model import Settings
from kms_protocol.errors import ConfigurationError

SECTIONS: Final = {"transit": "transit", "vault-kv": "vault_kv"}
"""Backends that are reached through OpenBao or Vault, and their sections."""

_NAMESPACE: Final = re.compile(r"[\w.~-]+(?:/[\w.~-]+)*/?", re.ASCII)


def check_vaults(settings: Settings, literals: Collection[str]) -> None:
    """Refuse an incomplete or unsafe section of a backend in use.

    ``literals`` are the sections whose token stands in the file itself, which prod refuses.
    """
    for name in used(settings):
        section, where = section_of(settings, name), f"kms.{name}"
        check_address(f"{where}.address", section.address, in_prod=settings.is_prod)
        check_tls(where, section, in_prod=settings.is_prod)
        if bool(section.token) == bool(section.token_file):
            raise ConfigurationError(
                f"{where}.token_file: name the file that holds our token, "
                f'or set token = "${{VAULT_TOKEN}}", and not both'
            )
        if settings.is_prod and name in literals:
            raise ConfigurationError(
                f"{where}.token: a token in the settings themselves is refused in prod; use token_file"
            )
        if section.namespace is not None and not _NAMESPACE.fullmatch(section.namespace):
            raise ConfigurationError(f"{where}.namespace: expected a path such as team/payroll")


def check_address(where: str, address: str | None, *, in_prod: bool) -> None:
    """Refuse anything but ``http[s]://host[:port][/prefix]``, and ``http://`` in prod."""
    if address is None:
        raise ConfigurationError(f"{where} is missing")
    try:
        url = urlsplit(address)
        fits = url.scheme in {"http", "https"} and url.hostname and url.port != 0
    except ValueError:  # its text quotes the URL
        fits = False
    if not fits or not address.isascii() or not address.isprintable() or " " in address:
        raise ConfigurationError(f"{where}: expected https://host[:port][/prefix]")
    if "@" in address or "?" in address or "#" in address:
        raise ConfigurationError(f"{where}: no user, password, query or fragment belongs there")
    if in_prod and not address.startswith("https:"):
        raise ConfigurationError(f"{where}: http:// is refused in prod; use https://")


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address, or ``localhost``; other names may resolve to anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_aws_endpoint(where: str, url: str, *, in_prod: bool) -> None:
    """As ``check_address``; ``http://`` is for loopback alone, since file keys travel in clear within it."""
    check_address(where, url, in_prod=in_prod)
    if url.startswith("http:") and not is_loopback(urlsplit(url).hostname or ""):
        raise ConfigurationError(f"{where}: http:// is for loopback alone; use https://")


def check_tls(where: str, section: VaultSection, *, in_prod: bool) -> None:
    """Refuse unverified TLS in prod, and a client certificate without its key."""
    if in_prod and not section.tls_verify:
        raise ConfigurationError(f"{where}.tls_verify = false is refused in prod; name a CA in ca_file")
    if (section.client_cert is None) != (section.client_key is None):
        raise ConfigurationError(f"{where}.client_cert and {where}.client_key belong together: set both")


def secret_files(settings: Settings) -> Iterator[tuple[str, Path, bool]]:
    """The files of these backends that jobs must not reach: setting, path, and that all of it is private."""
    for name in SECTIONS.values():
        section = section_of(settings, name)
        for key, path in (("token_file", section.token_file), ("client_key", section.client_key)):
            if path:
                yield f"kms.{name}.{key}", path, True


def used(settings: Settings) -> Iterator[str]:
    """The sections of those backends that are in use."""
    return (name for backend, name in SECTIONS.items() if backend in settings.used_backends)


def section_of(settings: Settings, name: str) -> VaultSection:
    return settings.kms.transit if name == "transit" else settings.kms.vault_kv
