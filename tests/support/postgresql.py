"""A PostgreSQL server of the tests' own, on a unix socket in its folder, without a port."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kms_core.programs import tether
from support.programs import program
from support.waiting import WAIT_S, until_up

_DEBIAN: Final = Path("/usr/lib/postgresql")
_SETTINGS: Final = {
    "listen_addresses": "",
    "fsync": "off",
    "dynamic_shared_memory_type": "mmap",  # files in its folder, not in /dev/shm
}


@contextmanager
def postgresql_environ(folder: Path) -> Iterator[dict[str, str]]:
    """Run a server with data in ``folder``. Yields the variables by which psql and pg_dump find it."""
    data, sockets = folder / "data", folder / "s"
    sockets.mkdir(mode=0o700, parents=True)
    environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(folder), "TZ": "UTC"}
    made = [*_as_user(), _program("initdb"), "--auth=trust", "--username=app", "--no-sync", str(data)]
    subprocess.run(made, env=environ, check=True, capture_output=True)
    settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
    tied = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid())]
    argv = [*_as_user(), *tied, _program("postgres"), "-D", str(data), "-k", str(sockets), *settings]
    with (folder / "output").open("wb") as output:
        server = subprocess.Popen(argv, env=environ, stdout=output, stderr=output)
    clients = {"PGHOST": str(sockets), "PGUSER": "app"}
    try:
        until_up(server, lambda: _answers(environ | clients), (folder / "output").read_text)
        yield clients
    finally:
        server.send_signal(signal.SIGINT)  # the fast shutdown, which leaves no shared memory
        server.wait(WAIT_S)


def _as_user() -> list[str]:
    """What lets root run the programs, which refuse that: a user namespace, where root has another number."""
    return [program("unshare"), "--user", "--map-user=1000", "--"] if os.geteuid() == 0 else []


def _program(name: str) -> str:
    """A program of the server, which Debian has in a folder for each version and not on the PATH."""
    found = sorted(_DEBIAN.glob(f"*/bin/{name}"))
    return str(found[-1]) if found else program(name)


def _answers(environ: dict[str, str]) -> bool:
    asked = [program("psql"), "--dbname=postgres", "--command=SELECT 1"]
    return subprocess.run(asked, env=environ, capture_output=True, check=False).returncode == 0
