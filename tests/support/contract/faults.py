"""A server on loopback that answers every request with one fault, and remembers what it was asked.

It speaks HTTP/1.1 by hand, since half an answer is what no server library gives.
"""

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from support.ports import free_port

CANARY: Final = "canary-in-the-answer"
"""Stands in every body: no error may hold it."""

PAGE: Final = f"<html><body><h1>It works!</h1>{CANARY}</body></html>".encode()
_DRIP_S: Final = 0.02
_MAX_REQUEST: Final = 65536
Fault = Callable[[socket.socket], None]
"""What to do with a connection on which a request has come; it is closed after that."""


@dataclass
class Faulty:
    """The server. ``requests`` are the heads and bodies that came, ``hung_up`` is set once a client did."""

    fault: Fault
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    hung_up: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    is_tls: bool = False

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}" if self.is_tls else f"http://127.0.0.1:{self.port}"


@contextmanager
def faulty(fault: Fault, tls: ssl.SSLContext | None = None) -> Iterator[Faulty]:
    """``tls`` makes its address ``https://localhost``."""
    server = Faulty(fault, is_tls=tls is not None)
    open_connections: list[socket.socket] = []

    def serve(raw: socket.socket) -> None:
        with (
            raw,
            suppress(ssl.SSLError),
            tls.wrap_socket(raw, server_side=True) if tls else raw as connection,
        ):
            try:
                while request := _request(connection):
                    server.requests.append(request)
                    server.fault(connection)
            except OSError:
                server.hung_up.set()
            else:
                server.hung_up.set()

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                open_connections.append(connection)
                server.connections += 1
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.port = listener.getsockname()[1]
        thread = threading.Thread(target=accept, args=(listener,), daemon=True)
        thread.start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in open_connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _request(connection: socket.socket) -> bytes:
    """Head and body of the next request; empty when the client has hung up."""
    request = b""
    while b"\r\n\r\n" not in request:
        piece = connection.recv(_MAX_REQUEST)
        if not piece:
            return b""
        request += piece
    head, _, body = request.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    missing = int(lengths[0].split(b":")[1]) - len(body) if lengths else 0
    while missing > 0:
        piece = connection.recv(_MAX_REQUEST)
        request, missing = request + piece, missing - len(piece)
    return request


# -- faults ------------------------------------------------------------------------------------------


def answer(status: int, body: bytes = PAGE, *headers: str) -> Fault:
    """A complete answer."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers]
    return lambda connection: connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def silent(connection: socket.socket) -> None:
    """No answer, until the client hangs up."""
    connection.recv(1)


def hangs_up(connection: socket.socket) -> None:
    """No answer, but an end."""
    connection.shutdown(socket.SHUT_RDWR)


def resets(connection: socket.socket) -> None:
    """A reset in the middle of the body."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + PAGE)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def cuts(connection: socket.socket) -> None:
    """An orderly end in the middle of the body."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + PAGE)
    connection.shutdown(socket.SHUT_RDWR)


def drips_head(connection: socket.socket) -> None:
    """A header that goes on for ever, byte by byte: each read of the client's succeeds in time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    _drip(connection)


def drips_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    _drip(connection)


def floods(connection: socket.socket) -> None:
    """A body without end, as fast as it goes."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = PAGE * 500
    while True:
        connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))


def floods_head(connection: socket.socket) -> None:
    """Headers without end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Canary: " + PAGE * 100 + b"\r\n")


def speaks_ssh(connection: socket.socket) -> None:
    """Another protocol altogether, whose server takes our request for a bad greeting."""
    connection.sendall(b"SSH-2.0-OpenSSH_9.9 " + CANARY.encode() + b"\r\n")
    connection.shutdown(socket.SHUT_RDWR)


def _drip(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"a")
        time.sleep(_DRIP_S)


def unused_url() -> str:
    """An address where nobody listens."""
    return f"http://127.0.0.1:{free_port()}"
