"""An issuer's key endpoint costs a bounded time and memory, whatever it sends."""

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from kms_core.auth.key_endpoint import ERRORS, fetching

HEAD = b"HTTP/1.1 200 OK\r\n"


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
            time.sleep(every_s)

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
def test_an_answer_that_drips_ends_in_time(head: bytes, piece: bytes) -> None:
    with serving(dripping(head, piece)) as (url, _):
        begun = time.monotonic()
        with pytest.raises(ERRORS):
            fetching(None, within_s=1.0)(url)

        assert time.monotonic() - begun < 5


def test_an_answer_that_was_compressed_is_refused_unread() -> None:
    bomb = gzip.compress(bytes(8 * 1024 * 1024))
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    with (
        serving(lambda connection: connection.sendall(head + bomb)) as (url, _),
        pytest.raises(ValueError, match="compressed its answer"),
    ):
        fetching(None)(url)


def test_an_answer_above_256_kib_is_refused() -> None:
    answer = HEAD + b"\r\n" + bytes(256 * 1024 + 1)
    with (
        serving(lambda connection: connection.sendall(answer)) as (url, _),
        pytest.raises(ValueError, match="above 256 KiB"),
    ):
        fetching(None)(url)


def test_the_request_asks_for_json_as_it_is() -> None:
    answer = HEAD + b"Content-Length: 2\r\n\r\n{}"
    with serving(lambda connection: connection.sendall(answer)) as (url, requests):
        assert fetching(None)(url) == b"{}"

    lines = requests[0].lower().split(b"\r\n")
    assert lines[0] == b"get /keys?a=b http/1.1"
    assert b"accept-encoding: identity" in lines
    assert b"host: " + url.encode().split(b"/")[2] in lines


def test_a_redirect_is_not_followed() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"
    with (
        serving(lambda connection: connection.sendall(answer)) as (url, _),
        pytest.raises(ValueError, match="did not answer 200"),
    ):
        fetching(None)(url)


def test_a_proxy_of_the_environment_is_used_unless_no_proxy_names_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = HEAD + b"Content-Length: 2\r\n\r\n{}"
    with serving(lambda connection: connection.sendall(answer)) as (url, requests):
        monkeypatch.setenv("http_proxy", url.removesuffix("/keys?a=b"))
        monkeypatch.setenv("no_proxy", "direct.invalid")
        with pytest.raises(ERRORS):
            fetching(None)("http://direct.invalid/keys")
        assert fetching(None)("http://keys.invalid/keys") == b"{}"

    assert requests[0].startswith(b"GET http://keys.invalid/keys HTTP/1.1\r\n")
