"""Names, authorities and expiry of a verified client certificate."""

import hashlib
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

_LABELS: Final[
    tuple[tuple[type[x509.DNSName | x509.UniformResourceIdentifier | x509.RFC822Name], str], ...]
] = (
    (x509.DNSName, "DNS"),
    (x509.UniformResourceIdentifier, "URI"),
    (x509.RFC822Name, "email"),
)


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
    for kind, label in _LABELS:
        yield from (f"{label}:{name}" for name in names.get_values_for_type(kind))
    yield f"subject:{certificate.subject.rfc4514_string()}"
