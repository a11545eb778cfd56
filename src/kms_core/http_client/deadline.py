"""Connections for httpcore whose every wait ends at a deadline of the whole call, however slowly they drip.

httpcore bounds each read by itself, so a byte a second would never time out.
"""

import math
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import httpcore


class DeadlineTransport(httpcore.SyncBackend):
    """Makes connections; each wait of a call ends at the deadline of the thread that waits."""

    def __init__(self) -> None:
        self._clock = threading.local()

    @contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Bound this thread's waits (``time.monotonic``); an earlier bound around it holds on."""
        around: float = getattr(self._clock, "deadline", math.inf)
        self._clock.deadline = min(deadline, around)
        try:
            yield
        finally:
            self._clock.deadline = around

    def left(self, timeout: float | None = None) -> float:
        """Seconds that this thread may still wait. Raises httpcore.ReadTimeout if there are none."""
        deadline: float = self._clock.deadline
        left = deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout
        return left if timeout is None else min(timeout, left)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Try each address of the host; one that never answers leaves the others their share of the time."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as exc:  # gaierror is one; UnicodeError cannot be, settings are ASCII
            raise httpcore.ConnectError(exc.strerror) from exc
        last: httpcore.ConnectError | httpcore.ConnectTimeout | None = None
        for tried, (*_, address) in enumerate(found):
            share = self.left(timeout) / (len(found) - tried)
            try:
                stream = super().connect_tcp(str(address[0]), port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                last = exc
            else:
                return _DeadlineConnection(stream, self)
        raise last or httpcore.ConnectError


class _DeadlineConnection(httpcore.NetworkStream):
    """A connection of ``DeadlineTransport``."""

    def __init__(self, stream: httpcore.NetworkStream, network: DeadlineTransport) -> None:
        self._stream = stream
        self._network = network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._network.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._network.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._network.left(timeout))
        return _DeadlineConnection(stream, self._network)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)
