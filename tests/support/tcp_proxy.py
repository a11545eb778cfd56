"""TCP relays on loopback: one that a test can cut, one that delays answers, and one to several servers."""

import queue
import socket
import threading
import time
from contextlib import suppress

from support.ports import free_port


class TcpProxy:
    """Forwards each connection to ``port``. While it is cut, connections are refused and open ones end."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.port = free_port()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._start()

    def __del__(self) -> None:
        self._listener.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        self._is_cut = True
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts; the port stays bound
        self._accepting.join()
        with self._lock:
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Nothing happens if it is whole."""
        if self._is_cut:
            self._listener.listen()
            self._start()

    def _start(self) -> None:
        self._is_cut = False
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = self._reach()
                except OSError:  # no server
                    near.close()
                    continue
                for each in (near, far):  # pieces go on as they come: Nagle would wait for acknowledgements
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._open |= {near, far}
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _reach(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._to))

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                target.sendall(piece)
        self._end(source, target)

    def _end(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
        with self._lock:
            if source not in self._open:  # the other direction was faster
                return
            self._open -= {source, target}
        source.close()
        target.close()


class BalancingProxy(TcpProxy):
    """Forwards connections to several ports in turn, and past one that refuses them."""

    def __init__(self, *ports: int) -> None:
        self._ports = list(ports)
        super().__init__(ports[0])

    def _reach(self) -> socket.socket:
        for _ in self._ports[1:]:
            self._to = self._ports.pop(0)
            self._ports.append(self._to)
            with suppress(ConnectionRefusedError):
                return super()._reach()
        self._to = self._ports[0]
        return super()._reach()


class LaggingProxy(TcpProxy):
    """Holds what the server sends for ``lag_s`` seconds. What it holds when the server dies is lost."""

    def __init__(self, port: int, lag_s: float) -> None:
        self._lag_s = lag_s
        super().__init__(port)

    def hold(self, lag_s: float) -> None:
        """Change the delay of what the server sends from now on."""
        self._lag_s = lag_s

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        if source.getsockname()[1] == self.port:  # from the client
            super()._pump(source, target)
            return
        held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        ended = threading.Event()
        late = threading.Thread(target=self._late, args=(held, target, ended), daemon=True)
        late.start()
        with suppress(OSError):
            while piece := source.recv(65536):
                held.put((time.monotonic() + self._lag_s, piece))
        ended.set()
        held.put((0.0, b""))
        late.join()
        self._end(source, target)

    @staticmethod
    def _late(
        held: queue.SimpleQueue[tuple[float, bytes]], target: socket.socket, ended: threading.Event
    ) -> None:
        with suppress(OSError):
            while True:
                due, piece = held.get()
                if not piece or ended.wait(max(0.0, due - time.monotonic())):
                    return
                target.sendall(piece)
