"""TLS of outgoing connections: the same rules for server certificates on each Python version."""

import ssl
from pathlib import Path
from typing import Final

from kms_protocol.errors import ConfigurationError

STRICT: Final = ssl.VERIFY_X509_STRICT
"""A default of ssl.create_default_context since Python 3.13. It rejects authorities made by a plain
``openssl req -x509``, which lack the extension keyUsage (RFC 5280 section 4.2.1.3)."""


def load_pair(context: ssl.SSLContext, cert: str | Path, key: str | Path | None) -> None:
    """Load a certificate and its key in PEM. Raises OSError, also for a key with a password."""
    _refuse_pipes(cert, key)
    context.load_cert_chain(cert, key, password=lambda: "")


def _refuse_pipes(*paths: str | Path | None) -> None:
    """Raise OSError for a pipe, in which OpenSSL would wait for a program that writes to it."""
    if any(path and Path(path).is_fifo() for path in paths):
        raise OSError(0, "a pipe in place of a file")


def client_context(ca_file: Path | None, setting: str) -> ssl.SSLContext:
    """Return a context that verifies servers by the PEM file ``ca_file``, or by the system's authorities.

    It accepts what OpenSSL accepts by default, and trusts any certificate in ``ca_file``, intermediate ones
    included (as curl does, and Python since 3.13). Raises ConfigurationError, which names ``setting``, for an
    unusable file.
    """
    try:
        _refuse_pipes(ca_file)
        context = ssl.create_default_context(cafile=ca_file)  # noqa: TID251 -- the one place
    except OSError as exc:  # SSLError is one
        raise ConfigurationError(f"{setting}: {ca_file} holds no certificates in PEM") from exc
    context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~STRICT
    return context
