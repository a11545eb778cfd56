"""Names, authorities and expiry of a verified client certificate, and its revocation (RFC 5280)."""

import functools
import hashlib
import math
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kms_core.observability import metrics
from kms_core.reload import Reloaded, Stamp, reason_of, stamp_of
from kms_core.settings.model import ServerSection
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, Unavailable

_LABELS: Final[Mapping[str, type[x509.DNSName | x509.UniformResourceIdentifier | x509.RFC822Name]]] = {
    "DNS": x509.DNSName,
    "URI": x509.UniformResourceIdentifier,
    "email": x509.RFC822Name,
}
_MOST_BYTES: Final = 32 * 1024 * 1024
_BEGIN: Final = b"-----BEGIN X509 CRL-----"
_END: Final = b"-----END X509 CRL-----"
_HOW: Final = "write the PEM lists of every authority in client_ca there, or leave client_crl out"
_reading = threading.Lock()
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PresentedCertificate:
    """The client certificate of a connection.

    ``subjects`` has its names in the format of the settings: ``DNS:…``, ``URI:…``, ``email:…`` and
    ``subject:`` (RFC 4514).

    ``until`` is in seconds since the epoch: a connection may outlive its certificate. ``identity`` is the
    serial number in hexadecimal digits, the name of its authority (``authority_of``) and the keys of the
    authorities that TLS verified it with (``key_of``), from its own to the root, joined by colons.
    """

    subjects: tuple[str, ...]
    until: float
    identity: str = ""


def of_connection(tls: ssl.SSLObject) -> PresentedCertificate | None:
    """The client certificate of a connection after its handshake; None if the client sent none."""
    der = tls.getpeercert(binary_form=True)
    if der is None:
        return None
    # From Python 3.13 on SSLObject has this method itself
    chain = tls._sslobj.get_verified_chain() or ()  # type: ignore[attr-defined]  # noqa: SLF001 -- see above
    return read(der, [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in chain[1:]])


def read(der: bytes, authorities: Sequence[bytes] = ()) -> PresentedCertificate:
    """Parse a certificate that TLS has verified; one that cannot be parsed has no names.

    ``authorities`` are the certificates (DER) above it in the verified chain, the root last.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        keys = [key_of(x509.load_der_x509_certificate(one)) for one in authorities]
        return PresentedCertificate(
            tuple(_subjects(certificate)),
            certificate.not_valid_after_utc.timestamp(),
            ":".join((identity_of(authority_of(certificate.issuer), certificate.serial_number), *keys)),
        )
    except ValueError:
        return PresentedCertificate((), 0.0)


def authority_of(name: x509.Name) -> str:
    """A short name of an authority: 16 hexadecimal digits of SHA-256 over its RFC 4514 name."""
    return hashlib.sha256(name.rfc4514_string().encode()).hexdigest()[:16]


def key_of(authority: x509.Certificate) -> str:
    """16 hexadecimal digits of SHA-256 over an authority's public key (SubjectPublicKeyInfo in DER).

    Over the certificate, if the library does not support the kind of its key.
    """
    try:
        key = authority.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (UnsupportedAlgorithm, ValueError):
        return authority.fingerprint(hashes.SHA256()).hex()[:16]
    return hashlib.sha256(key).hexdigest()[:16]


def identity_of(authority: str, serial: int) -> str:
    """The start of a certificate's identity (``PresentedCertificate``), as a revocation list names it."""
    return f"{serial:x}:{authority}"


