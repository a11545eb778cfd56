"""Where client certificates are read, every connection shows one: TLS sessions are not resumed."""

import socket
import ssl
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Final

import msgspec
import pytest
from cryptography import x509

from kms_api.server import process
from kms_core.settings.model import ServerSection
from support.credentials import Authority, CertAndKey

VERSIONS: Final = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


class TlsPair:
    """A server's TLS, and a client with a certificate."""

    def __init__(self, folder: Path, *, with_clients: bool) -> None:
        servers, clients = Authority(folder / "servers"), Authority(folder / "clients")
        pair: CertAndKey = servers.issue("server", x509.DNSName("localhost"), server=True)
        server = ServerSection(tls_cert=pair.cert, tls_key=pair.key, docs=False)
        if with_clients:
            server = msgspec.structs.replace(server, client_ca=clients.ca_file)
        made = process.server_context(server)
        assert made
        self._server = made
        self._client = servers.context(clients.issue("builder", x509.DNSName("builder.example.com")))

    def connect(self, version: ssl.TLSVersion, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
        """A connection over which a byte has come back, so that tickets have come, too."""
        self._client.minimum_version = self._client.maximum_version = version
        ours, theirs = socket.socketpair()
        thread = Thread(target=self._echo, args=(theirs,))
        thread.start()
        try:
            made = self._client.wrap_socket(ours, server_hostname="localhost", session=session)
            made.sendall(b"x")
            assert made.recv(1) == b"x"
            return made
        finally:
            thread.join()

    def _echo(self, theirs: socket.socket) -> None:
        with suppress(ssl.SSLError), self._server.wrap_socket(theirs, server_side=True) as connection:
            connection.sendall(connection.recv(1))


def test_a_connection_with_a_certificate_is_not_resumed(tmp_path: Path) -> None:
    tls_pair = TlsPair(tmp_path, with_clients=True)
    with tls_pair.connect(ssl.TLSVersion.TLSv1_3) as first:
        session = first.session

    assert session is None or not session.has_ticket
    with tls_pair.connect(ssl.TLSVersion.TLSv1_3, session) as second:
        assert not second.session_reused


def test_tls_12_whose_session_ids_resume_is_refused_where_certificates_are_read(tmp_path: Path) -> None:
    tls_pair = TlsPair(tmp_path, with_clients=True)

    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        tls_pair.connect(ssl.TLSVersion.TLSv1_2)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_without_client_certificates_sessions_resume(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """What the test above looks for can be seen."""
    tls_pair = TlsPair(tmp_path, with_clients=False)
    with tls_pair.connect(version) as first:
        session = first.session
    assert session
    assert session.has_ticket

    with tls_pair.connect(version, session) as second:
        assert second.session_reused
