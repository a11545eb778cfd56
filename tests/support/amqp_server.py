"""What RabbitMQ answers to a client that publishes (AMQP 0-9-1), until a test makes it silent."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_END: Final = b"\xce"
_METHOD: Final = 1
_BODY: Final = 3
_START: Final = (10, 10), b"\x00\x09" + bytes(4) + b"\x00\x00\x00\x05PLAIN" + b"\x00\x00\x00\x05en_US"
_ANSWERS: Final = {
    (10, 11): ((10, 30), struct.pack(">HIH", 2047, 131072, 0)),  # start-ok: tune, without heartbeats
    (10, 40): ((10, 41), b"\x00"),  # open: open-ok
    (10, 50): ((10, 51), b""),  # close: close-ok
    (20, 10): ((20, 11), bytes(4)),  # channel: open
    (20, 40): ((20, 41), b""),  # channel: close
    (40, 10): ((40, 11), b""),  # exchange: declare
    (50, 10): ((50, 11), bytes(9)),  # queue: declare
    (50, 20): ((50, 21), b""),  # queue: bind
    (85, 10): ((85, 11), b""),  # confirm: select
}
"""The answer to each method: its class and number, and its arguments."""


class AmqpServer:
    """``published`` counts messages, which are confirmed while ``confirms`` is true."""

    def __init__(self, listener: socket.socket) -> None:
        self.url = f"amqp://guest:guest@127.0.0.1:{listener.getsockname()[1]}//"
        self.published = 0
        self.confirms = True
        self._listener = listener
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, near.makefile("rb") as frames, suppress(OSError, struct.error):
            frames.read(8)
            _send(near, 0, *_START)
            of_connection = 0
            while True:
                kind, channel, size = struct.unpack(">BHI", frames.read(7))
                payload = frames.read(size + 1)[:-1]
                if kind == _METHOD and (found := _ANSWERS.get(struct.unpack(">HH", payload[:4]))):
                    _send(near, channel, *found)
                if kind == _BODY:
                    self.published += 1
                    of_connection += 1
                    if self.confirms:
                        _send(near, channel, (60, 80), struct.pack(">QB", of_connection, 0))


def _send(near: socket.socket, channel: int, method: tuple[int, int], arguments: bytes) -> None:
    payload = struct.pack(">HH", *method) + arguments
    near.sendall(struct.pack(">BHI", _METHOD, channel, len(payload)) + payload + _END)


@contextmanager
def amqp_server() -> Iterator[AmqpServer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield AmqpServer(listener)
        listener.shutdown(socket.SHUT_RDWR)
