"""What goes wrong in a storm, by name. Every fault leaves all processes running again, or being started."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

from redis.exceptions import RedisError as RedisAway

from kms_core.backends.age_settings import AgeSection
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store import broker
from kms_core.redis_client import connect
from kms_protocol.errors import JobsUnavailable
from support.chaos.cluster import Cluster, pause
from support.chaos.load import Load
from support.frozen_disk import state_of

DAY_S: Final = 24 * 3600.0
_MIB: Final = 1024 * 1024
_ECHOES: Final = 5
_COMES_S: Final = 5.0  # until a process has a job
_HANGS_S: Final = 5.0  # until a job has come that uses the disk


class FaultInjection:
    """Faults are counted by name in ``injected``. ``disk`` is the spool's own file system, if it has one."""

    def __init__(self, cluster: Cluster, load: Load, rng: random.Random, *, outage_s: float) -> None:
        self.cluster = cluster
        self.load = load
        self.injected: Counter[str] = Counter()
        self._rng = rng
        self._outage_s = outage_s
        self.faults_by_name: dict[str, Callable[[], None]] = {
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
            "hang": self._hang,
            "cut": self._cut,
            "silence": self._silence,
        }

    def inject(self, name: str) -> None:
        self.faults_by_name[name]()
        self.injected[name] += 1

    # -- deaths --------------------------------------------------------------------------------------

    def _child(self) -> None:
        """One process of a pool, in the middle of a job if any has one; it is stopped while that is read."""
        deadline = time.monotonic() + _COMES_S
        while time.monotonic() < deadline:
            victims = sorted(self._pool_pids() & self._holders())
            self._rng.shuffle(victims)
            if any(self._is_hit_in_a_job(victim) for victim in victims):
                return
            time.sleep(0.01)
        if victims := sorted(self._pool_pids()):
            self.cluster.hit(self._rng.choice(victims))

    def _is_hit_in_a_job(self, victim: int) -> bool:
        self.cluster.hit(victim, signal.SIGSTOP)
        has_one = victim in self._holders()
        self.cluster.hit(victim, signal.SIGKILL if has_one else signal.SIGCONT)
        return has_one

    def _worker(self) -> None:
        """The parent first; its orphans run on for a moment."""
        name = self._rng.choice(self.cluster.workers)
        self.cluster.hit(self.cluster.pid(name))
        pause(self._rng, 0.3)
        self.cluster.again(name)

    def _api(self) -> None:
        self.cluster.again("api")

    def _valkey(self) -> None:
        self.cluster.hit(self.cluster.valkey.pid)
        pause(self._rng, 0.5)
        self.cluster.valkey.start()

    def _all(self) -> None:
        """Everything at the same moment, as a machine that loses its processes."""
        self.cluster.hit(self.cluster.valkey.pid)
        for name in ("api", *self.cluster.workers):
            self.cluster.hit_all(name, signal.SIGKILL)
        self.cluster.valkey.start()
        for name in ("api", *self.cluster.workers):
            self.cluster.again(name)

    def _roll(self) -> None:
        """A new release: workers are asked to stop, one after the other."""
        for name in self.cluster.workers:
            self.cluster.ask_to_stop(name)
            self.cluster.again(name)

    def _flood(self) -> None:
        """No worker, and the queue fills; the broker dies with it full."""
        for name in self.cluster.workers:
            self.cluster.hit_all(name, signal.SIGKILL)
        before, deadline = len(self.load.accepted_jobs), time.monotonic() + 5
        self.load.request_limit = max(self.load.request_limit, before + 10)
        while len(self.load.accepted_jobs) < before + 10 and self.load.busy and time.monotonic() < deadline:
            time.sleep(0.05)
        self._valkey()
        for name in self.cluster.workers:
            self.cluster.again(name)

    def _freeze(self) -> None:
        """A worker stops for longer than its lease, is written off, and wakes up believing in it."""
        name = self._rng.choice(self.cluster.workers)
        self.cluster.hit_all(name, signal.SIGSTOP)
        time.sleep(self.cluster.settings.kms.jobs.lease_s + 1.5)
        self.cluster.hit_all(name, signal.SIGCONT)

    def _hang(self) -> None:
        """The disk of the files hangs, and those who use it, for longer than a job may stand still."""
        assert self.cluster.disk
        with self.cluster.disk.frozen():
            deadline = time.monotonic() + _HANGS_S
            while not self._stuck() and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(self.cluster.settings.kms.jobs.stall_s + 2)

    def _stuck(self) -> bool:
        return any(state_of(pid) == "D" for pid in self._pool_pids())

    def _pool_pids(self) -> set[int]:
        return {pid for name in self.cluster.workers for pid in self.cluster.pool_of(name)}

    def _holders(self) -> set[int]:
        """The processes that hold jobs, as Redis knows them; none while it is away."""
        with suppress(RedisAway), connect(self.cluster.settings.kms.redis) as client:
            leased = cast("list[bytes]", client.zrange("kms:leased", 0, -1))
            names = [client.hget(f"kms:job:{raw.decode()}", "worker") for raw in leased]
            return {int(name.rpartition(b"/")[2]) for name in cast("list[bytes]", names) if name}
        return set()

    # -- confusion -----------------------------------------------------------------------------------

    def _echo(self) -> None:
        """Wake-ups that nobody asked for, to any queue."""
        notify = broker.connect(self.cluster.settings.kms.redis)
        for _ in range(_ECHOES):
            for _ in range(self._rng.randint(2, 4)):
                with suppress(JobsUnavailable):
                    notify(self._rng.choice(QUEUES))

    def _clock(self) -> None:
        """A worker's clock is a day ahead, then a day behind, then right."""
        for shift in (DAY_S + 3600, -DAY_S - 3600, 0.0):
            self.cluster.clock.shift(shift)
            time.sleep(2.5)

    def _full(self) -> None:
        """Somebody else fills the disk of the spool, and frees it."""
        ballast = self.cluster.spool / "ballast"
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
        with self.cluster.peer.out_of_reach():
            self._wait_out_outage()

    def _silence(self) -> None:
        """It takes them, and answers nothing until it has recovered."""
        with self.cluster.peer.silent():
            self._wait_out_outage()

    def _wait_out_outage(self) -> None:
        """As long as an outage lasts; what dies meanwhile is started again."""
        deadline = time.monotonic() + self._outage_s
        while time.monotonic() < deadline:
            self.cluster.restart_dead()
            time.sleep(0.5)

    def _outage(self) -> None:
        """The key is away; who starts meanwhile has none, who runs keeps what it has."""
        key = Path(self.cluster.settings.backend(AgeSection).private_key_path)
        away = key.with_suffix(".away")
        key.rename(away)
        try:
            for name in self.cluster.workers:
                for pid in self.cluster.pool_of(name):
                    self.cluster.hit(pid)
            self._wait_out_outage()
        finally:
            away.rename(key)
