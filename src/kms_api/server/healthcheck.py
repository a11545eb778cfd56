"""``python -m kms_api.server.healthcheck [worker]``: whether the API or the worker of this container answers.

Exit code 0 if it does. It checks ``/livez`` only: backends or Redis that do not answer (``/readyz``) are no
reason to restart a container.
"""

import http.client
import os
import socket
import ssl
import sys
from typing import Final

from kms_core.settings import load
from kms_core.settings.model import KmsSection
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_UNAVAILABLE, ConfigurationError

_TIMEOUT_S: Final = 4.0
_WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- compared with, not bound to


def main(words: list[str]) -> int:
    """Return 0 if it answers, 69 if not, 78 for wrong settings."""
    try:
        kms = load.load(load.for_command(None, os.environ, None, _say), os.environ).kms
    except ConfigurationError as exc:
        _say(f"error: {exc.detail}")
        return EXIT_CONFIGURATION
    try:
        alive = _answers(kms, worker="worker" in words)
    except (OSError, http.client.HTTPException):
        alive = False
    return 0 if alive else EXIT_UNAVAILABLE


def _say(text: str) -> None:
    sys.stderr.write(f"kms_api.server.healthcheck: {text}\n")


def _answers(kms: KmsSection, *, worker: bool) -> bool:
    host, port = _WILDCARDS.get(kms.bind, kms.bind), kms.port + 1 if worker else kms.port
    if kms.server.tls_cert is None or worker:  # the worker's metrics are plain HTTP
        return _livez(http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S))
    if kms.server.client_cert == "required":  # a probe has no certificate: an open port is enough
        with socket.create_connection((host, port), timeout=_TIMEOUT_S):
            return True
    context = ssl._create_unverified_context()  # noqa: S323, SLF001 -- its name is not that of the loopback
    return _livez(http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context))


def _livez(connection: http.client.HTTPConnection) -> bool:
    connection.request("GET", "/livez", headers={"Host": "localhost"})
    return connection.getresponse().status == http.HTTPStatus.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
