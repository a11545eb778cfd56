"""What goes wrong in a storm, by name. Every blow leaves all processes running again, or being started."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from chaos.crowd import Crowd
from chaos.fleet import Fleet, pause
from kms_api import broker
from kms_core.jobs.model import QUEUES
from kms_protocol.errors import JobsUnavailable

DAY_S: Final = 24 * 3600.0
_MIB: Final = 1024 * 1024
_ECHOES: Final = 5


class Weather:
    """``blows`` are counted by name in ``struck``. ``disk`` is the spool's own file system, if it has one."""

    def __init__(self, fleet: Fleet, crowd: Crowd, rng: random.Random, *, outage_s: float) -> None:
        self.fleet = fleet
        self.crowd = crowd
        self.struck: Counter[str] = Counter()
        self._rng = rng
        self._outage_s = outage_s
        self.blows: dict[str, Callable[[], None]] = {
            "child": self._child,
            "worker": self._worker,
            "api": self._api,
            "valkey": self._valkey,
            "all": self._all,
            "roll": self._roll,
            "flood": self._flood,
            "echo": self._echo,
            "clock": self._clock,
            "full": self._full,
            "outage": self._outage,
            "freeze": self._freeze,
            "cut": self._cut,
            "silence": self._silence,
        }

    def strike(self, name: str) -> None:
        self.blows[name]()
        self.struck[name] += 1

    # -- deaths --------------------------------------------------------------------------------------

    def _child(self) -> None:
        """One process of a pool, in the middle of whatever it does."""
        children = self.fleet.pool_of(self._rng.choice(self.fleet.workers))
        if children:
            self.fleet.hit(self._rng.choice(children))

    def _worker(self) -> None:
        """The parent first; its orphans run on for a moment."""
        name = self._rng.choice(self.fleet.workers)
        self.fleet.hit(self.fleet.pid(name))
        pause(self._rng, 0.3)
        self.fleet.again(name)

    def _api(self) -> None:
        self.fleet.again("api")

    def _valkey(self) -> None:
        self.fleet.hit(self.fleet.valkey.pid)
        pause(self._rng, 0.5)
        self.fleet.valkey.start()

    def _all(self) -> None:
        """Everything at the same moment, as a machine that loses its processes."""
        self.fleet.hit(self.fleet.valkey.pid)
        for name in ("api", *self.fleet.workers):
            self.fleet.hit_all(name, signal.SIGKILL)
        self.fleet.valkey.start()
        for name in ("api", *self.fleet.workers):
            self.fleet.again(name)

    def _roll(self) -> None:
        """A new release: workers are asked to stop, one after the other."""
        for name in self.fleet.workers:
            self.fleet.ask_to_stop(name)
            self.fleet.again(name)

    def _flood(self) -> None:
        """No worker, and the queue fills; the broker dies with it full."""
        for name in self.fleet.workers:
            self.fleet.hit_all(name, signal.SIGKILL)
        before, deadline = len(self.crowd.tickets), time.monotonic() + 5
        while len(self.crowd.tickets) < before + 10 and self.crowd.busy and time.monotonic() < deadline:
            time.sleep(0.05)
        self._valkey()
        for name in self.fleet.workers:
            self.fleet.again(name)

    def _freeze(self) -> None:
        """A worker stops for longer than its lease, is written off, and wakes up believing in it."""
        name = self._rng.choice(self.fleet.workers)
        self.fleet.hit_all(name, signal.SIGSTOP)
        time.sleep(self.fleet.settings.kms.jobs.lease_s + 1.5)
        self.fleet.hit_all(name, signal.SIGCONT)

    # -- confusion -----------------------------------------------------------------------------------

    def _echo(self) -> None:
        """Messages that were delivered are delivered again, to any queue."""
        line = broker.connect(self.fleet.settings.kms.redis)
        for _ in range(_ECHOES):
            job_id = self.crowd.some_job(self._rng)
            for _ in range(self._rng.randint(2, 4)):
                if job_id:
                    with suppress(JobsUnavailable):
                        line.nudge(job_id, self._rng.choice(QUEUES))

    def _clock(self) -> None:
        """A worker's clock is a day ahead, then a day behind, then right."""
        for shift in (DAY_S + 3600, -DAY_S - 3600, 0.0):
            self.fleet.clock.shift(shift)
            time.sleep(2.5)

    def _full(self) -> None:
        """Somebody else fills the disk of the spool, and frees it."""
        ballast = self.fleet.spool / "ballast"
        with ballast.open("wb") as file, suppress(OSError):
            while True:
                os.posix_fallocate(file.fileno(), file.tell(), _MIB)
                file.seek(_MIB, os.SEEK_CUR)
        try:
            time.sleep(1.5)
        finally:
            ballast.unlink()

    def _cut(self) -> None:
        """The server that holds a key refuses connections."""
        with self.fleet.peer.out_of_reach():
            self._last()

    def _silence(self) -> None:
        """It takes them, and answers nothing until it has recovered."""
        with self.fleet.peer.silent():
            self._last()

    def _last(self) -> None:
        """As long as an outage lasts; what dies meanwhile is started again."""
        deadline = time.monotonic() + self._outage_s
        while time.monotonic() < deadline:
            self.fleet.tend()
            time.sleep(0.5)

    def _outage(self) -> None:
        """The key is away; who starts meanwhile has none, who runs keeps what it has."""
        key = Path(self.fleet.settings.kms.age.private_key_path)
        away = key.with_suffix(".away")
        key.rename(away)
        try:
            for name in self.fleet.workers:
                for pid in self.fleet.pool_of(name):
                    self.fleet.hit(pid)
            self._last()
        finally:
            away.rename(key)
