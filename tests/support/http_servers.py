"""Small HTTP servers on loopback: a handler that logs nothing, and the block in which it is served."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class QuietHandler(BaseHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class names it so
        """Say nothing."""

    def reply(self, status: int, body: bytes = b"", content_type: str = "", location: str = "") -> None:
        """Send a whole answer."""
        self.send_response(status)
        for name, value in (("Content-Type", content_type), ("Location", location)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Files(QuietHandler, SimpleHTTPRequestHandler):
    pass


class _Server(ThreadingHTTPServer):
    tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[socket.socket, object]:
        plain, address = super().get_request()
        if self.tls is None:
            return plain, address
        return self.tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- as the base class
        """A client that does not trust us hangs up: no words on that."""
        if self.tls is None:
            super().handle_error(request, client_address)


@contextmanager
def served(
    handler: Callable[..., BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """The port at which the handler is served until the end of the block, over HTTPS if ``tls`` is given."""
    with _Server(("127.0.0.1", 0), handler) as running:
        running.tls = tls
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield running.server_port
        finally:
            running.shutdown()
            thread.join()


@contextmanager
def served_files(folder: Path) -> Iterator[str]:
    """The URL at which the files of a folder are served; its listing of a folder is a page of links."""
    with served(partial(_Files, directory=str(folder))) as port:
        yield f"http://127.0.0.1:{port}"
