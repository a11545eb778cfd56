"""The ``kms-service`` program: loads settings, takes the port, and serves as one process or several.

Several processes share the port of their leader, which starts again those that die. The leader loads
neither routes nor the core.
"""

import argparse
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Final

from kms_core import secure_memory
from kms_core.observability import logs
from kms_core.programs.supervisor import Child, supervise
from kms_core.settings import files, lint, load
from kms_core.settings.model import KmsSection, Settings
from kms_core.settings.validation import check_exposure
from kms_protocol.errors import EXIT_CONFIGURATION, EXIT_OTHER, EXIT_UNAVAILABLE, ConfigurationError

_BACKLOG: Final = 2048
_GRACE_S: Final = 25  # more than a process gives the calls that it is answering


def main() -> int:
    """Run until a signal. Exit codes: 78 for wrong settings, 69 for a port that is not free."""
    arguments = parser().parse_args()
    try:
        secure_memory.forbid_dumps()
        file = files.for_server(arguments.config, os.environ)
        loaded = load.load(file, os.environ)
        logs.configure(loaded.kms.log.level, json=loaded.kms.log.as_json(terminal=sys.stderr.isatty()))
        check_exposure(loaded, file or files.MACHINE)
        if arguments.listener is None:  # else the leader has warned
            lint.warn(loaded)
            files.write_note(file, os.environ)
        if loaded.kms.server.processes > 1 and arguments.listener is None:
            return _lead(loaded, file)
        from kms_core.observability import multiprocess_metrics  # noqa: PLC0415 -- the leader has no metrics

        multiprocess_metrics.share(os.environ)
        from kms_api.server import process  # noqa: PLC0415 -- and serves no requests
        from kms_core import key_opening  # noqa: PLC0415 -- it declares metrics
        from kms_core.redis_client import check_servers  # noqa: PLC0415 -- as above

        if arguments.opened_keys is not None:
            key_opening.inherit(arguments.opened_keys)
        elif arguments.listener is None:
            key_opening.begin(loaded)
        check_servers(loaded.kms.redis)
        given = arguments.listener
        return process.serve(
            loaded, lambda: listen(loaded.kms) if given is None else socket.socket(fileno=given)
        )
    except (ConfigurationError, OSError) as exc:  # a full disk, a directory of another user
        sys.stderr.write(f"kms-service: error: {getattr(exc, 'detail', exc)}\n")
        return EXIT_CONFIGURATION if isinstance(exc, ConfigurationError) else EXIT_OTHER


def listen(kms: KmsSection) -> socket.socket | None:
    """A listening socket, or None, with the reason on standard error, if the port cannot be taken."""
    family = socket.AF_INET6 if ":" in kms.bind else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((kms.bind, kms.port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        sys.stderr.write(
            f"kms-service: error: {kms.bind} port {kms.port} cannot be taken: set KMS_PORT (for `kms up`: "
            f"--port), or find the process that holds it: ss -ltnp\n"
        )
        return None
    return listener


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="kms-service", description="The HTTP API of the KMS.")
    made.add_argument("--config", type=Path, help="settings file (else KMS_CONFIG, else the usual paths)")
    made.add_argument("--listener", type=int, help=argparse.SUPPRESS)
    made.add_argument("--opened-keys", type=int, help=argparse.SUPPRESS)
    return made


def _lead(settings: Settings, config: Path | None) -> int:
    """Run ``[kms.server] processes`` of them until a signal. Returns the exit code (see ``supervise``)."""
    from kms_core import key_opening  # noqa: PLC0415 -- few installs have sealed keys

    secure_memory.lock()  # the settings may hold a password; the children tell whether it could be done
    listener = listen(settings.kms)
    if listener is None:
        return EXIT_UNAVAILABLE
    run_dir = settings.state_dir / "run"
    metrics = run_dir / f"metrics-{socket.gethostname()}-{settings.kms.port}"
    shutil.rmtree(metrics, ignore_errors=True)  # counts of killed predecessors would be added again
    metrics.mkdir(mode=0o700, parents=True)
    numbers = range(1, settings.kms.server.processes + 1)
    keys = key_opening.begin(settings)  # None if none is sealed
    children = [_child(number, listener.fileno(), keys, config, metrics) for number in numbers]
    return supervise(children, pid_dir=run_dir, on_ready=lambda: None)


def _child(number: int, handle: int, keys: int | None, config: Path | None, metrics: Path) -> Child:
    inherited = ["--listener", str(handle), *(() if keys is None else ("--opened-keys", str(keys)))]
    name, settings = f"api-{number}", () if config is None else ("--config", str(config))
    # as ``kms_core.observability.multiprocess_metrics`` reads them, which the leader does not load
    multiprocess = {"PROMETHEUS_MULTIPROC_DIR": str(metrics), "PROMETHEUS_MULTIPROC_SLOT": name}
    return Child(
        name,
        (sys.executable, "-P", "-m", "kms_api.main", *inherited, *settings),
        ready=lambda: True,  # the port is open already: callers wait instead of being refused
        env={**os.environ, **multiprocess},
        grace_s=_GRACE_S,
        pass_fds=(handle,) if keys is None else (handle, keys),
    )


if __name__ == "__main__":
    sys.exit(main())
