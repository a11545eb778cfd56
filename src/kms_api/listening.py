"""The port: taken once, by the process that serves or by the leader of several."""

import socket
import sys
from typing import Final

_BACKLOG: Final = 2048


def listen(bind: str, port: int) -> socket.socket | None:
    """A listening socket; None, and why on standard error, if the port is not free or not ours."""
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((bind, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        sys.stderr.write(
            f"kms-service: error: {bind} port {port} is taken or not ours: "
            "stop the other process, or set KMS_PORT\n"
        )
        return None
    return listener
