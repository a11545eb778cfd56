"""Clients of both versions at work on one install, as programs of their own (``load_program.py``)."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kms_core.programs import tether
from support.service import Json
from support.versions.install import VERSIONS, Install, python_of
from support.waiting import until

PROGRAM: Final = Path(__file__).with_name("load_program.py")
END_S: Final = 150.0
"""For the last jobs of a client."""


@dataclass
class Client:
    """A client of one version. ``log`` has a line for each job that it has seen to its end."""

    version: str
    process: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def more(self, count: int) -> None:
        """Wait until so many more of its jobs have ended well."""
        expected = len(self.lines()) + count
        until(lambda: len(self.lines()) >= expected or self.process.poll() is not None, self._said)
        assert self.process.poll() is None, self._said()

    def end(self) -> Json:
        """Stop it, and return what it reports once its last job has ended."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(END_S) == 0, self._said()
        report: Json = json.loads(self.lines()[-1])
        return report

    def _said(self) -> str:
        return f"the client of {self.version}: {self.log.read_text()[-3000:]}"


@dataclass
class Clients:
    """A client of each version."""

    all: list[Client]

    def more(self, count: int = 4) -> None:
        """Wait until each has seen so many more jobs to their end."""
        for client in self.all:
            client.more(count)

    def end(self) -> list[Json]:
        """Stop all, and return what each reports."""
        return [client.end() for client in self.all]


@contextmanager
def clients(install: Install, url: str, folder: Path) -> Iterator[Clients]:
    """A client of each version for this address, until the end of the block."""
    host, made = install.any_host, Clients([])
    try:
        for version in VERSIONS:
            files = host.files / f"load of {version}"
            files.mkdir()
            argv = [str(python_of(version)), "-P", str(PROGRAM), url, str(files)]
            log = folder / f"load-{version}.log"
            environ = {"HOME": "/nonexistent", "PATH": host.environ["PATH"]}
            with log.open("wb") as output:
                process = tether.spawn(argv, env=environ, output=output)
            made.all.append(Client(version, process, log))
        yield made
    finally:
        for client in made.all:
            client.process.kill()
            client.process.wait()
