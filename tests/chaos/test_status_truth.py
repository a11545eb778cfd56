"""``kms status`` while workers come, are killed and are stopped, and while Redis is away: always true."""

import json
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from kms_core.programs import tether
from support.ports import free_port
from support.service import CONTEXT, PROGRAMS, Json, Service, b64
from support.waiting import until

LARGE: Final = 96 * 1024 * 1024
ITEMS: Final = {"kind": "encrypt", "items": [{"plaintext": b64(b"x"), "context": CONTEXT}]}
NONE: Final = {"queued": 0, "running": 0, "committing": 0}
WORKERS: Final = ("worker", "worker2")


class TwoWorkers(Service):
    """An install of two workers; the second differs in the port of its metrics alone."""

    def spawn(self, name: str) -> None:
        if name != "worker2":
            super().spawn(name)
            return
        argv = [sys.executable, "-P", "-m", PROGRAMS["worker"]]
        with (self.logs / f"{name}.log").open("ab") as output:
            environ = self.environ | {"KMS_PORT": str(free_port())}
            self._processes[name] = tether.spawn(argv, env=environ, output=output)

    def running(self) -> set[str]:
        return set(self._processes)

    def holder(self) -> str:
        """The worker one of whose processes writes a target."""
        for name in WORKERS:
            for pid in self.pool_pids(name):
                if any(".kms-" in str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()):
                    return name
        raise AssertionError("no worker writes a target")

    def told(self) -> Json:
        """What of ``kms status`` is about jobs and workers."""
        done = self.run_kms("--url", self.url, "status", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        return {name: told[name] for name in ("workers", "degraded", "jobs", "queue_depth")}


def hold_in_the_middle(service: TwoWorkers) -> tuple[str, str]:
    """A job that runs and gets no further; its id, and the worker that has it."""
    here = f"file://{service.files}/large"
    job = {"kind": "encrypt", "source": here, "target": f"{here}.{uuid.uuid4()}", "context": CONTEXT}
    job_id = service.submit(job)
    output = partial(service.output, "worker", "worker2")
    until(lambda: list(service.files.glob(".kms-*")), output, poll_s=0.001)  # quickly, or it would be done
    for name in WORKERS:
        service.signal_pool(signal.SIGSTOP, name)
    return job_id, service.holder()


WELL: Final = {"workers": 1, "degraded": [], "jobs": NONE, "queue_depth": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoWorkers]:
    """One install for the acts of this module, each of which leaves one idle worker."""
    with TwoWorkers(
        tmp_path_factory.mktemp("pair"), "[kms.jobs]\nlease_s = 60\nconcurrency = 1\n"
    ) as service:
        service.start("api")
        (service.files / "large").write_bytes(os.urandom(LARGE))
        yield service


def alone(service: TwoWorkers) -> TwoWorkers:
    """With one idle worker."""
    if "worker" not in service.running():
        service.spawn("worker")
    until(lambda: service.told() == WELL, "one idle worker")
    return service


def test_a_worker_is_announced_before_its_first_job(pair: TwoWorkers) -> None:
    for name in pair.running() & set(WORKERS):
        pair.kill(name)
    until(lambda: pair.told()["workers"] == 0, "no worker")
    first = pair.submit(ITEMS)
    waiting = {**NONE, "queued": 1}
    assert pair.told() == {"workers": 0, "degraded": ["workers"], "jobs": waiting, "queue_depth": 1}

    pair.spawn("worker")
    pair.wait(first, "succeeded")
    assert pair.told() == WELL


def test_status_is_true_while_a_worker_is_killed_and_the_other_is_stopped(pair: TwoWorkers) -> None:
    service = alone(pair)
    service.spawn("worker2")
    until(lambda: service.told() == {**WELL, "workers": 2}, "the second worker is seen")
    held, holder = hold_in_the_middle(service)
    running = {"degraded": [], "jobs": {**NONE, "running": 1}, "queue_depth": 0}
    assert service.told() == {**running, "workers": 2}

    service.kill(next(name for name in WORKERS if name != holder))
    until(lambda: service.told() == {**running, "workers": 1}, "the killed worker leaves the list")

    os.kill(service.pid(holder), signal.SIGTERM)
    stopping = {**running, "workers": 0, "degraded": ["workers"]}
    until(lambda: service.told() == stopping, "the stopped worker leaves the list before its job ends")
    for _ in range(3):
        service.submit(ITEMS)
    queued = {**stopping, "jobs": {**NONE, "running": 1, "queued": 3}, "queue_depth": 3}
    assert service.told() == queued

    service.signal_pool(signal.SIGCONT, holder)
    service.wait(held, "succeeded")
    assert service.stop(holder) == 0
    assert service.told() == {**queued, "jobs": {**NONE, "queued": 3}}

    service.spawn("worker")
    until(lambda: service.told() == WELL, "another worker has done them")


def test_without_redis_status_says_so_and_without_the_service_the_exit_code_does(tmp_path: Path) -> None:
    with TwoWorkers(tmp_path) as service:
        service.start("api")
        service.valkey.stop()
        nothing = {"workers": None, "jobs": None, "queue_depth": None}
        assert service.told() == {**nothing, "degraded": ["redis"]}

        shown = service.run_kms("--url", service.url, "status")
        assert shown.returncode == 0
        assert "jobs         unavailable" in shown.stdout
        assert "degraded     redis" in shown.stdout
        service.kill("api")
        assert service.run_kms("--url", service.url, "status").returncode == 69
