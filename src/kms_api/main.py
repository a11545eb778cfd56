"""The ``kms-service`` program: load settings, check the exposure, take the port, serve."""

import argparse
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Final

import uvicorn

from kms_api import app, tls
from kms_core import keyring, logs, settings
from kms_core.errors import EXIT_CONFIGURATION, EXIT_UNAVAILABLE, ConfigurationError

_GRACE_S: Final = 20
_BACKLOG: Final = 2048


def main() -> int:
    """Run until a signal. Exit codes: 78 wrong configuration, 69 port not free."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold keys
    try:
        loaded = settings.load(_arguments().config, os.environ)
        logs.configure(loaded.kms.log.level, json=loaded.kms.log.as_json(terminal=sys.stderr.isatty()))
        settings.check_exposure(loaded)
        keyring.check(loaded)
        built = app.build(loaded)
        context = tls.context(loaded.kms.server, strict=loaded.is_prod)
    except ConfigurationError as exc:
        sys.stderr.write(f"kms-service: error: {exc.detail}\n")
        return EXIT_CONFIGURATION
    listener = _listen(loaded.kms.bind, loaded.kms.port)
    if listener is None:
        sys.stderr.write(
            f"kms-service: error: {loaded.kms.bind} port {loaded.kms.port} is taken or not ours: "
            "stop the other process, or set KMS_PORT\n"
        )
        return EXIT_UNAVAILABLE
    config = uvicorn.Config(
        built,
        loop="uvloop",
        http=tls.PeerProtocol,  # httptools, and who is at the other end
        ssl_context_factory=None if context is None else lambda *_: context,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing here trusts a forwarded address
        timeout_graceful_shutdown=_GRACE_S,
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kms-service", description="The HTTP front of the KMS.")
    parser.add_argument("--config", type=Path, help="settings file (else KMS_CONFIG, else the usual places)")
    return parser.parse_args()


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


if __name__ == "__main__":
    sys.exit(main())
