"""Servers on loopback whose connections a function serves, byte by byte."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Scripted:
    """A server that runs ``serve`` on each connection, in a thread of its own, and then closes it."""

    def __init__(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        self._listener, self._serve = listener, serve
        self.connections = 0
        self.closed = threading.Semaphore(0)
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.url = f"http://{self.address}"

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.settimeout(10)
            self._serve(connection)
        self.closed.release()


@contextmanager
def scripted(serve: Callable[[socket.socket], None]) -> Iterator[Scripted]:
    """Such a server until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Scripted(listener, serve)
        thread = threading.Thread(target=made.accept, daemon=True)
        thread.start()
        yield made
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
