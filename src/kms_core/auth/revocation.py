"""Certificate revocation lists (CRLs, RFC 5280 §5) of ``[kms.server] client_crl``. Knows no TLS.

TLS checks the lists in each handshake (``kms_api/tls.py``). What is here checks certificates of connections
that are open already, and of jobs, and tells when a list has expired.
"""

import math
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from kms_core import metrics
from kms_core.auth.certificates import authority_of, identity_of
from kms_core.errors import ConfigurationError, Unavailable
from kms_core.settings_sections import Server

_MOST_BYTES: Final = 32 * 1024 * 1024
_PEM: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)
_HOW: Final = "write the PEM lists of every authority in client_ca there, or leave client_crl out"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Lists:
    """The lists of one file, each verified with its authority's key.

    ``begins`` and ``ends`` are epoch seconds between which every list is current. ``revoked`` holds
    identities of certificates (``Shown.identity``), ``authorities`` those whose own certificates are revoked.
    """

    begins: float
    ends: float
    revoked: frozenset[str]
    authorities: frozenset[str]


def read(crl: Path, ca: Path) -> Lists:
    """The lists in ``crl``: one for every authority in ``ca``. Raises OSError, ValueError."""
    data = crl.read_bytes()
    if len(data) > _MOST_BYTES:
        raise ValueError("the file is above 32 MiB")
    authorities = x509.load_pem_x509_certificates(ca.read_bytes())
    newest = _newest(map(x509.load_pem_x509_crl, _PEM.findall(data)), authorities)
    for authority in authorities:
        if authority_of(authority.subject) not in newest:
            raise ValueError(f"there is no list of {authority.subject.rfc4514_string()}")
    revoked = frozenset(
        identity_of(name, entry.serial_number) for name, found in newest.items() for entry in found
    )
    ends = [found.next_update_utc for found in newest.values()]
    return Lists(
        max(found.last_update_utc.timestamp() for found in newest.values()),
        min((end.timestamp() if end else math.inf) for end in ends),
        revoked,
        frozenset(_revoked_authorities(authorities, revoked)),
    )


def load(server: Server) -> Lists | None:
    """The lists of the settings, None if they name none. Raises ConfigurationError, which says what to do."""
    if server.client_crl is None or server.client_ca is None:
        return None
    try:
        return read(server.client_crl, server.client_ca)
    except (OSError, ValueError) as exc:
        why = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) else exc
        raise ConfigurationError(
            f"kms.server.client_crl: {server.client_crl} cannot be used ({why}): {_HOW}"
        ) from exc


class Revocations:
    """The lists in use, read again when ``client_crl`` or ``client_ca`` changes. Safe in several threads.

    A changed file that cannot be used leaves the lists read before in use, and is logged.
    """

    def __init__(self, crl: Path, ca: Path, lists: Lists) -> None:
        self._crl = crl
        self._ca = ca
        self._lock = threading.Lock()
        self._stamp = self._stamped()
        self._lists = lists
        self._has_told = False
        metrics.CLIENT_CRL_EXPIRES.set(lists.ends)

    def is_current(self) -> bool:
        """Whether every list is current. The first time that one is not is logged."""
        lists, now = self._fresh(), time.time()
        if lists.begins <= now < lists.ends:
            return True
        if not self._has_told:
            self._has_told = True
            _log.error("client_crl.expired", path=str(self._crl))
        return False

    def is_revoked(self, identity: str) -> bool:
        """Whether a certificate or its authority is revoked. Raises Unavailable if a list has expired."""
        if not self.is_current():
            raise Unavailable(
                "The revocation list of client certificates is not current: the operator must renew it",
                retry_after_s=60.0,
            )
        lists = self._lists
        return identity in lists.revoked or identity.rpartition(":")[2] in lists.authorities

    def _fresh(self) -> Lists:
        stamp = self._stamped()
        if stamp != self._stamp:
            with self._lock:
                self._reload(stamp)
        return self._lists

    def _reload(self, stamp: object) -> None:
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._lists = read(self._crl, self._ca)
        except (OSError, ValueError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else str(exc)
            _log.error("client_crl.not_read", path=str(self._crl), reason=why)
            return
        self._has_told = False
        metrics.CLIENT_CRL_EXPIRES.set(self._lists.ends)
        _log.info("client_crl.read", revoked=len(self._lists.revoked))

    def _stamped(self) -> object:
        """A stamp that changes with the files; None while one is missing."""
        try:
            found = [path.stat() for path in (self._crl, self._ca)]
        except OSError:
            return None
        return [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found]


def build(server: Server) -> Revocations | None:
    """The lists of the settings, kept up to date. Raises ConfigurationError."""
    lists = load(server)
    if lists is None or server.client_crl is None or server.client_ca is None:
        return None
    return Revocations(server.client_crl, server.client_ca, lists)


def _newest(
    lists: Iterable[x509.CertificateRevocationList], authorities: Iterable[x509.Certificate]
) -> Mapping[str, x509.CertificateRevocationList]:
    """The newest list of each authority. Raises ValueError for a list of another one, or a partial one."""
    newest: dict[str, x509.CertificateRevocationList] = {}
    for found in lists:
        if not any(_has_signed(authority, found) for authority in authorities):
            raise ValueError(f"the list of {found.issuer.rfc4514_string()} is not signed by one in client_ca")
        _check_is_whole(found)
        name = authority_of(found.issuer)
        if name not in newest or newest[name].last_update_utc < found.last_update_utc:
            newest[name] = found
    if not newest:
        raise ValueError("it holds no X509 CRL in PEM")
    return newest


def _has_signed(authority: x509.Certificate, found: x509.CertificateRevocationList) -> bool:
    if authority.subject != found.issuer:
        return False
    try:
        return found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]  # others raise TypeError
    except (TypeError, UnsupportedAlgorithm):
        return False


def _check_is_whole(found: x509.CertificateRevocationList) -> None:
    """Refuse delta and indirect lists, which say less or more than their authority's certificates."""
    for extension in found.extensions:
        value = extension.value
        is_indirect = isinstance(value, x509.IssuingDistributionPoint) and value.indirect_crl
        if is_indirect or isinstance(value, x509.DeltaCRLIndicator):
            raise ValueError("delta and indirect lists are not supported: a complete list is needed")


def _revoked_authorities(authorities: Iterable[x509.Certificate], revoked: frozenset[str]) -> set[str]:
    """Authorities of which every certificate in client_ca is revoked, or is of such an authority."""
    found: set[str] = set()
    while True:
        good = {
            authority_of(one.subject)
            for one in authorities
            if identity_of(authority_of(one.issuer), one.serial_number) not in revoked
            and (authority_of(one.issuer) not in found or one.issuer == one.subject)
        }
        bad = {authority_of(one.subject) for one in authorities} - good
        if bad == found:
            return bad
        found = bad
