"""Nothing travels in clear to another machine unless its user says so: directly, by proxy or by redirect."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest

from kms_cli.main import run
from kms_cli.plugin.main import KeysOfTargets
from kms_cli.plugin.names import PluginTarget
from kms_client import AsyncClient, Client, Options, UnexpectedAnswer
from kms_client.settings import ClientSettings
from kms_protocol.context import Context
from kms_protocol.errors import ConfigurationError, KmsError, Unavailable
from support.contract_server import running
from support.scripted_servers import scripted

TOKEN = "canary-77aa"
FILE_KEY = bytes(range(16))
OTHER_MACHINES = [
    "http://kms.internal",
    "http://10.0.0.1:8082",
    "http://0.0.0.0:8082",
    "http://127.0.0.1.example.com",
    "http://127.1",
    "http://127.0.0.999",
    "http://localhost.example.com",
    "http://localhost.",
    "http://[::ffff:127.0.0.1]:8082",
    "http://[::2]",
    "HTTP://kms.internal",
]
HERE = [f"http://{host}:1" for host in ("localhost", "LOCALHOST", "127.0.0.1", "127.255.0.9", "[::1]")]
Make = Callable[..., Client | AsyncClient]


class RecordedRequests(NamedTuple):
    url: str
    requests: list[bytes]


@contextlib.contextmanager
def recording_server(
    answer: bytes = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
) -> Iterator[RecordedRequests]:
    """A server that keeps what it hears on each connection, and gives one answer."""
    requests: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        requests.append(connection.recv(65536))
        connection.sendall(answer)

    with scripted(serve) as server:
        yield RecordedRequests(server.url, requests)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return file


def ask(kind: Make, url: str, **options: object) -> None:
    """One call with a client of this kind."""
    if kind is Client:
        with Client(url, retries=0, **options) as kms:  # type: ignore[arg-type]  # Options, passed through
            kms.status()
        return

    async def call() -> None:
        async with AsyncClient(url, retries=0, **options) as kms:  # type: ignore[arg-type]  # as above
            await kms.status()

    anyio.run(call)


both = pytest.mark.parametrize("kind", [Client, AsyncClient])


@both
@pytest.mark.parametrize("url", OTHER_MACHINES)
def test_a_token_is_refused_to_another_machine(kind: Make, url: str, token_file: Path) -> None:
    """As is a call without one, unless the user says so."""
    for options in ({}, {"token": TOKEN}, {"token_file": token_file}):
        with pytest.raises(ConfigurationError, match=r"unencrypted.*https://.*allow_http") as caught:
            kind(url, **options)
        assert TOKEN not in str(caught.value)
        kind(url, allow_http=True, **options)


@both
@pytest.mark.parametrize("url", [*HERE, "https://kms.internal"])
def test_a_token_is_allowed_here_and_by_tls(kind: Make, url: str) -> None:
    kind(url, token=TOKEN)


@both
def test_no_proxy_hears_a_token_for_this_machine(kind: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording_server() as proxy, recording_server() as service:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for host in ("127.0.0.1", "127.0.0.9", "localhost"):
            with contextlib.suppress(KmsError):
                ask(kind, service.url.replace("127.0.0.1", host), token=TOKEN)

    assert proxy.requests == []
    assert any(TOKEN.encode() in each for each in service.requests)


@both
def test_a_proxy_hears_it_only_when_its_user_says_so(kind: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording_server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        with pytest.raises(ConfigurationError):
            ask(kind, "http://kms.invalid", token=TOKEN)
        assert proxy.requests == []
        with contextlib.suppress(KmsError):
            ask(kind, "http://kms.invalid", token=TOKEN, allow_http=True)

    assert TOKEN.encode() in proxy.requests[0]


@both
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(kind: Make, status: int) -> None:
    with recording_server() as other:
        head = [f"HTTP/1.1 {status} x", f"Location: {other.url}/", "Content-Length: 0", "Connection: close"]
        moved = "\r\n".join([*head, "", ""]).encode()
        with recording_server(moved) as service, pytest.raises(UnexpectedAnswer):
            ask(kind, service.url, token=TOKEN)

    assert other.requests == []


MIGRATE = ("migrate", "transit", "--key", "k", "--vault-address")
SENDS_A_SECRET: dict[str, Callable[[str, Path], object]] = {
    "client": lambda url, _: Client(url, retries=0).wrap(FILE_KEY),
    "async client": lambda url, _: anyio.run(AsyncClient(url, retries=0).encrypt, FILE_KEY),
    "plugin, own service": lambda url, _: KeysOfTargets({"KMS_SERVICE_URL": url}).wrap(
        FILE_KEY, PluginTarget(None, Context())
    ),
    "plugin, service of the recipient": lambda url, _: KeysOfTargets({}).wrap(
        FILE_KEY, PluginTarget(None, Context(), url)
    ),
    "command": lambda url, file: run(["encrypt-file", str(file), "--url", url]),
    "migrate": lambda url, file: run([*MIGRATE, url, "--vault-token-file", str(file), str(file)]),
}


@pytest.mark.parametrize("send", SENDS_A_SECRET.values(), ids=SENDS_A_SECRET)
def test_no_byte_leaves_without_a_token_either(
    send: Callable[[str, Path], object], token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording_server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        with contextlib.suppress(ConfigurationError):  # as the client refuses; commands end with 78
            assert send("http://kms.invalid", token_file) == 78

    assert proxy.requests == []


# -- an address that is only the default -------------------------------------------------------------

SECRET = b"canary-3c1f"
STRANGERS = {
    "another service": b"HTTP/1.0 404 File not found\r\nContent-Length: 5\r\n\r\n<html",
    "one that is alive": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n",
    "another request id": b"HTTP/1.1 200 OK\r\nX-Request-ID: 1\r\nContent-Length: 3\r\n\r\nok\n",
    "an answer without an end": b"HTTP/1.1 200 OK\r\n\r\n" + bytes(100_000),
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
    "a proxy": b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
}


def encrypt(kind: Make, url: str) -> None:
    """One call with a secret and a token, to an address whose service is checked."""
    options = Options(token=TOKEN, retries=0, timeout_s=0.5, check_service=True)
    if kind is Client:
        with Client(url, **options) as kms:
            kms.encrypt(SECRET)
        return

    async def call() -> None:
        async with AsyncClient(url, **options) as kms:
            await kms.encrypt(SECRET)

    anyio.run(call)


@both
@pytest.mark.parametrize("answer", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_at_the_default_address_hears_no_secret(kind: Make, answer: bytes) -> None:
    with recording_server(answer) as stranger, pytest.raises((UnexpectedAnswer, Unavailable)):
        encrypt(kind, stranger.url)

    assert [request.split(b"\r\n")[0] for request in stranger.requests] == [b"GET /livez HTTP/1.1"]
    assert TOKEN.encode() not in stranger.requests[0]


@both
def test_a_silent_one_hears_no_secret(kind: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(Unavailable):
            encrypt(kind, f"http://127.0.0.1:{silent.getsockname()[1]}")
        connection, _ = silent.accept()
        with connection:
            heard = connection.recv(65536)

    assert heard.startswith(b"GET /livez HTTP/1.1\r\n")
    assert TOKEN.encode() not in heard


@both
def test_the_service_is_asked_once_by_each_client(kind: Make) -> None:
    """Without the credential."""
    with running() as service:
        encrypt(kind, service.url)
        probe, call = service.seen

    assert (probe.path, call.path) == ("/livez", "/api/v1/kms/encrypt")
    assert "authorization" not in probe.headers
    assert call.headers["authorization"] == f"Bearer {TOKEN}"


def test_a_named_address_is_trusted() -> None:
    assert ClientSettings.of(None, {}) == ClientSettings("http://localhost:8082", check_service=True)
    assert ClientSettings.of("http://localhost:8082", {}).check_service is False
    assert ClientSettings.of(None, {"check_service": False}).check_service is False


# -- command, plugin, migration ----------------------------------------------------------------------


def test_the_command_refuses_unless_told(token_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["status", "--url", "http://kms.invalid", "--token-file", str(token_file)]

    assert run(line) == 78
    assert "--allow-http" in capsys.readouterr().err
    assert run([*line, "--allow-http"]) == 69  # nothing answers there


def test_a_variable_tells_the_command(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["status", "--url", "http://kms.invalid", "--token-file", str(token_file)]

    monkeypatch.setenv("KMS_ALLOW_HTTP", "0")
    assert run(line) == 78
    monkeypatch.setenv("KMS_ALLOW_HTTP", "1")
    assert run(line) == 69


@pytest.mark.parametrize(
    ("said", "allowed"), [({}, False), ({"KMS_ALLOW_HTTP": "0"}, False), ({"KMS_ALLOW_HTTP": "1"}, True)]
)
def test_the_age_plugin_refuses_unless_told(token_file: Path, said: dict[str, str], *, allowed: bool) -> None:
    keys = KeysOfTargets({"KMS_SERVICE_URL": "http://kms.invalid", "KMS_TOKEN_FILE": str(token_file), **said})

    with pytest.raises(KmsError) as caught:
        keys.wrap(bytes(16), PluginTarget(None, Context()))

    assert isinstance(caught.value, ConfigurationError) is not allowed


def test_a_migration_refuses_to_send_the_other_token(
    token_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*MIGRATE, "http://vault.invalid:8200", "--vault-token-file", str(token_file)]) == 78
    assert "sent unencrypted to http://vault.invalid:8200" in capsys.readouterr().err
