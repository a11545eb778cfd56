"""``python -m kms_api.server.healthcheck [worker]``: whether the API or the worker of this container answers.

Exit code 0 if it does. It checks ``/livez`` only: backends or Redis that do not answer (``/readyz``) are no
reason to restart a container.
"""

import os
import socket
import sys
from contextlib import suppress
from typing import Final

from kms_core.programs.liveness import is_alive, reachable
from kms_core.settings import files, load
from kms_core.settings.model import KmsSection
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_UNAVAILABLE, ConfigurationError

_TIMEOUT_S: Final = 4.0


def main(words: list[str]) -> int:
    """Return 0 if it answers, 69 if not, 78 for wrong settings."""
    try:
        kms = load.load(files.for_command(None, os.environ, None, _say), os.environ).kms
    except ConfigurationError as exc:
        _say(f"error: {exc.detail}")
        return EXIT_CONFIGURATION
    return 0 if _answers(kms, worker="worker" in words) else EXIT_UNAVAILABLE


def _say(text: str) -> None:
    sys.stderr.write(f"kms_api.server.healthcheck: {text}\n")


def _answers(kms: KmsSection, *, worker: bool) -> bool:
    host, port = reachable(kms.bind), kms.port + 1 if worker else kms.port
    with suppress(OSError):  # as Host a server accepts its address, and a name if the settings have it
        host = socket.gethostbyname(host)
    tls = kms.server.tls_cert is not None and not worker  # the worker's metrics are plain HTTP
    return is_alive(host, port, tls=tls, timeout_s=_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
