"""Small HTTP servers on loopback: a handler that logs nothing, and the block in which it is served."""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class QuietHandler(BaseHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class names it so
        """Say nothing."""

    def reply(self, status: int, body: bytes = b"", content_type: str = "") -> None:
        """Send a whole answer."""
        self.send_response(status)
        if content_type:
            self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Files(QuietHandler, SimpleHTTPRequestHandler):
    pass


@contextmanager
def served(
    handler: Callable[..., BaseHTTPRequestHandler],
    port: int = 0,
    server: type[ThreadingHTTPServer] = ThreadingHTTPServer,
    tls: ssl.SSLContext | None = None,
) -> Iterator[int]:
    """The port at which the handler is served until the end of the block, over HTTPS if ``tls`` is given."""
    with server(("127.0.0.1", port), handler) as running:
        if tls:  # the handshake belongs to the thread of the connection, not to the one that accepts
            running.socket = tls.wrap_socket(running.socket, server_side=True, do_handshake_on_connect=False)
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
