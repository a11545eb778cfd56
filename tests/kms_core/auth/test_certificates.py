"""The names of a client certificate, each with its kind: one kind never stands for another."""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from kms_core.auth import client_certificates
from support.credentials import Authority


def test_each_name_has_its_kind(tmp_path: Path) -> None:
    """As ``[kms.auth.certificates]`` writes them."""
    names = (
        x509.RFC822Name("ci@example.com"),
        x509.DNSName("ci.example.com"),
        x509.UniformResourceIdentifier("spiffe://acme/ci"),
    )
    pair = Authority(tmp_path).issue("ci", *names, subject="builder")
    read = x509.load_pem_x509_certificate(pair.cert.read_bytes())
    shown = client_certificates.read(read.public_bytes(Encoding.DER))

    assert sorted(shown.subjects) == [
        "DNS:ci.example.com",
        "URI:spiffe://acme/ci",
        "email:ci@example.com",
        "subject:CN=builder",
    ]
    assert shown.until == read.not_valid_after_utc.timestamp()


def test_what_is_no_certificate_has_no_names_and_has_expired() -> None:
    assert client_certificates.read(b"no certificate") == client_certificates.PresentedCertificate((), 0.0)
