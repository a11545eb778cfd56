"""Settings of a client: the address of the service, credentials, timeouts, TLS and proxy."""

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self, TypedDict
from urllib.parse import SplitResult, unquote, urlsplit

from msgspec.structs import force_setattr

from kms_protocol import small_files
from kms_protocol.addresses import is_loopback
from kms_protocol.errors import ConfigurationError, KmsError
from kms_protocol.tls_client import client_context, load_pair
from kms_protocol.wire import Hidden

DEFAULT_URL: Final = "http://localhost:8082"
_ADDRESS: Final = "The service address must look like http://host:port or https://host"
_UNENCRYPTED: Final = (
    "Tokens, keys and plaintexts would be sent unencrypted to {url}: use an https:// address, or allow it "
    "with allow_http=True (kms --allow-http, KMS_ALLOW_HTTP=1)"
)


class Options(TypedDict, total=False):
    """Options of a client besides the address.

    ``token`` is a bearer token, ``token_file`` a file that contains one and is read for each request, so that
    a renewed token is used. ``timeout_s`` limits connecting and each period without data, not a whole
    transfer. ``retries`` is the number of attempts after the first of a call without a deadline; one fewer is
    made where a key backend did not answer, which the service has tried again itself. Until ``deadline_s``
    seconds after the call attempts are made however often the service is away. ``on_retry`` is called before
    the wait for an attempt: with the error of the last one, the seconds of the wait, and how many attempts
    are left, or None if only time limits them. ``ca_file`` replaces the certificate authorities of the
    system. ``cert_file`` and ``key_file`` (PEM) are a client certificate. ``allow_http`` allows sending
    tokens, keys and plaintexts unencrypted over ``http://`` to another machine and through proxies.
    ``check_service`` asks the address, before the first request and without a credential, whether it
    answers as this service (``GET /livez``).
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
    check_service: bool
    on_retry: Callable[[KmsError, float, int | None], object] | None


class ClientSettings(Hidden, frozen=True):
    """The address and the options of a client. Raises ConfigurationError unless it is http(s)://host.

    It also does for ``http://`` to a host that is not loopback, unless ``allow_http`` is set.
    """

    url: str
    token: str | None = None
    token_file: str | Path | None = None
    timeout_s: float = 30.0
    deadline_s: float | None = None
    retries: int = 2
    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None
    allow_http: bool = False
    check_service: bool = False
    on_retry: Callable[[KmsError, float, int | None], object] | None = None

    @classmethod
    def of(cls, url: str | None, options: Options) -> Self:
        """Return the settings for an address, or for DEFAULT_URL, whose service is checked: None."""
        if url is None:
            options = {"check_service": True, **options}
        return cls(DEFAULT_URL if url is None else url, **options)

    def __post_init__(self) -> None:
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigurationError("cert_file and key_file must be given together")
        force_setattr(self, "url", checked_address(self.url))
        if not self.allow_http:
            check_encrypted(self.url)

    def authorization(self) -> dict[str, str]:
        """Return the Authorization header, if any. Raises ConfigurationError for an unreadable token."""
        token = self.token
        if token is None and self.token_file:
            try:
                token = small_files.read(Path(self.token_file)).decode("ascii").strip()
            except (OSError, ValueError) as exc:
                raise ConfigurationError(f"Cannot read the token file {self.token_file}") from exc
        if not token:
            return {}
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ConfigurationError("The token contains characters that a header cannot contain")
        return {"Authorization": f"Bearer {token}"}

    def proxy(self) -> SplitResult | None:
        """Return the proxy of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY), if one applies.

        None applies to a service on loopback. Raises ConfigurationError for a proxy that is not HTTP.
        """
        service = urlsplit(self.url)
        if is_loopback(service.hostname):
            return None
        from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415 -- imports much, and is rarely needed

        found = getproxies()
        url = found.get(service.scheme) or found.get("all")
        if not url or proxy_bypass(service.hostname or ""):
            return None
        parts = _http_url(url if "://" in url else f"http://{url}")  # http without a scheme, as in curl
        if not parts:
            raise ConfigurationError("The proxy that the environment names is not http://host:port")
        return parts

    def tls(self) -> ssl.SSLContext:
        """Return a context that verifies servers against ``ca_file`` or the authorities of the system.

        For http:// it trusts no authority: loading unused ones takes 20 ms.
        """
        if self.url.startswith("http://"):
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context = client_context(Path(self.ca_file) if self.ca_file else None, "ca_file")
        if self.cert_file:
            try:
                load_pair(context, self.cert_file, self.key_file)
            except OSError as exc:  # SSLError is one
                raise ConfigurationError(f"Cannot use the certificate {self.cert_file}") from exc
        return context


def _http_url(text: str) -> SplitResult | None:
    """Parse a URL; None unless it is http(s)://host, with any port but 0."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if usable else None


def credentials_of(proxy: SplitResult) -> tuple[str, str] | None:
    """Return the user and the password of a proxy, if it has any."""
    user = unquote(proxy.username or "")
    return (user, unquote(proxy.password or "")) if user else None


def check_encrypted(url: str) -> None:
    """Raise ConfigurationError for ``http://`` to another machine. Loopback is never proxied (``proxy``)."""
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ConfigurationError(_UNENCRYPTED.format(url=url))


def checked_address(url: str) -> str:
    """Return a service address without its final slash. Raises ConfigurationError for an invalid one."""
    parts = _http_url(url)
    if not parts or not url.isascii():
        raise ConfigurationError(_ADDRESS)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigurationError("The service address holds no user, password or query: use a token file")
    return url.rstrip("/")
