"""Where the service is and how to reach it; knows no request."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, TypedDict
from urllib.parse import urlsplit

from kms_core.errors import ConfigurationError

DEFAULT_URL: Final = "http://localhost:8082"
_ADDRESS: Final = "The service address must look like http://host:port or https://host"
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Options(TypedDict, total=False):
    """What a client may be told besides the address.

    ``token`` is the bearer token itself, ``token_file`` a file that holds it and is read again for each
    request, so a renewed token is picked up. ``timeout_s`` bounds connecting and each silence of the
    service, not a whole transfer. ``retries`` counts further attempts after the first. ``ca_file``
    replaces the system's certificate authorities. ``cert_file`` and ``key_file`` (PEM) are a client
    certificate, for a service that knows its callers by those.
    """

    token: str | None
    token_file: str | Path | None
    timeout_s: float
    retries: int
    ca_file: str | Path | None
    cert_file: str | Path | None
    key_file: str | Path | None


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Checked options. Raises ConfigurationError on an address that is not http(s)://host."""

    url: str
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    timeout_s: float = 30.0
    retries: int = 2
    ca_file: Path | None = None
    certificate: tuple[Path, Path] | None = None

    @classmethod
    def of(cls, url: str, options: Options) -> Self:
        token_file, ca_file = options.get("token_file"), options.get("ca_file")
        cert_file, key_file = options.get("cert_file"), options.get("key_file")
        if bool(cert_file) != bool(key_file):
            raise ConfigurationError("cert_file and key_file belong together: name both")
        return cls(
            url=_checked(url),
            token=options.get("token"),
            token_file=Path(token_file) if token_file else None,
            timeout_s=options.get("timeout_s", 30.0),
            retries=options.get("retries", 2),
            ca_file=Path(ca_file) if ca_file else None,
            certificate=(Path(cert_file), Path(key_file)) if cert_file and key_file else None,
        )

    def authorization(self) -> dict[str, str]:
        """The Authorization header, or nothing. Raises ConfigurationError if the token file is unreadable."""
        token = self.token
        if token is None and self.token_file is not None:
            try:
                token = self.token_file.read_text(encoding="ascii").strip()
            except (OSError, ValueError) as exc:
                raise ConfigurationError(f"Cannot read the token file {self.token_file}") from exc
        if not token:
            return {}
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ConfigurationError("The token holds characters that no header can carry")
        return {"Authorization": f"Bearer {token}"}

    def trust_environment(self) -> bool:
        """Whether proxies of the environment apply: never for a service on this machine."""
        return urlsplit(self.url).hostname not in LOOPBACK

    def tls(self) -> ssl.SSLContext:
        """Verification against the system's authorities, or ``ca_file``.

        For http:// an empty context, which would verify nothing successfully: loading authorities that
        are never asked costs 20 ms.
        """
        if self.url.startswith("http://"):
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigurationError(f"Cannot read the certificate authorities in {self.ca_file}") from exc
        if self.certificate is not None:
            try:
                context.load_cert_chain(*self.certificate, password=lambda: "")  # no terminal is asked
            except (OSError, ssl.SSLError) as exc:
                raise ConfigurationError(f"Cannot use the certificate {self.certificate[0]}") from exc
        return context


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError as exc:
        raise ConfigurationError(_ADDRESS) from exc
    if not usable:
        raise ConfigurationError(_ADDRESS)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigurationError("The service address holds no user, password or query: use a token file")
    return url.rstrip("/")
