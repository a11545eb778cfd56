"""An install of several workers for storms: every process can be killed, frozen or asked to stop by name.

Everything here is called from the main thread: the kernel kills a program when the thread that started it
ends (``kms_core.programs.tether``).
"""

import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from kms_core.programs import tether
from kms_core.programs.liveness import is_alive
from support.chaos.job_mix import REMOTE
from support.frozen_disk import FrozenDisk
from support.openbao import Bao
from support.ports import free_port
from support.service import PROGRAMS, STOP_S, Service
from support.tcp_proxy import TcpProxy
from support.waiting import until

_SHIM: Final = '''\
"""A clock that a test moves: ``time.time`` alone, for Debian's faketime would move the monotonic one too."""
import mmap, os, struct, time

_real = time.time
_memory = mmap.mmap(os.open(os.environ["STORM_CLOCK"], os.O_RDONLY), 8, prot=mmap.PROT_READ)
time.time = lambda: _real() + struct.unpack_from("d", _memory)[0]
'''


class Clock:
    """How far the wall clock of some processes is off, in seconds; they see a change at once."""

    def __init__(self, folder: Path) -> None:
        self.shims = folder / "shims"
        self.path = folder / "clock"
        self.shims.mkdir()
        (self.shims / "sitecustomize.py").write_text(_SHIM)
        self.path.write_bytes(bytes(8))
        with self.path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)

    def shift(self, seconds: float) -> None:
        struct.pack_into("d", self._memory, 0, seconds)

    @property
    def environ(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.shims), "STORM_CLOCK": str(self.path)}


class Peer:
    """A server that holds a key, behind a relay: it can be out of reach, or reached and silent."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.server = Bao(folder)
        self.relay = TcpProxy(self.server.port)
        self.token_file = folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(self.server.token())
        self.key = self.server.new_key()

    @property
    def settings(self) -> str:
        transit = f'[kms.transit]\naddress = "{self.relay.url}"\ntoken_file = "{self.token_file}"\n'
        return f'{transit}[kms.keys]\n{REMOTE} = "transit:{self.key}"\n'

    @contextmanager
    def out_of_reach(self) -> Iterator[None]:
        self.relay.cut()
        try:
            yield
        finally:
            self.relay.mend()

    @contextmanager
    def silent(self) -> Iterator[None]:
        pid = self.server._process.pid  # noqa: SLF001 -- nobody else wants it stopped
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        self.server.close()


class SupervisedByTest(Service):
    """An install whose supervisor is the test."""

    def restart_dead(self) -> None:
        """Start again what ended by itself."""
        raise NotImplementedError


class Cluster(SupervisedByTest):
    """An API and workers 1 to ``workers``; the clock of the last one can be moved.

    ``disk`` is that of the files, where it can hang. ``unexpected_exits`` counts how processes ended
    that nobody here had told to.
    """

    def __init__(self, folder: Path, settings: str, workers: int, peer: Peer) -> None:
        super().__init__(folder, settings + peer.settings)
        self.peer = peer
        self.disk: FrozenDisk | None = None
        self.workers = [f"worker{number}" for number in range(1, workers + 1)]
        self.clock = Clock(folder)
        self.unexpected_exits: Counter[str] = Counter()
        self._ports = {name: free_port() for name in self.workers}

    def launch(self) -> Self:
        """Start the API and every worker; wait for the API alone."""
        for name in ("api", *self.workers):
            self.spawn(name)
        return self.wait_until_up()

    def wait_until_up(self) -> Self:
        """Wait until the API answers, whatever died."""

        def is_up() -> bool:
            self.restart_dead()
            return is_alive("127.0.0.1", self.port)

        until(is_up, "the API is up")
        return self

    def spawn(self, name: str) -> None:
        more: dict[str, str] = {}
        if name in self.workers:
            more["KMS_PORT"] = str(self._ports[name])
        if name == self.workers[-1]:
            more |= self.clock.environ
        argv = [sys.executable, "-P", "-m", PROGRAMS[name.rstrip("0123456789")]]
        with (self.logs / f"{name}.log").open("ab") as output:
            self._processes[name] = tether.spawn(argv, env=self.environ | more, output=output)

    def restart_dead(self) -> None:
        for name, process in list(self._processes.items()):
            status = process.poll()
            if status is not None:
                self.unexpected_exits[f"{name.rstrip('0123456789')} {status}"] += 1
                self.again(name)

    def again(self, name: str) -> None:
        """What is left of a process goes, and another takes its place."""
        if name in self._processes:
            with suppress(ProcessLookupError):
                self.kill(name)
            self._processes.pop(name, None)
        self.spawn(name)

    def pool_of(self, name: str) -> list[int]:
        """The pool processes of a worker; none while it starts or has died."""
        with suppress(FileNotFoundError, ProcessLookupError):
            return self.pool_pids(name)
        return []

    def hit(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def hit_all(self, name: str, number: signal.Signals) -> None:
        """A signal for a process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid(name), number)

    def ask_to_stop(self, name: str) -> None:
        """SIGTERM, and wait: what it had in hand is done or handed over."""
        self._processes[name].terminate()
        try:
            self._processes[name].wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.unexpected_exits[f"{name.rstrip('0123456789')} ignores SIGTERM"] += 1


def pause(rng: random.Random, longest_s: float) -> None:
    """A moment of random length, so that a fault falls anywhere."""
    time.sleep(rng.uniform(0, longest_s))
