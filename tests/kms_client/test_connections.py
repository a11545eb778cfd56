"""Connections of both clients: which are kept, how they end, and what proxies hear."""

import io
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from kms_client import Client, ServiceUnreachable
from kms_protocol import errors
from support.contract_server import ContractServer
from support.credentials import Authority
from support.scripted_servers import scripted
from support.waiting import RealTime, until

Connect = Callable[..., Client]
MIB = 1024 * 1024
HEALTHY = b'{"status":"healthy","backend":"age","checked_at":"2026-11-24T15:40:00Z"}'
TOO_LARGE = b'{"type":"urn:x","title":"t","status":413,"detail":"d","code":"too_large","request_id":"r"}'


def answer(body: bytes = HEALTHY, status: int = 200, *more: str, length: int | None = None) -> bytes:
    head = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body) if length is None else length}", *more]
    return "\r\n".join([*head, "", ""]).encode() + body


def head_of(connection: socket.socket) -> bytes:
    """The head of the next request, which has no body; empty at the end of the connection."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (data := connection.recv(1)):
        head += data
    return head


def replying(data: bytes, *, waits: bool = False) -> Callable[[socket.socket], None]:
    """Answer one request, and wait until the client closes the connection."""

    def serve(connection: socket.socket) -> None:
        head_of(connection)
        connection.sendall(data)
        if waits:
            head_of(connection)

    return serve


def keeping(connection: socket.socket) -> None:
    while head_of(connection):
        connection.sendall(answer())


CLOSING = replying(answer(HEALTHY, 200, "Connection: close"), waits=True)


@pytest.mark.parametrize(
    ("serve", "connections"),
    [(keeping, 1), (replying(answer()), 3), (CLOSING, 3)],
    ids=["kept", "closed by the service", "to be closed"],
)
def test_calls_share_a_connection_that_stays_open(
    connect: Connect, serve: Callable[[socket.socket], None], connections: int
) -> None:
    with scripted(serve) as service:
        kms = connect(service.url, retries=0)
        for _ in range(3):
            assert kms.health().backend == "age"
            assert connections == 1 or service.closed.acquire(timeout=10)
        assert service.connections == connections
        kms.close()


def test_threads_share_a_client(server: ContractServer) -> None:
    def call() -> None:
        found.extend(kms.status().backend for _ in range(20))

    found: list[str] = []
    with Client(server.url, retries=0) as kms:
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    assert len(found) == 160


def test_an_early_refusal_of_an_upload_is_read() -> None:
    def serve(connection: socket.socket) -> None:
        head_of(connection)
        connection.sendall(answer(TOO_LARGE, 413, "Connection: close"))
        connection.recv(1)  # what is left unread breaks the connection

    with (
        scripted(serve) as service,
        Client(service.url, retries=0) as kms,
        pytest.raises(errors.TooLarge),
    ):
        kms.upload_encrypt(io.BytesIO(bytes(32 * MIB)))


@pytest.mark.parametrize(
    "cut",
    [
        answer(HEALTHY, length=len(HEALTHY) + 1),
        b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}",
        b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
        b"HTTP/1.1 200 x\r\nContent-",
        b"no HTTP\r\n\r\n",
        b"",
    ],
    ids=["length", "chunk", "last chunk", "head", "no HTTP", "empty"],
)
def test_an_answer_that_breaks_off_is_told(connect: Connect, cut: bytes) -> None:
    with scripted(replying(cut)) as service, pytest.raises(ServiceUnreachable, match="broke"):
        connect(service.url, retries=0).health()


@pytest.mark.parametrize("begun", [b"", answer(HEALTHY, length=len(HEALTHY) + 1)], ids=["head", "body"])
def test_silence_is_told(connect: Connect, begun: bytes) -> None:
    with scripted(replying(begun, waits=True)) as service, pytest.raises(ServiceUnreachable, match="in time"):
        connect(service.url, retries=0, timeout_s=0.2).health()


def test_an_answer_that_may_take_long_is_waited_for(connect: Connect) -> None:
    def serve(connection: socket.socket) -> None:
        head_of(connection)
        RealTime.sleep(0.6)
        connection.sendall(answer(TOO_LARGE, 413))

    with scripted(serve) as service, pytest.raises(errors.TooLarge):
        connect(service.url, retries=0, timeout_s=0.2).job("j", wait_s=5)


def test_a_header_that_http_does_not_allow_is_not_sent(server: ContractServer) -> None:
    with Client(server.url) as kms, pytest.raises(errors.InvalidRequest, match="character"):
        kms.upload_encrypt(io.BytesIO(b"x"), idempotency_key="a\r\nX-KMS-Key-Id: other")

    assert not server.seen


# -- proxies -----------------------------------------------------------------------------------------

BASIC = b"Proxy-Authorization: Basic dTpw\r\n"  # u:p


def test_a_proxy_is_asked_for_the_whole_address(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        while head := head_of(connection):
            heard.append(head)
            connection.sendall(answer())

    with scripted(serve) as proxy:
        monkeypatch.setenv("http_proxy", f"http://u:p@{proxy.address}")
        kms = connect("http://kms.invalid/below", allow_http=True, retries=0)
        assert kms.health().backend == "age"
        kms.close()

    assert heard[0].startswith(b"GET http://kms.invalid/below/api/v1/kms/health HTTP/1.1\r\n")
    assert b"Host: kms.invalid\r\n" in heard[0]
    assert BASIC in heard[0]


def test_tls_goes_through_a_proxy_to_the_service(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The proxy hears the name of the service and its own credential, and nothing else."""
    authority = Authority(tmp_path)
    pair = authority.issue("server", x509.DNSName("kms.invalid"), server=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.cert, pair.key)
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heard.append(head_of(connection))
        connection.sendall(b"HTTP/1.1 200 x\r\n\r\n")
        with tls.wrap_socket(connection, server_side=True) as service:
            while head := head_of(service):
                heard.append(head)
                service.sendall(answer())

    with scripted(serve) as proxy:
        monkeypatch.setenv("https_proxy", f"http://u:p@{proxy.address}")
        kms = connect("https://kms.invalid", ca_file=authority.ca_file, token="tok", retries=0)
        for _ in range(2):
            assert kms.health().backend == "age"
        kms.close()

    assert heard[0].startswith(b"CONNECT kms.invalid:443 HTTP/1.")
    assert BASIC in heard[0]
    assert b"tok" not in heard[0]
    for head in heard[1:]:
        assert head.startswith(b"GET /api/v1/kms/health HTTP/1.1\r\n")
        assert BASIC not in head


def test_a_proxy_that_refuses_is_told(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its connection is closed, also while the error is kept."""
    received = list[bytes]()

    def serve(connection: socket.socket) -> None:
        head_of(connection)
        connection.sendall(answer(b"", 407))
        received.append(connection.recv(1))

    with scripted(serve) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with pytest.raises(ServiceUnreachable) as refused:
            connect("https://kms.invalid", retries=0).health()
        until(lambda: received, "the end of the connection")
    assert received == [b""]
    assert refused.value.code


def test_tls_within_tls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "https://p")

    with pytest.raises(errors.ConfigurationError, match="proxy"):
        Client("https://kms.example.com")
