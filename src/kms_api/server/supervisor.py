"""Several processes behind one port: the leader holds the socket, and starts again who dies."""

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Final

from kms_api.server import listening_sockets
from kms_core import secure_memory
from kms_core.programs.supervisor import Child, supervise
from kms_core.settings.model import Settings
from kms_protocol.errors import EXIT_UNAVAILABLE

_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
_SLOT: Final = (
    "PROMETHEUS_MULTIPROC_SLOT"  # see ``kms_core.observability.metrics``, which the leader does not load
)
_GRACE_S: Final = 25  # above what a process gives the calls that it is answering


def lead(settings: Settings, config: Path | None) -> int:
    """Run ``[kms.server] processes`` of them until a signal; the exit code (see ``supervise``)."""
    secure_memory.lock()  # its settings may hold a password; what serves tells whether it could be done
    listeners = listening_sockets.ports(settings.kms)
    if not listeners:
        return EXIT_UNAVAILABLE
    run_dir = settings.state_dir / "run"
    metrics = _emptied(run_dir / f"metrics-{socket.gethostname()}-{settings.kms.port}")
    handles = tuple(listener.fileno() for listener in listeners)
    numbers = range(1, settings.kms.server.processes + 1)
    children = [_child(number, handles, config, metrics) for number in numbers]
    return supervise(children, pid_dir=run_dir, on_ready=lambda: None)


def _child(number: int, handles: tuple[int, ...], config: Path | None, metrics: Path) -> Child:
    inherited = [word for handle in handles for word in ("--listener", str(handle))]
    named = () if config is None else ("--config", str(config))
    places = {_FOLDER: str(metrics), _SLOT: f"api-{number}"}
    return Child(
        f"api-{number}",
        (sys.executable, "-P", "-m", "kms_api.main", *inherited, *named),
        ready=lambda: True,  # the port is open already: callers wait rather than being refused
        env={**os.environ, **places},
        grace_s=_GRACE_S,
        pass_fds=handles,
    )


def _emptied(folder: Path) -> Path:
    """What killed predecessors left would be counted again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    return folder
