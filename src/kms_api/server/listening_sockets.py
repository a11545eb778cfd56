"""The ports: taken once, by the process that serves or by the leader of several."""

import socket
import sys
from typing import Final

from kms_core.settings.model import KmsSection

_BACKLOG: Final = 2048
_COPIES: Final = 15


def ports(kms: KmsSection) -> list[socket.socket]:
    """A listening socket, and a second one where the façade has its own port.

    Empty, and why on standard error, if a port is not free or not ours.
    """
    wanted = {kms.port: "KMS_PORT"} | (
        {} if kms.facade.port is None else {kms.facade.port: "[kms.facade] port"}
    )
    taken: list[socket.socket] = []
    for port, setting in wanted.items():
        listener = _listen(kms.bind, port)
        if listener is None:
            sys.stderr.write(
                f"kms-service: error: {kms.bind} port {port} is taken or not ours: "
                f"stop the other process, or set {setting}\n"
            )
            return []
        taken.append(listener)
    return taken


def eager(listener: socket.socket, processes: int) -> list[socket.socket]:
    """The socket and copies of it, all to be served by one of so many processes.

    libuv takes one connection from each in a turn of the loop. With a single one, clients that come at once,
    as after a restart, are let in one by one between the requests of those before: the last of 64 waited for
    a second. Several processes need it less, and share callers more evenly without.
    """
    copies = _COPIES if processes == 1 else 0
    listener.settimeout(0)  # of all copies, other processes' too: one that waited would hold its loop
    return [listener, *(listener.dup() for _ in range(copies))]


def _listen(bind: str, port: int) -> socket.socket | None:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((bind, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        return None
    return listener
