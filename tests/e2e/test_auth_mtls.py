"""TLS of the server, and client certificates as a door."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from kms_api.server import process
from kms_client import Client
from kms_core.settings.model import ServerSection
from kms_protocol.errors import ConfigurationError
from kms_protocol.wire import PREFIX
from support.credentials import Authority, bearer
from support.revocation import NAME, Revoking
from support.service import check_problem
from support.waiting import until


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Revoking]:
    with Revoking(tmp_path_factory.mktemp("secured"), has_lists=False) as running:
        yield running.start("api")


def test_a_certificate_is_held_to_its_scopes(secured: Revoking) -> None:
    with secured.client(secured.certificate()) as http:
        allowed = http.post(f"{PREFIX}/encrypt", json={"plaintext": "aGk="})
        jobs = http.get(f"{PREFIX}/jobs")

    assert allowed.status_code == 200
    check_problem(jobs, 403, "forbidden")
    lines = "".join(path.read_text() for path in (secured.state / "audit").rglob("*.jsonl"))
    assert '"cert:builder"' in lines


@pytest.mark.parametrize("kind", ["other authority", "for servers"])
def test_a_certificate_that_does_not_verify_gets_no_connection(
    secured: Revoking, tmp_path: Path, kind: str
) -> None:
    if kind == "other authority":
        pair = Authority(tmp_path / "stranger").issue("x", NAME)
    else:
        pair = secured.clients.issue("x", NAME, server=True)

    with pytest.raises(httpx.TransportError):
        secured.status(pair)


def test_without_a_certificate_a_token_lets_in(secured: Revoking) -> None:
    assert secured.status(headers=bearer(secured.new_token("status")[1])).status_code == 200
    check_problem(secured.status(), 401, "unauthenticated")


def test_a_token_that_is_shown_is_what_counts(secured: Revoking) -> None:
    certificate = secured.certificate(file="both")

    check_problem(secured.status(certificate, bearer("stolen")), 401, "unauthenticated")
    check_problem(secured.status(certificate, bearer(secured.new_token("encrypt")[1])), 403, "forbidden")


def test_a_header_that_names_a_certificate_is_nothing(secured: Revoking) -> None:
    for header in ("X-SSL-Client-Cert", "X-Client-Cert", "X-Forwarded-Client-Cert", "Client-Cert"):
        check_problem(secured.status(headers={header: "DNS:builder.example.com"}), 401, "unauthenticated")


def test_our_client_shows_a_certificate(secured: Revoking) -> None:
    certificate = secured.certificate(file="client")
    options = {"ca_file": secured.servers.ca_file, "cert_file": certificate.cert, "key_file": certificate.key}

    with Client(secured.url, **options) as kms:  # type: ignore[arg-type]  # the options are of several types
        assert kms.encrypt(b"x", context="env=test").key_id == "default"


def test_plain_http_is_not_spoken(secured: Revoking) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{secured.port}/livez", trust_env=False)


def test_where_certificates_are_required_nobody_connects_without(tmp_path: Path) -> None:
    with Revoking(tmp_path, more='client_cert = "required"\n', has_lists=False).start("api") as own:
        assert own.status(own.certificate()).status_code == 200
        with pytest.raises(httpx.TransportError):
            own.status()


def test_a_renewed_certificate_is_served_without_a_restart(tmp_path: Path) -> None:
    with Revoking(tmp_path, has_lists=False).start("api") as own:
        before = served(own)
        good = own.pair.key.read_bytes(), own.pair.cert.read_bytes()
        own.servers.issue("server", x509.DNSName("localhost"), server=True)
        until(lambda: served(own) != before, "the renewed certificate")
        after = served(own)
        own.pair.cert.write_bytes(good[1])  # of another key: half a renewal

        assert served(own) == after
        own.pair.key.write_bytes(good[0])
        until(lambda: served(own) == before, "the pair is whole again")


def served(own: Revoking) -> str:
    return ssl.get_server_certificate(("localhost", own.port))


@pytest.mark.parametrize("what", ["absent", "no PEM", "other key", "passphrase"])
def test_a_certificate_that_cannot_be_used_stops_the_start(tmp_path: Path, what: str) -> None:
    servers = Authority(tmp_path / "servers")
    pair, other = (servers.issue(name, server=True) for name in ("server", "other"))
    if what == "absent":
        pair.cert.unlink()
    elif what == "passphrase":
        key = load_pem_private_key(pair.key.read_bytes(), None)
        pair.key.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
        )
    else:
        pair.cert.write_bytes(b"no PEM" if what == "no PEM" else other.cert.read_bytes())

    with pytest.raises(ConfigurationError, match="tls_cert"):
        process.server_context(ServerSection(tls_cert=pair.cert, tls_key=pair.key, docs=True))


def test_a_key_that_every_user_may_read_is_refused_in_prod(tmp_path: Path) -> None:
    pair = Authority(tmp_path / "servers").issue("server", server=True)
    server = ServerSection(tls_cert=pair.cert, tls_key=pair.key, docs=False)
    assert process.server_context(server, strict=True)
    pair.key.chmod(0o644)

    assert process.server_context(server)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        process.server_context(server, strict=True)
