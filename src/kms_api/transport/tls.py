"""The server's TLS: certificate, key and client authority from settings."""

import ssl
import time
from typing import Final

import structlog

from kms_core.auth import revocation
from kms_core.auth.revocation import Lists
from kms_core.reload import Reloaded
from kms_core.settings.model import ServerSection
from kms_protocol.errors import ConfigurationError

_OPEN_TO_ALL: Final = 0o007
_TELL_S: Final = 60.0
_VERIFY: Final = {"optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_log = structlog.get_logger(__name__)


class Renewal:
    """The context in use: its files are looked at with each handshake, and read again when they changed.

    So certificates and revocation lists are renewed under a running service. Files that cannot be used leave
    the old context in use. While a revocation list is expired, OpenSSL refuses every client certificate.
    """

    def __init__(self, server: ServerSection) -> None:
        """Raises OSError, ValueError, ConfigurationError."""
        self._told = float("-inf")
        paths = filter(None, (server.tls_cert, server.tls_key, server.client_ca, server.client_crl))
        self._loaded = Reloaded(
            tuple(paths),
            lambda: (revocation.load(server), _context(server)),
            done=lambda _: _log.info("tls.renewed"),
            failed=lambda exc: _log.error("tls.not_renewed", error=type(exc).__name__),
        )
        _, self.first = self._loaded.current()
        self.first.sni_callback = self._renew

    def _renew(self, connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        del name, first
        lists, current = self._loaded.current()
        self._tell_expired(lists)
        connection.context = current

    def _tell_expired(self, lists: Lists | None) -> None:
        """Log an expired revocation list, at most once a minute: the handshakes that fail leave no record."""
        now = time.time()
        if lists and not lists.begins <= now < lists.ends and now - self._told > _TELL_S:
            self._told = now
            _log.error("tls.client_crl_expired", advice="client certificates are refused; renew client_crl")


def context(server: ServerSection, *, strict: bool = False) -> ssl.SSLContext | None:
    """What to serve with; None means plain HTTP. Raises ConfigurationError.

    ``strict``: a key that every user may read is refused, not only told of.
    """
    if server.tls_cert is None or server.tls_key is None:
        return None
    try:
        if server.tls_key.stat().st_mode & _OPEN_TO_ALL:
            advice = f"every user may read {server.tls_key}: run `chmod 600 {server.tls_key}`"
            if strict:
                raise ConfigurationError(f"kms.server.tls_key: {advice}")
            _log.warning("tls.key_open_to_others", advice=advice)
        return Renewal(server).first
    except (OSError, ValueError) as exc:  # an SSLError is an OSError
        why = getattr(exc, "reason", None) or exc.strerror if isinstance(exc, OSError) else "not PEM"
        raise ConfigurationError(
            f"kms.server: tls_cert, tls_key or client_ca cannot be used ({why}): expected PEM files, and the "
            "key of the certificate"
        ) from exc


def _context(server: ServerSection) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2 if server.client_ca is None else ssl.TLSVersion.TLSv1_3
    made.set_alpn_protocols(["http/1.1"])
    nothing = lambda: ""  # noqa: E731 -- a key behind a passphrase is refused, a terminal never asked
    made.load_cert_chain(str(server.tls_cert), str(server.tls_key), nothing)
    if server.client_ca is not None:
        made.load_verify_locations(server.client_ca)
        made.verify_mode = _VERIFY[server.client_cert]
        # A resumed session would not show its certificate again. TLS 1.3 resumes by tickets only; TLS 1.2
        # also by session ids, which Python cannot turn off.
        made.num_tickets = 0
    if server.client_crl is not None:
        made.load_verify_locations(server.client_crl)
        made.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN  # a current list of every authority, or no connection
    return made
