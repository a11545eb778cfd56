"""Building blocks for the tables of ``kms.toml``: base classes, shared types, and checks of addresses."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import SplitResult, urlsplit

from msgspec import Meta

from kms_protocol.addresses import is_loopback
from kms_protocol.errors import ConfigurationError
from kms_protocol.wire import Hidden

Positive = Annotated[int, Meta(ge=1)]
Timeout = Annotated[float, Meta(gt=0, le=120)]


class Section(Hidden, frozen=True, kw_only=True):
    """A table of the file, whose URLs and API keys are secrets."""


@dataclass(frozen=True, slots=True)
class WeakValue:
    """A value of a backend's table that ``kms config lint`` reports, with its risk and what to do."""

    key: str
    is_weak: Callable[[Any], bool]
    risk: str
    advice: str


def cleartext(key: str, risk: str) -> WeakValue:
    """The weakness of an address without TLS, by its key."""
    return WeakValue(key, lambda section: is_cleartext(getattr(section, key)), risk, "use https://")


def unverified(risk: str) -> WeakValue:
    """The weakness of TLS that verifies no certificate."""
    return WeakValue("tls_verify", lambda section: not section.tls_verify, risk, "name a CA in ca_file")


class BackendSection(Section, frozen=True, kw_only=True):
    """The table of a backend: ``[kms.<scheme>]``, with ``_`` in place of ``-``.

    A subclass declares its keys, and replaces those of the following attributes that differ.
    """

    MODULE: ClassVar[str]
    """Module with ``open_key(uri, section, strict=...)``, imported when a key uses the backend."""
    CREDENTIAL: ClassVar[str] = ""
    """Key with a credential that prod accepts from a variable, or from the file in ``<key>_file``, only."""
    SECRET_FILES: ClassVar[tuple[str, ...]] = ()
    """Keys of files that only their owner may read. Jobs cannot reach them."""
    CERTIFICATE: ClassVar[str] = ""
    """Key of our client certificate, whose expiry ``kms doctor`` reports."""
    WEAK_VALUES: ClassVar[tuple[WeakValue, ...]] = ()

    @classmethod
    def fill_in(cls, table: dict[str, object], state_dir: Path | None, environment: str) -> None:
        """Set defaults that depend on the state directory (None: not configured) or the environment."""

    def check(self, where: str, *, in_prod: bool) -> None:
        """Refuse missing and unsafe values of a backend in use. Raises ConfigurationError.

        ``where`` is the table's name in errors.
        """

    def own_key_id(self) -> str | None:
        """The id of the key that the backend itself provides, where it has one."""
        return None


# -- addresses ---------------------------------------------------------------------------------------


def check_address(where: str, address: str | None, *, in_prod: bool) -> None:
    """Refuse anything but ``http[s]://host[:port][/prefix]``, and ``http://`` in prod."""
    if address is None:
        raise ConfigurationError(f"{where} is missing")
    url = _split(where, address, query=False)
    if in_prod and url.scheme == "http":
        raise ConfigurationError(f"{where}: http:// is refused in prod; use https://")


def check_https(where: str, address: str, *, in_dev: bool, query: bool = False) -> None:
    """Refuse anything but ``https://host[:port][/path]``, or in dev ``http://`` to loopback.

    ``query``: it may also have a query.
    """
    url = _split(where, address, query=query)
    if url.scheme == "http" and not (in_dev and is_loopback(url.hostname)):
        raise ConfigurationError(f"{where}: expected https://; http:// is for loopback in dev only")


def _split(where: str, address: str, *, query: bool) -> SplitResult:
    """The parts of an absolute URL with a usable host and port. Raises ConfigurationError."""
    try:
        url = urlsplit(address)
        fits = bool(url.hostname and url.hostname.encode("idna")) and url.port != 0
    except ValueError:  # UnicodeError is one; their texts quote the URL
        url, fits = SplitResult("", "", "", "", ""), False
    visible = address.isascii() and address.isprintable() and " " not in address
    if not fits or not visible or not address.startswith(("https://", "http://")):
        raise ConfigurationError(f"{where}: expected https://host[:port][/path] in ASCII")
    if "@" in (url.netloc if query else address) or "#" in address or ("?" in address and not query):
        raise ConfigurationError(f"{where}: no user, password, query or fragment belongs there")
    return url


def check_pair(where: str, section: Section, first: str, second: str) -> None:
    """Refuse one of two keys without the other."""
    if (getattr(section, first) is None) != (getattr(section, second) is None):
        raise ConfigurationError(f"{where}.{first} and {where}.{second} belong together: set both")


def check_verified(where: str, *, tls_verify: bool, in_prod: bool) -> None:
    """Refuse unverified TLS in prod."""
    if in_prod and not tls_verify:
        raise ConfigurationError(f"{where}.tls_verify = false is refused in prod; name a CA in ca_file")


def is_cleartext(url: str | None) -> bool:
    """Return whether a URL is ``http://`` to another machine."""
    try:
        parts = urlsplit(url or "")
    except ValueError:  # of OpenTelemetry's variables, which are not checked: nothing is sent there
        return False
    return parts.scheme == "http" and not is_loopback(parts.hostname)
