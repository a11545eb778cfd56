"""A fetch of an issuer's keys costs a bounded time and memory, whatever the issuer sends."""

import gzip
import socket
from typing import Final

import pytest

from kms_core.auth import jwks
from kms_protocol.errors import BackendUnavailable
from support.contract.faults import Fault, answer, faulty, floods
from support.waiting import RealTime

HEAD: Final = b"HTTP/1.1 200 OK\r\n"
GOOD: Final = answer(200, b"{}")


def fetch(url: str) -> bytes:
    return jwks.fetch(url, None, "kms.auth.issuers.corp.jwks_url")


def dripping(head: bytes, piece: bytes) -> Fault:
    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            RealTime.sleep(0.1)

    return drip


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"", b"H"),
        (HEAD, b"X"),
        (HEAD, b"X: y\r\n"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b" "),
    ],
    ids=["status line", "header name", "header lines", "103 responses", "body"],
)
def test_an_answer_that_drips_ends_in_time(
    head: bytes, piece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "_WITHIN_S", 1.0)
    with faulty(dripping(head, piece)) as server:
        begun = RealTime.now_s()
        with pytest.raises(BackendUnavailable):
            fetch(server.url)

        assert RealTime.now_s() - begun < 5


def test_an_answer_that_was_compressed_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(8 * 1024 * 1024))
    with faulty(answer(200, bomb, "Content-Encoding: gzip")) as server:
        assert fetch(server.url) == bomb

    with pytest.raises(ValueError, match="not a JSON Web Key Set"):
        jwks.parse(bomb)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (floods, "more than 1048576 bytes"),
        (answer(404, b"{}"), "404"),
        (answer(503, b"{}"), "503"),
        (answer(302, b"{}", "Location: http://127.0.0.1:9/"), "a redirect"),
    ],
    ids=["large", "not found", "away", "redirect"],
)
def test_another_answer_is_not_used(other: Fault, told: str) -> None:
    with faulty(other) as server, pytest.raises(BackendUnavailable, match=told):
        fetch(server.url)


def test_the_request_asks_for_json_as_it_is() -> None:
    with faulty(GOOD) as server:
        assert fetch(server.url) == b"{}"

    lines = server.requests[0].lower().split(b"\r\n")
    assert b"accept-encoding: identity" in lines
    assert f"host: 127.0.0.1:{server.port}".encode() in lines


@pytest.mark.parametrize("path", ["/keys?a=b", "/keys/", "/keys/?a=b", "/a//keys", "/?a=b", "/"])
def test_the_path_is_asked_for_as_it_is(path: str) -> None:
    with faulty(GOOD) as server:
        fetch(server.url + path)

    assert server.requests[0].startswith(f"GET {path} HTTP/1.1\r\n".encode())


def test_a_proxy_of_the_environment_is_used_unless_no_proxy_names_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with faulty(GOOD) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "direct.invalid")
        with pytest.raises(BackendUnavailable):
            fetch("http://direct.invalid/keys")
        assert fetch("http://keys.invalid/keys") == b"{}"

    assert proxy.requests[0].startswith(b"GET http://keys.invalid/keys HTTP/1.1\r\n")
