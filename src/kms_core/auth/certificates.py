"""What a verified client certificate says of its holder: its names, and until when. Knows no TLS."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography import x509

_LABELS: Final[
    tuple[tuple[type[x509.DNSName | x509.UniformResourceIdentifier | x509.RFC822Name], str], ...]
] = (
    (x509.DNSName, "DNS"),
    (x509.UniformResourceIdentifier, "URI"),
    (x509.RFC822Name, "email"),
)


@dataclass(frozen=True, slots=True)
class Shown:
    """``subjects`` as settings write them: ``DNS:…``, ``URI:…``, ``email:…`` and ``subject:`` (RFC 4514).

    ``until`` is in seconds since the epoch: a connection may outlive its certificate. ``identity`` is the
    serial number in hexadecimal digits, a colon, and its authority (``authority_of``).
    """

    subjects: tuple[str, ...]
    until: float
    identity: str = ""


def read(der: bytes) -> Shown:
    """The names of a certificate that TLS has verified; none of one that cannot be read."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        return Shown(
            tuple(_subjects(certificate)),
            certificate.not_valid_after_utc.timestamp(),
            identity_of(authority_of(certificate.issuer), certificate.serial_number),
        )
    except ValueError:
        return Shown((), 0.0)


def authority_of(name: x509.Name) -> str:
    """A short name of an authority: 16 hexadecimal digits of SHA-256 over its RFC 4514 name."""
    return hashlib.sha256(name.rfc4514_string().encode()).hexdigest()[:16]


def identity_of(authority: str, serial: int) -> str:
    """The identity of a certificate: see ``Shown``."""
    return f"{serial:x}:{authority}"


def _subjects(certificate: x509.Certificate) -> Iterator[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    for kind, label in _LABELS:
        yield from (f"{label}:{name}" for name in names.get_values_for_type(kind))
    yield f"subject:{certificate.subject.rfc4514_string()}"