def _subjects(certificate: x509.Certificate) -> Iterator[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    for label, kind in _LABELS.items():
        yield from (f"{label}:{name}" for name in names.get_values_for_type(kind))
    yield f"subject:{certificate.subject.rfc4514_string()}"


# Authorities of client certificates (``[kms.server] client_ca``), and their revocation lists.
#
# TLS checks both in each handshake (``kms_api/server/process.py``). This module checks certificates of open
# connections and of jobs, and logs when a list (``client_crl``; RFC 5280 §5) has expired. It identifies
# authorities by their keys, since a re-keyed authority keeps its name.


@dataclass(frozen=True, slots=True)
class Lists:
    """The authorities of one file, and their revocation lists, each verified with its authority's key.

    ``begins`` and ``ends`` are epoch seconds between which every list is current. ``revoked`` has the serial
    numbers of revoked certificates with the name of their authority (``identity_of``), whichever of its keys
    signed the list. ``trusted`` has the keys (``key_of``) of authorities with a chain of unrevoked
    certificates to a root. ``are_complete``: every authority has a list.
    """

    begins: float
    ends: float
    revoked: frozenset[str]
    trusted: frozenset[str]
    are_complete: bool

    def is_revoked(self, identity: str) -> bool:
        """Return whether a new connection with this certificate (``PresentedCertificate.identity``) fails."""
        serial, *names = identity.split(":")
        authority, keys = "".join(names[:1]), names[1:]
        if f"{serial}:{authority}" in self.revoked or not keys:
            return True
        # Without lists a client may send intermediates that are not in the file; its root is
        return not self.trusted.issuperset(keys if self.are_complete else keys[-1:])


def read_lists(crl: Path | None, ca: Path) -> Lists:
    """The authorities in ``ca``, and their lists in ``crl``, one of each. Raises OSError, ValueError.

    The last result is cached, since several parts of a process read the same files.
    """
    with _reading:
        return _read(crl, ca, stamp_of([ca, crl] if crl else [ca]))


@functools.lru_cache(maxsize=1)
def _read(crl: Path | None, ca: Path, _stamp: Stamp) -> Lists:
    authorities = x509.load_pem_x509_certificates(small_files.read(ca))
    if crl is None:
        trusted = _trusted(authorities, frozenset())
        return Lists(-math.inf, math.inf, frozenset(), trusted, are_complete=False)
    data = small_files.read(crl, _MOST_BYTES)
    newest = _newest(map(x509.load_pem_x509_crl, _blocks(data)), authorities)
    for authority in authorities:
        if _label(authority) not in newest:
            serial = f"serial number {authority.serial_number:x}"
            raise ValueError(f"there is no list of {authority.subject.rfc4514_string()}, {serial}")
    revoked = frozenset(
        identity_of(name, entry.serial_number) for (name, _), found in newest.items() for entry in found
    )
    ends = [found.next_update_utc for found in newest.values()]
    return Lists(
        max(found.last_update_utc.timestamp() for found in newest.values()),
        min((end.timestamp() if end else math.inf) for end in ends),
        revoked,
        _trusted(authorities, revoked),
        are_complete=True,
    )


def _blocks(data: bytes) -> Iterator[bytes]:
    """The PEM blocks of lists in a file."""
    for text in data.split(_BEGIN)[1:]:
        inner, end, _ = text.partition(_END)
        if end:
            yield _BEGIN + inner + _END


def load_lists(server: ServerSection) -> Lists | None:
    """The lists in the settings; None without client_ca. Raises ConfigurationError."""
    if server.client_ca is None:
        return None
    try:
        return read_lists(server.client_crl, server.client_ca)
    except (OSError, ValueError) as exc:
        why = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) else exc
        where, expected = f"kms.server.client_ca: {server.client_ca}", "expected PEM certificates"
        if server.client_crl is not None:
            where, expected = f"kms.server.client_crl: {server.client_crl}", _HOW
        raise ConfigurationError(f"{where} cannot be used ({why}): {expected}") from exc


