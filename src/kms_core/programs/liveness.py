"""Asks a server whether it is alive: for ``kms up``, its commands, and the health check of a container."""

import http.client
import ssl
from http import HTTPStatus
from typing import Final

_TIMEOUT_S: Final = 0.5


def reachable(bind: str) -> str:
    """Return the address for connections from this machine to a server bound to ``bind``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)  # noqa: S104  # not for binding


def is_alive(
    host: str, port: int, *, tls: bool = False, path: str = "/livez", timeout_s: float = _TIMEOUT_S
) -> bool:
    """Return whether GET of the path answers 200. A server that requires a client certificate is alive."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    if tls:
        unverified = ssl._create_unverified_context()  # noqa: S323, SLF001 -- no secret is sent
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=unverified)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == HTTPStatus.OK
    except http.client.RemoteDisconnected:  # after the handshake: the server requires a certificate
        return tls
    except ssl.SSLError as exc:
        return "CERTIFICATE_REQUIRED" in str(exc)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
