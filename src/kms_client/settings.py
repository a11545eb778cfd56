"""Where the service is and how to reach it; knows no request."""

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, TypedDict
from urllib.parse import unquote, urlsplit

from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError
from kms_protocol.tls_client import client_context

DEFAULT_URL: Final = "http://localhost:8082"
_ADDRESS: Final = "The service address must look like http://host:port or https://host"
_IN_CLEAR: Final = (
    "Tokens, keys and plaintexts would travel in clear to {url}: use an https:// address, or allow it with "
    "allow_http=True (kms --allow-http, KMS_ALLOW_HTTP=1)"
)
_LOOPBACK: Final = re.compile(r"localhost|::1|127(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}", re.ASCII)


def is_loopback(host: str | None) -> bool:
    """Whether a host is written 127.0.0.0/8, ::1 or ``localhost``; other names may resolve to anything."""
    return host is not None and _LOOPBACK.fullmatch(host) is not None


class Options(TypedDict, total=False):
    """What a client may be told besides the address.

    ``token`` is the bearer token itself, ``token_file`` a file that holds it and is read again for each
    request, so a renewed token is picked up. ``timeout_s`` bounds connecting and each silence of the
    service, not a whole transfer. ``retries`` counts further attempts after the first, of which none begins
    when it would end ``deadline_s`` after the call was made; without it ``retries`` alone bounds. ``ca_file``
    replaces the system's certificate authorities. ``cert_file`` and ``key_file`` (PEM) are a client
    certificate, for a service that knows its callers by those. ``allow_http`` lets tokens, keys and
    plaintexts travel over ``http://`` to another machine, and through proxies on the way, where all can read
    them.
    """

    token: str | None
    token_file: str | Path | None
    timeout_s: float
    deadline_s: float | None
    retries: int
    ca_file: str | Path | None
    cert_file: str | Path | None
    key_file: str | Path | None
    allow_http: bool


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Checked options. Raises ConfigurationError on an address that is not http(s)://host.

    So it does on ``http://`` to a host that is not loopback, without ``allow_http``.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    timeout_s: float = 30.0
    deadline_s: float | None = None
    retries: int = 2
    ca_file: Path | None = None
    certificate: tuple[Path, Path] | None = None

    @classmethod
    def of(cls, url: str, options: Options) -> Self:
        token_file, ca_file = options.get("token_file"), options.get("ca_file")
        cert_file, key_file = options.get("cert_file"), options.get("key_file")
        if bool(cert_file) != bool(key_file):
            raise ConfigurationError("cert_file and key_file belong together: name both")
        url = checked_address(url)
        if not options.get("allow_http", False):
            check_encrypted(url)
        return cls(
            url=url,
            token=options.get("token"),
            token_file=Path(token_file) if token_file else None,
            timeout_s=options.get("timeout_s", 30.0),
            deadline_s=options.get("deadline_s"),
            retries=options.get("retries", 2),
            ca_file=Path(ca_file) if ca_file else None,
            certificate=(Path(cert_file), Path(key_file)) if cert_file and key_file else None,
        )

    def authorization(self) -> dict[str, str]:
        """The Authorization header, or nothing. Raises ConfigurationError if the token file is unreadable."""
        token = self.token
        if token is None and self.token_file is not None:
            try:
                token = small_files.read(self.token_file).decode("ascii").strip()
            except (OSError, ValueError) as exc:
                raise ConfigurationError(f"Cannot read the token file {self.token_file}") from exc
        if not token:
            return {}
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ConfigurationError("The token holds characters that no header can carry")
        return {"Authorization": f"Bearer {token}"}

    def proxy(self) -> "Proxy | None":
        """The proxy of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY), if one applies.

        Never for a service on this machine. Raises ConfigurationError for one that does not speak HTTP.
        """
        parts = urlsplit(self.url)
        if is_loopback(parts.hostname):
            return None
        from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415 -- loads much, and rarely matters

        found = getproxies()
        url = found.get(parts.scheme) or found.get("all")
        if not url or proxy_bypass(parts.hostname or ""):
            return None
        return Proxy.of(url)

    def tls(self) -> ssl.SSLContext:
        """Verification against the system's authorities, or ``ca_file``.

        For http:// an empty context, which would verify nothing successfully: loading authorities that
        are never asked costs 20 ms.
        """
        if self.url.startswith("http://"):
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context = client_context(self.ca_file, "ca_file")
        if self.certificate is not None:
            try:
                context.load_cert_chain(*self.certificate, password=lambda: "")  # no terminal is asked
            except (OSError, ssl.SSLError) as exc:
                raise ConfigurationError(f"Cannot use the certificate {self.certificate[0]}") from exc
        return context


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy of the environment."""

    url: str
    credentials: tuple[str, str] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, text: str) -> Self:
        """Without a scheme it is http, as curl takes it. Raises ConfigurationError."""
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            address = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
        except ValueError:
            parts, address = urlsplit(""), None
        if parts.scheme not in {"http", "https"} or not address:
            raise ConfigurationError("The proxy that the environment names is not http://host:port")
        user = unquote(parts.username or "")
        credentials = (user, unquote(parts.password or "")) if user else None
        return cls(f"{parts.scheme}://{address}", credentials)


def check_encrypted(url: str) -> None:
    """Refuse ``http://`` to another machine. Loopback is asked without a proxy (see ``proxy``).

    Raises ConfigurationError.
    """
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ConfigurationError(_IN_CLEAR.format(url=url))


def checked_address(url: str) -> str:
    """A service address without a slash at its end. Raises ConfigurationError if it is none."""
    try:
        parts = urlsplit(url)
        usable = url.isascii() and parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError as exc:
        raise ConfigurationError(_ADDRESS) from exc
    if not usable:
        raise ConfigurationError(_ADDRESS)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigurationError("The service address holds no user, password or query: use a token file")
    return url.rstrip("/")
