"""TLS of outgoing connections: which certificates of servers are accepted, the same on every Python."""

import ssl
from pathlib import Path
from typing import Final

from kms_protocol.errors import ConfigurationError

STRICT: Final = ssl.VERIFY_X509_STRICT
"""A default of ssl.create_default_context since Python 3.13, which refuses authorities that a plain
``openssl req -x509`` makes: they lack the extension keyUsage (RFC 5280 section 4.2.1.3)."""


def client_context(ca_file: Path | None, setting: str) -> ssl.SSLContext:
    """Verification of servers against the certificates (PEM) in ``ca_file``, or the system's authorities.

    Certificates that OpenSSL accepts by default are accepted, and any certificate in ``ca_file`` is trusted,
    an intermediate one too (as by curl, and by Python since 3.13). Raises ConfigurationError, which names
    ``setting``, for a file that cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)  # noqa: TID251 -- the one place
    except OSError as exc:  # SSLError is one
        raise ConfigurationError(f"{setting}: {ca_file} holds no certificates in PEM") from exc
    context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~STRICT
    return context
