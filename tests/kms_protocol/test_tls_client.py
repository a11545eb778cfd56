"""TLS of outgoing connections: what is accepted of a server, on every Python."""

import ipaddress
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from kms_client.settings import ClientSettings
from kms_protocol.errors import ConfigurationError
from kms_protocol.tls_client import client_context, load_pair
from support.credentials import Authority, CertAndKey

LOCALHOST = x509.DNSName("localhost")


def shake(client: ssl.SSLContext, shown: CertAndKey, name: str = "localhost") -> None:
    """Does a handshake in memory. Raises SSLCertVerificationError if the client refuses the certificate."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(shown.cert, shown.key)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(down, up, server_hostname=name)
    theirs = server.wrap_bio(up, down, server_side=True)
    for _ in range(2):
        for end in (ours, theirs):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ours.cipher()


def of_the_core(ca_file: Path) -> ssl.SSLContext:
    return client_context(ca_file, "kms.x.ca_file")


def of_the_client(ca_file: Path) -> ssl.SSLContext:
    return ClientSettings("https://localhost", ca_file=ca_file).tls()


@pytest.mark.parametrize("made", [of_the_core, of_the_client])
def test_an_authority_without_key_usage_is_accepted(
    tmp_path: Path, made: Callable[[Path], ssl.SSLContext]
) -> None:
    authority = Authority(tmp_path, plain=True)
    pair = authority.issue("server", LOCALHOST, server=True)
    strict = authority.context()

    shake(made(authority.ca_file), pair)
    with pytest.raises(ssl.SSLCertVerificationError, match="key usage"):
        shake(strict, pair)


def test_an_intermediate_authority_in_the_file_is_trusted(tmp_path: Path) -> None:
    root = Authority(tmp_path / "root")
    below = Authority(tmp_path / "below", "below", root)

    shake(of_the_core(below.ca_file), below.issue("server", LOCALHOST, server=True))


def test_what_another_authority_signed_is_refused(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other", "another CA")

    with pytest.raises(ssl.SSLCertVerificationError, match="issuer"):
        shake(of_the_core(ours.ca_file), other.issue("server", LOCALHOST, server=True))


def test_a_certificate_of_another_name_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", x509.IPAddress(ipaddress.ip_address("127.0.0.1")), server=True)

    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(of_the_core(authority.ca_file), pair)


@pytest.mark.parametrize("text", [None, "", "no PEM"])
def test_a_file_that_cannot_be_used_is_told_by_its_setting(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "ca.pem"
    if text is not None:
        file.write_text(text)

    with pytest.raises(ConfigurationError, match=r"kms\.x\.ca_file: .*/ca\.pem holds no certificates in PEM"):
        of_the_core(file)


@pytest.mark.parametrize("made", [of_the_core, of_the_client])
def test_a_pipe_in_place_of_authorities_is_not_waited_for(
    tmp_path: Path, made: Callable[[Path], ssl.SSLContext]
) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ConfigurationError, match="ca_file"):
        made(tmp_path / "pipe")


def test_a_pipe_in_place_of_a_certificate_or_its_key_is_not_waited_for(tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("server", LOCALHOST, server=True)
    os.mkfifo(pipe := tmp_path / "pipe")

    for cert, key in ((pipe, pair.key), (pair.cert, pipe)):
        with pytest.raises(OSError, match="a pipe in place of a file"):
            load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)
