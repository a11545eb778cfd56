"""A fetch of an issuer's keys costs a bounded time and memory, whatever the issuer sends."""

import gzip
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final

import pytest

from kms_core.auth import jwt_verifier
from kms_protocol.errors import BackendUnavailable
from support.waiting import RealTime

HEAD: Final = b"HTTP/1.1 200 OK\r\n"
EMPTY: Final = b"\r\nContent-Length: 2\r\n\r\n{}"
GOOD: Final = HEAD.rstrip() + EMPTY


def fetch(url: str) -> bytes:
    return jwt_verifier.fetch(url, None, "kms.auth.issuers.corp.jwks_url")


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server for one connection: its URL, and the requests that it was sent."""
    requests: list[bytes] = []

    def serve() -> None:
        with listener, suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                requests.append(connection.recv(65536))
                answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/keys?a=b", requests
        finally:
            with suppress(OSError):  # for a server that was never asked
                socket.create_connection(listener.getsockname()).close()
            thread.join()


def dripping(head: bytes, piece: bytes, every_s: float = 0.1) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(200):
            connection.sendall(piece)
            RealTime.sleep(every_s)

    return answer


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
    monkeypatch.setattr(jwt_verifier, "_WITHIN_S", 1.0)
    with serving(dripping(head, piece)) as (url, _):
        begun = RealTime.now_s()
        with pytest.raises(BackendUnavailable):
            fetch(url)

        assert RealTime.now_s() - begun < 5


def answering(answer: bytes) -> AbstractContextManager[tuple[str, list[bytes]]]:
    return serving(lambda connection: connection.sendall(answer))


def test_an_answer_that_was_compressed_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(8 * 1024 * 1024))
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    with answering(head + bomb) as (url, _):
        assert fetch(url) == bomb

    with pytest.raises(ValueError, match="not a JSON Web Key Set"):
        jwt_verifier.parse(bomb)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (HEAD + b"\r\n" + bytes(1024 * 1024 + 1), "more than 1048576 bytes"),
        (b"HTTP/1.1 404 Not Found" + EMPTY, "404"),
        (b"HTTP/1.1 503 Service Unavailable" + EMPTY, "503"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/" + EMPTY, "a redirect"),
    ],
    ids=["large", "not found", "away", "redirect"],
)
def test_another_answer_is_not_used(answer: bytes, told: str) -> None:
    with answering(answer) as (url, _), pytest.raises(BackendUnavailable, match=told):
        fetch(url)


def test_the_request_asks_for_json_as_it_is() -> None:
    with answering(GOOD) as (url, requests):
        assert fetch(url) == b"{}"

    lines = requests[0].lower().split(b"\r\n")
    assert lines[0] == b"get /keys?a=b http/1.1"
    assert b"accept-encoding: identity" in lines
    assert b"host: " + url.encode().split(b"/")[2] in lines


@pytest.mark.parametrize("path", ["/keys/", "/keys/?a=b", "/a//keys", "/?a=b", "/"])
def test_the_path_is_asked_for_as_it_is(path: str) -> None:
    with answering(GOOD) as (url, requests):
        fetch(url.removesuffix("/keys?a=b") + path)

    assert requests[0].split(b" ", 2)[1].decode() == path


def test_a_proxy_of_the_environment_is_used_unless_no_proxy_names_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with answering(GOOD) as (url, requests):
        monkeypatch.setenv("http_proxy", url.removesuffix("/keys?a=b"))
        monkeypatch.setenv("no_proxy", "direct.invalid")
        with pytest.raises(BackendUnavailable):
            fetch("http://direct.invalid/keys")
        assert fetch("http://keys.invalid/keys") == b"{}"

    assert requests[0].startswith(b"GET http://keys.invalid/keys HTTP/1.1\r\n")
