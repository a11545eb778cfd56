"""What job benchmarks run against: one Valkey, an API, workers of ours and a bare one, all by their names."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import redis
from benchmarks.children import ROOT, environ
from benchmarks.drive_celery import DONE, QUEUE, TASK, producer
from benchmarks.measure import descendants
from benchmarks.running import free_port, stopped
from celery import Celery

from kms_cli.local import up, valkey
from kms_core.container import Core
from kms_core.container import build as build_core
from kms_core.settings.load import load as load_settings
from kms_protocol.wire import PREFIX

START_S: Final = 60.0
_KEPT_S: Final = 2.0
_PATIENCE_S: Final = 300.0
_MAXMEMORY: Final = 2 * 1024**3
_OPEN_JOBS: Final = 200_000


@dataclass
class Install:
    """Processes are started by ``run`` and end with the ``installed`` block, or by ``end``."""

    state: Path
    place: valkey.ValkeyFiles
    environ: Mapping[str, str]
    port: int
    core: Core
    stack: ExitStack
    running: dict[str, tuple[subprocess.Popen[bytes], ExitStack]] = field(default_factory=dict)

    @property
    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.place.url_of(0))

    @property
    def producer(self) -> Celery:
        return producer(self.place.broker_url_of(0))

    def run(self, name: str, *argv: str, port: int = 0) -> int:
        """Start ``python -m argv``; wait for its probe if it has a port. Its pid."""
        more = {"KMS_PORT": str(port)} if port else {}
        own = ExitStack()
        log = own.enter_context((self.state / f"{name}.log").open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-m", *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environ(**(dict(self.environ) | more)),
        )
        own.enter_context(stopped(process))
        self.running[name] = (process, own)
        self.stack.callback(self.end, name)
        return process.pid

    def api(self) -> int:
        """One API process, answering; its pid."""
        pid = self.run("api", "kms_api.main", port=self.port)
        wait(lambda: up.is_alive("127.0.0.1", self.port))
        return pid

    def worker(self, name: str) -> int:
        """A worker that consumes; its pid."""
        port = free_port()
        pid = self.run(name, "kms_worker.main", port=port)
        wait(lambda: up.is_alive("127.0.0.1", port + 1))
        return pid

    def bare(self) -> int:
        return self.run("bare", "benchmarks.drive_celery", self.place.broker_url_of(0), self.place.url_of(0))

    def end(self, name: str) -> None:
        if name in self.running:
            self.running.pop(name)[1].close()


@contextmanager
def installed(folder: Path, fsync: str, *, concurrency: int = 2) -> Iterator[Install]:
    """A state directory with keys and a Valkey server (``appendfsync`` as given); nothing else runs yet."""
    state, config = folder / "state", folder / "kms.toml"
    (state / "files").mkdir(parents=True)
    config.write_text(f"[kms.jobs]\nconcurrency = {concurrency}\nopen_jobs = {_OPEN_JOBS}\n")
    with ExitStack() as stack:
        place = stack.enter_context(valkey.claim(state, os.environ))
        argv = valkey.command(valkey.find_binary(os.environ), place, valkey.ValkeyLimits(_MAXMEMORY))
        argv[argv.index("--appendfsync") + 1] = fsync
        log = stack.enter_context(place.log_path.open("ab"))
        stack.enter_context(stopped(subprocess.Popen(argv, stdout=log, pass_fds=(place.lock,))))
        wait(lambda: valkey.is_ready(place.socket_path))
        named = {
            "KMS_CONFIG": str(config),
            "KMS_STATE_DIR": str(state),
            "KMS_REDIS_URL": place.url_of(0),
            "KMS_LOG": "warning",
            "HOME": str(folder),
        }
        port = free_port()
        settings = load_settings(config, named | {"KMS_PORT": str(port)})
        up.make_dev_keys(settings)
        core = build_core(settings, "bench", None)
        yield Install(state, place, named, port, core, stack)


def wait(fact: Callable[[], object]) -> None:
    ends = time.monotonic() + START_S
    while not fact():
        if time.monotonic() > ends:
            raise RuntimeError("a process did not get ready")
        time.sleep(0.02)


class Nothings:
    """The no-ops: sent by a bare producer, and waited for."""

    def __init__(self, install: Install) -> None:
        self._app = install.producer
        self._redis = install.redis

    def send(self, number: int) -> None:
        self._app.send_task(TASK, (number,), queue=QUEUE, argsrepr="-", kwargsrepr="-")

    def await_end(self, count: int) -> None:
        ends = time.monotonic() + _PATIENCE_S
        while count:
            count -= self._redis.brpop([DONE], timeout=1) is not None
            if time.monotonic() > ends:
                raise RuntimeError("a no-op never ran")


class Ends:
    """Reads the stream of transitions from now on."""

    def __init__(self, install: Install) -> None:
        self._redis = install.redis
        newest = cast("list[tuple[bytes, object]]", self._redis.xrevrange("kms:events", count=1))
        self._position: bytes | str = newest[0][0] if newest else "0-0"

    def await_end(self, count: int) -> Sequence[float]:
        """Until so many jobs have succeeded; when each did, in seconds of the server's clock.

        Raises RuntimeError if one ends otherwise, or none does.
        """
        ends = time.monotonic() + _PATIENCE_S
        moments: list[float] = []
        while len(moments) < count:
            if time.monotonic() > ends:
                raise RuntimeError("jobs did not end")
            for position, fields in self._more():
                self._position = position
                state = fields[b"type"].removeprefix(b"kms.job.")
                if state in {b"failed", b"cancelled"}:
                    raise RuntimeError(f"a job {state.decode()}: {fields[b'code'].decode()}")
                if state == b"succeeded":
                    moments.append(int(position.partition(b"-")[0]) / 1e3)
        return moments

    def _more(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        answer: Any = self._redis.xread({"kms:events": self._position}, count=5000, block=1000)
        if isinstance(answer, dict):  # RESP3
            answer = [(name, records[0]) for name, records in answer.items()]
        return answer[0][1] if answer else []


class Callers:
    """POST /jobs over kept connections, one for each thread."""

    def __init__(self, port: int, body: object) -> None:
        self._port = port
        self._body = json.dumps(body).encode()
        self._mine = threading.local()

    def send(self, number: int) -> None:
        del number
        now = time.monotonic()
        if now - getattr(self._mine, "at", 0.0) > _KEPT_S:  # the server closes what is idle
            self._mine.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        self._mine.at = now
        connection: http.client.HTTPConnection = self._mine.connection
        connection.request("POST", f"{PREFIX}/jobs", self._body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != http.HTTPStatus.ACCEPTED:
            raise RuntimeError(f"POST /jobs answered {answer.status} {text[:200]!r}")


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, and what its children have of their own beside it (proc(5))."""
    total = _memory_of(pid, "Rss:")
    for child in descendants(pid):
        total += _memory_of(child, "Private_Clean:") + _memory_of(child, "Private_Dirty:")
    return total


def _memory_of(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
