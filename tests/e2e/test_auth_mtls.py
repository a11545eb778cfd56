"""TLS of the server, and client certificates as a door."""

import json
import ssl
import subprocess
from collections.abc import Iterator, Mapping
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
from kms_cli.local import up
from kms_client import Client
from kms_core.settings.model import ServerSection
from kms_protocol.errors import ConfigurationError
from kms_protocol.wire import PREFIX
from support.credentials import Authority, Guarded, Pair, bearer
from support.service import Json, check_problem
from support.waiting import until

CERTIFICATES = """
[kms.auth.certificates.builder]
subject = "DNS:builder.example.com"
scopes = ["encrypt context=env=test", "status"]
[kms.auth.certificates.mesh]
subject = "URI:spiffe://acme/ci"
tenant = "acme"
scopes = ["status"]
[kms.auth.certificates.old]
subject = "subject:CN=old-builder"
scopes = ["status"]
"""
ENCRYPT: Json = {"plaintext": "aGk=", "context": "env=test"}


class Secured(Guarded):
    """An install that serves HTTPS."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.clients = Authority(folder / "clients")
        self.servers = Authority(folder / "servers", "a CA of servers")
        self.pair = self.servers.issue("server", x509.DNSName("localhost"), server=True)
        settings = (
            f'[kms.auth]\nmode = "required"\nfailures_per_minute = 1000\n{CERTIFICATES}'
            f'[kms.server]\ntls_cert = "{self.pair.cert}"\ntls_key = "{self.pair.key}"\n'
            f'client_ca = "{self.clients.ca_file}"\n{more}'
        )
        super().__init__(folder, settings, "unix:///nonexistent.sock")
        self.url = f"https://localhost:{self.port}"

    def _answers(self, name: str, port: int) -> bool:
        assert self._processes[name].poll() is None, f"{name} ended:\n{self.output(name)}"
        return up.is_alive("127.0.0.1", port, tls=True)

    def client(self, pair: Pair | None = None) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.servers.context(pair), trust_env=False)

    def status(self, pair: Pair | None = None, headers: Mapping[str, str] | None = None) -> httpx.Response:
        with self.client(pair) as http:
            return http.get(f"{PREFIX}/status", headers=headers)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with Secured(tmp_path_factory.mktemp("secured")) as running:
        running.start("api")
        yield running


@pytest.mark.parametrize(
    ("names", "subject"),
    [
        ([x509.DNSName("builder.example.com")], "anything"),
        ([x509.DNSName("other.example.com"), x509.DNSName("builder.example.com")], "anything"),
        ([x509.UniformResourceIdentifier("spiffe://acme/ci")], "anything"),
        ([], "old-builder"),
    ],
    ids=["name", "second name", "uri", "subject"],
)
def test_a_certificate_lets_its_holder_in(
    secured: Secured, names: list[x509.GeneralName], subject: str
) -> None:
    pair = secured.clients.issue("let-in", *names, subject=subject)

    assert secured.status(pair).status_code == 200


def test_a_certificate_is_held_to_its_scopes(secured: Secured) -> None:
    builder = secured.clients.issue("builder", x509.DNSName("builder.example.com"))
    with secured.client(builder) as http:
        allowed = http.post(f"{PREFIX}/encrypt", json=ENCRYPT)
        context = http.post(f"{PREFIX}/encrypt", json=ENCRYPT | {"context": "env=prod"})
        jobs = http.get(f"{PREFIX}/jobs")

    assert allowed.status_code == 200
    check_problem(context, 403, "forbidden")
    check_problem(jobs, 403, "forbidden")
    lines = "".join(path.read_text() for path in (secured.state / "audit").rglob("*.jsonl"))
    assert '"cert:builder"' in lines


def test_a_certificate_without_an_entry_lets_nobody_in(secured: Secured) -> None:
    for number, name in enumerate(("DNS:builder.example.com", "builder.example.com.evil", "*.example.com")):
        pair = secured.clients.issue(f"stranger{number}", x509.DNSName(name), subject="builder.example.com")
        answer = secured.status(pair)
        check_problem(answer, 401, "unauthenticated")
        assert "certificate" in answer.json()["detail"]
    assert failures(secured, "certificate") >= 3


def failures(secured: Secured, reason: str) -> float:
    with secured.client() as http:
        lines = http.get("/metrics").text.splitlines()
    start = f'kms_auth_failures_total{{reason="{reason}"}} '
    return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))


@pytest.mark.parametrize("kind", ["other authority", "for servers"])
def test_a_certificate_that_does_not_verify_gets_no_connection(
    secured: Secured, tmp_path: Path, kind: str
) -> None:
    name = x509.DNSName("builder.example.com")
    stranger = Authority(tmp_path / "stranger")
    pair = (
        stranger.issue("x", name)
        if kind == "other authority"
        else secured.clients.issue("x", name, server=True)
    )

    with pytest.raises(httpx.TransportError):
        secured.status(pair)


def test_without_a_certificate_a_token_lets_in(secured: Secured) -> None:
    assert secured.status(headers=bearer(secured.make("status")[1])).status_code == 200
    check_problem(secured.status(), 401, "unauthenticated")


def test_a_token_that_is_shown_is_what_counts(secured: Secured) -> None:
    builder = secured.clients.issue("both", x509.DNSName("builder.example.com"))

    check_problem(secured.status(builder, bearer("stolen")), 401, "unauthenticated")
    check_problem(secured.status(builder, bearer(secured.make("encrypt")[1])), 403, "forbidden")


def test_a_header_that_names_a_certificate_is_nothing(secured: Secured) -> None:
    for header in ("X-SSL-Client-Cert", "X-Client-Cert", "X-Forwarded-Client-Cert", "Client-Cert"):
        check_problem(secured.status(headers={header: "DNS:builder.example.com"}), 401, "unauthenticated")


def test_probes_and_curl_need_no_certificate(secured: Secured) -> None:
    argv = ["curl", "-s", "--cacert", str(secured.servers.ca_file), f"{secured.url}{PREFIX}/health"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)

    assert json.loads(done.stdout)["status"] == "healthy"


def test_our_client_shows_a_certificate(secured: Secured) -> None:
    builder = secured.clients.issue("client", x509.DNSName("builder.example.com"))
    options = {"ca_file": secured.servers.ca_file, "cert_file": builder.cert, "key_file": builder.key}

    with Client(secured.url, **options) as kms:  # type: ignore[arg-type]  # the options are of several types
        assert kms.encrypt(b"x", context="env=test").key_id == "default"


def test_plain_http_is_not_spoken(secured: Secured) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{secured.port}/livez", trust_env=False)


def test_where_certificates_are_required_nobody_connects_without(tmp_path: Path) -> None:
    with Secured(tmp_path, 'client_cert = "required"\n') as own:
        own.start("api")
        builder = own.clients.issue("builder", x509.DNSName("builder.example.com"))

        assert own.status(builder).status_code == 200
        with pytest.raises(httpx.TransportError):
            own.status()


def test_a_renewed_certificate_is_served_without_a_restart(tmp_path: Path) -> None:
    with Secured(tmp_path) as own:
        own.start("api")
        before = served(own)
        good = own.pair.key.read_bytes(), own.pair.cert.read_bytes()
        own.servers.issue("server", x509.DNSName("localhost"), server=True)
        until(lambda: served(own) != before, "the renewed certificate")
        after = served(own)
        own.pair.cert.write_bytes(good[1])  # of another key: half a renewal

        assert served(own) == after
        own.pair.key.write_bytes(good[0])
        until(lambda: served(own) == before, "the pair is whole again")


def served(own: Secured) -> str:
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
