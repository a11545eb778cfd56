"""One install whose processes are of two versions: one state folder, one Valkey, hosts of either version."""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import httpx2 as httpx

from kms_core.programs import tether
from support.cli.doctor import DoctorReport, told_by
from support.service import PROGRAMS, Json, Service
from support.versions.yesterday import yesterdays_python

YESTERDAY: Final = "yesterday"
TODAY: Final = "today"
VERSIONS: Final = (YESTERDAY, TODAY)
ENDS: Final = {"worker": 0, "api": -signal.SIGTERM}
"""How programs end after SIGTERM."""
HELD_WORKER: Final = Path(__file__).with_name("held_worker.py")


def python_of(version: str) -> Path:
    """The Python that has this version installed."""
    return yesterdays_python() if version == YESTERDAY else Path(sys.executable)


@functools.cache
def number_of(version: str) -> str:
    """The number that this version has, as it says itself."""
    argv = [str(python_of(version)), "-P", "-c", "import kms_protocol; print(kms_protocol.__version__)"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


class Host(Service):
    """An API and a worker with ports of their own. ``versions`` says which one each is at its next start."""

    def __init__(self, folder: Path, settings: str, redis: str, name: str) -> None:
        super().__init__(folder, settings, redis)
        self.name = name
        self.logs = folder / "output" / name
        self.logs.mkdir()
        self.versions = dict.fromkeys(PROGRAMS, name if name in VERSIONS else YESTERDAY)
        self.steps: Path | None = None
        """The folder of ``held_worker.py``, if the next worker is that."""
        self.started: dict[int, str] = {}
        """The version of each process that was started, by its pid."""
        self._pythons = {version: python_of(version) for version in VERSIONS}

    def _check(self, answer: httpx.Response) -> None:
        if self.versions["api"] == TODAY:  # the document is today's
            super()._check(answer)

    def spawn(self, name: str) -> None:
        version = self.versions[name]
        program = (
            [str(HELD_WORKER), str(self.steps)] if name == "worker" and self.steps else ["-m", PROGRAMS[name]]
        )
        argv = [str(self._pythons[version]), "-P", *program]
        with (self.logs / f"{name}.log").open("ab") as output:
            self._processes[name] = tether.spawn(argv, env=self.environ, output=output)
        self.started[self.pid(name)] = version

    def kill(self, name: str) -> None:
        self._note_pool(name)
        super().kill(name)

    def stop(self, name: str) -> int:
        self._note_pool(name)
        return super().stop(name)

    def _note_pool(self, name: str) -> None:
        self.started |= dict.fromkeys(self.pool_pids(name), self.versions[name])

    @property
    def running(self) -> list[str]:
        """The names of its processes that were started and not ended."""
        return list(self._processes)

    def drain(self, name: str) -> None:
        """End a process by SIGTERM. Raises AssertionError unless it ends as it should."""
        assert self.stop(name) == ENDS[name], self.output(name)

    def replace(self, name: str, version: str) -> None:
        """Drain a process, and start the one of this version in its place."""
        self.drain(name)
        self.versions[name] = version
        self.start(name)

    def metrics(self, name: str) -> str:
        """The metrics of ``api`` or ``worker``, as Prometheus has them."""
        port = self.port + (name == "worker")
        return self.http.get(f"http://127.0.0.1:{port}/metrics").text

    def doctor(self) -> DoctorReport:
        """What ``kms doctor`` of today says of this API."""
        return told_by(self.run_kms("doctor", "--json", KMS_SERVICE_URL=self.url))

    def verified(self, version: str) -> Json:
        """What ``kms audit verify`` of a version says of the log; its exit code is 0."""
        argv = [str(self._pythons[version]), "-P", "-m", "kms_cli.main", "audit", "verify", "--json"]
        done = subprocess.run(
            argv, env=self.environ, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return cast("Json", json.loads(done.stdout))


@dataclass(frozen=True)
class Install:
    """Hosts by their names; all have the same state folder."""

    hosts: dict[str, Host]

    @property
    def any_host(self) -> Host:
        return next(iter(self.hosts.values()))

    def output(self) -> str:
        """What all processes printed."""
        return "".join(host.output() for host in self.hosts.values())

    def audit_lines(self) -> Iterator[Json]:
        """The lines of all chains, each with the version of the process that wrote it as ``version``."""
        started = {pid: version for host in self.hosts.values() for pid, version in host.started.items()}
        for path in sorted((self.any_host.state / "audit").glob("*.jsonl")):
            pid = int(path.name.rsplit(".", 2)[0].rpartition("-")[2])
            for line in path.read_text().splitlines():
                yield json.loads(line) | {"version": started.get(pid, "")}

    def stop(self) -> None:
        """Drain every process."""
        for host in self.hosts.values():
            for name in host.running:
                host.drain(name)


@contextmanager
def install(folder: Path, settings: str, redis: str, *names: str) -> Iterator[Install]:
    """An install without processes; a host that is named for a version begins with that."""
    with ExitStack() as stack:
        hosts = {name: stack.enter_context(Host(folder, settings, redis, name)) for name in names}
        yield Install(hosts)