class Revocations:
    """The lists in use, which are read again when ``client_crl`` or ``client_ca`` changes. Thread-safe.

    While a changed file cannot be used, which is logged, the lists read before stay in use.
    """

    def __init__(self, crl: Path | None, ca: Path) -> None:
        """Raises OSError, ValueError."""
        self._file = crl or ca
        self._event = "client_crl" if crl else "client_ca"
        self._has_logged = False
        paths = [ca, crl] if crl else [ca]
        self._lists = Reloaded(
            paths, functools.partial(read_lists, crl, ca), done=self._renewed, failed=self._not_read
        )
        if crl:
            metrics.CLIENT_CRL_EXPIRES.set(self._lists.current().ends)

    def is_current(self) -> bool:
        """Return whether every list is current. Logs the first time that one is not."""
        return self._is_current(self._lists.current())

    def is_revoked(self, identity: str) -> bool:
        """Return whether a certificate or an authority of it is revoked or no longer in ``client_ca``.

        Raises Unavailable if a list has expired.
        """
        lists = self._lists.current()
        if not self._is_current(lists):
            raise Unavailable(
                "The revocation list of client certificates is not current: the operator must renew it",
                retry_after_s=60.0,
            )
        return lists.is_revoked(identity)

    def _is_current(self, lists: Lists) -> bool:
        if lists.begins <= time.time() < lists.ends:
            return True
        if not self._has_logged:
            self._has_logged = True
            _log.error("client_crl.expired", path=str(self._file))
        return False

    def _renewed(self, lists: Lists) -> None:
        self._has_logged = False
        if lists.are_complete:
            metrics.CLIENT_CRL_EXPIRES.set(lists.ends)
        _log.info(f"{self._event}.read", revoked=len(lists.revoked))

    def _not_read(self, exc: Exception) -> None:
        _log.error(f"{self._event}.not_read", path=str(self._file), reason=reason_of(exc))


def build_revocations(server: ServerSection) -> Revocations | None:
    """The revocations of the settings, kept up to date; None without client_ca. Raises ConfigurationError."""
    if load_lists(server) is None or server.client_ca is None:
        return None
    return Revocations(server.client_crl, server.client_ca)


def _label(authority: x509.Certificate) -> tuple[str, str]:
    """The name and the key of an authority."""
    return authority_of(authority.subject), key_of(authority)


def _newest(
    lists: Iterable[x509.CertificateRevocationList], authorities: Sequence[x509.Certificate]
) -> Mapping[tuple[str, str], x509.CertificateRevocationList]:
    """The newest list of each ``_label``. Raises ValueError for a partial list or another authority's."""
    newest: dict[tuple[str, str], x509.CertificateRevocationList] = {}
    for found in lists:
        key = next((_label(one) for one in authorities if _has_signed(one, found)), None)
        if key is None:
            raise ValueError(f"the list of {found.issuer.rfc4514_string()} is not signed by one in client_ca")
        _check_is_whole(found)
        if key not in newest or newest[key].last_update_utc < found.last_update_utc:
            newest[key] = found
    if not newest:
        raise ValueError("it holds no X509 CRL in PEM")
    return newest


def _has_signed(authority: x509.Certificate, found: x509.CertificateRevocationList) -> bool:
    if authority.subject != found.issuer:
        return False
    try:
        return found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]  # others raise TypeError
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _check_is_whole(found: x509.CertificateRevocationList) -> None:
    """Raise ValueError for delta and indirect lists, which are not complete."""
    for extension in found.extensions:
        value = extension.value
        is_indirect = isinstance(value, x509.IssuingDistributionPoint) and value.indirect_crl
        if is_indirect or isinstance(value, x509.DeltaCRLIndicator):
            raise ValueError("delta and indirect lists are not supported: a complete list is needed")


def _trusted(authorities: Sequence[x509.Certificate], revoked: frozenset[str]) -> frozenset[str]:
    """The keys of authorities with a chain of unrevoked certificates to a root in client_ca."""
    good = [
        one for one in authorities if identity_of(authority_of(one.issuer), one.serial_number) not in revoked
    ]
    found: list[x509.Certificate] = []
    added = [one for one in good if _is_root(one)]
    while added:
        found += added
        rest = [one for one in good if one not in found]
        added = [one for one in rest if any(_has_issued(above, one) for above in found)]
    return frozenset(map(key_of, found))


def _is_root(authority: x509.Certificate) -> bool:
    """Return whether a certificate is self-issued, by names and key identifiers as OpenSSL decides it."""
    if authority.subject != authority.issuer:
        return False
    extensions = authority.extensions
    try:
        above = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        own = extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        return True
    return above in {None, own}


def _has_issued(above: x509.Certificate, authority: x509.Certificate) -> bool:
    if above.subject != authority.issuer:
        return False
    try:
        authority.verify_directly_issued_by(above)
    except (InvalidSignature, TypeError, ValueError, UnsupportedAlgorithm):
        return False
    return True
