"""What job benchmarks run against: one Valkey, an API, workers of ours and a bare one, all by their names."""

import http.client
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import msgspec
import redis
from benchmarks.children import environ
from benchmarks.drive_celery import DONE, QUEUE, TASK, producer
from benchmarks.measure import descendants
from benchmarks.running import free_port, stopped
from celery import Celery

from kms_cli.local import up, valkey
from kms_core.container import Core
from kms_core.container import build as build_core
from kms_core.jobs.model import Job
from kms_core.jobs.store import broker as job_broker
from kms_core.jobs.store.keys import job_key
from kms_core.jobs.submission.submitter import SubmissionOptions, new_id
from kms_core.programs import tether
from kms_core.programs.liveness import is_alive
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from kms_core.settings.redis_urls import for_celery, is_shared
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
    jobs: Mapping[str, object]
    loaded: Settings
    settings: str = ""
    running: dict[str, tuple[subprocess.Popen[bytes], ExitStack]] = field(default_factory=dict)

    @property
    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.place.url_of(0))

    @property
    def producer(self) -> Celery:
        return producer(for_celery(self.place.url_of(0)))

    def run(self, name: str, *argv: str, within: Sequence[str] = (), **more: str) -> int:
        """Start ``python -m argv``, in ``within`` (a command that runs another); its pid."""
        own = ExitStack()
        log = own.enter_context((self.state / f"{name}.log").open("ab"))
        argv = (*within, sys.executable, "-m", *argv)
        process = tether.spawn(
            [shutil.which(argv[0]) or argv[0], *argv[1:]],
            env=environ(**(dict(self.environ) | more)),
            output=log,
        )
        own.enter_context(stopped(process))
        self.running[name] = (process, own)
        self.stack.callback(self.end, name)
        return process.pid

    def api(self) -> int:
        """One API process, answering; its pid."""
        pid = self.run("api", "kms_api.main", KMS_PORT=str(self.port))
        wait(lambda: is_alive("127.0.0.1", self.port))
        return pid

    def worker(self, name: str, **jobs: object) -> int:
        """A worker that consumes, with ``[kms.jobs]`` of the install and these; its pid."""
        port = free_port()
        pid = self.run(name, "kms_worker.main", **self.worker_environ(name, port, jobs))
        wait(lambda: is_alive("127.0.0.1", port + 1))
        return pid

    def worker_environ(self, name: str, port: int, jobs: Mapping[str, object]) -> Mapping[str, str]:
        """What a worker with settings of its own is given."""
        config = self.state.with_name(f"{name}.toml")
        config.write_text(self.settings + _toml({**self.jobs, **jobs}))
        return {"KMS_CONFIG": str(config), "KMS_PORT": str(port)}

    def holder(self, job_id: str) -> str:
        """The name of the worker that runs a job; empty while none does."""
        raw = cast("bytes | None", self.redis.hget(job_key(job_id), "worker")) or b""
        pid = int(raw.rpartition(b"/")[2] or 0)
        return next(
            (name for name, (process, _) in self.running.items() if pid in descendants(process.pid)), ""
        )

    def kill(self, name: str) -> None:
        """SIGKILL to a process and to all that it started."""
        process, own = self.running.pop(name)
        for pid in (process.pid, *descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        own.close()

    def bare(self) -> int:
        url = self.place.url_of(0)
        return self.run("bare", "benchmarks.drive_celery", for_celery(url), url)

    def end(self, name: str) -> None:
        if name in self.running:
            self.running.pop(name)[1].close()


@contextmanager
def installed(
    folder: Path, fsync: str, *, tcp: int = 0, broker: str = "", settings: str = "", **jobs: object
) -> Iterator[Install]:
    """A state directory with keys and a Valkey server (``appendfsync`` as given); nothing else runs yet.

    ``jobs`` go to ``[kms.jobs]``, ``settings`` before that; ``tcp`` is a port on which the server listens at
    all addresses too, ``broker`` the URL of another broker.
    """
    state, config = folder / "state", folder / "kms.toml"
    (state / "files").mkdir(parents=True)
    jobs = {"concurrency": 2, "open_jobs": _OPEN_JOBS, **jobs}
    config.write_text(settings + _toml(jobs))
    with ExitStack() as stack:
        place = stack.enter_context(valkey.claim(state, os.environ))
        argv = [
            *valkey.command(valkey.find_binary(os.environ), place),
            "--maxmemory",
            str(_MAXMEMORY),
        ]
        argv[argv.index("--appendfsync") + 1] = fsync
        argv[argv.index("--port") + 1] = str(tcp)
        argv += ["--bind", "0.0.0.0", "--protected-mode", "no"] if tcp else []  # noqa: S104 -- other namespaces
        log = stack.enter_context(place.log_path.open("ab"))
        stack.enter_context(stopped(tether.spawn(argv, env={}, output=log, pass_fds=(place.lock,))))
        wait(lambda: valkey.is_ready(place.socket_path))
        named = {
            "KMS_CONFIG": str(config),
            "KMS_STATE_DIR": str(state),
            "KMS_REDIS_URL": place.url_of(0),
            "KMS_LOG": "warning",
            "HOME": str(folder),
            **({"KMS_BROKER_URL": broker} if broker else {}),
        }
        port = free_port()
        loaded = load_settings(config, named | {"KMS_PORT": str(port)})
        up.make_dev_keys(loaded)
        notify = None if is_shared(loaded.kms.redis) else job_broker.connect(loaded.kms.redis)
        core = build_core(loaded, "bench", notify)
        yield Install(state, place, named, port, core, stack, jobs, loaded, settings)


def _toml(jobs: Mapping[str, object], table: str = "kms.jobs") -> str:
    """Numbers, texts and lists are in TOML as in JSON; what is a mapping becomes a table of its own."""
    plain = {name: value for name, value in jobs.items() if not isinstance(value, Mapping)}
    lines = [f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in plain.items()), ""]
    inner = [_toml(jobs[name], f"{table}.{name}") for name in jobs if name not in plain]  # type: ignore[arg-type]  # a mapping
    return "\n".join([*lines, *inner])


def in_two_processes(count: int, work: Callable[[int], None]) -> None:
    """Do a half of ``count`` in each of two processes. Raises RuntimeError if one fails."""
    fork = multiprocessing.get_context("fork")
    halves = [fork.Process(target=work, args=(some,)) for some in (count // 2, count - count // 2)]
    for half in halves:
        half.start()
    for half in halves:
        half.join()
    if any(half.exitcode for half in halves):
        raise RuntimeError("a process that submits jobs failed")


def copy(install: Install, job_id: str, count: int) -> None:
    """Submit so many jobs like this one: a sealed record for each, but no input of its own."""
    store = install.core.worker_context.store
    spec = store.accepted(job_id)

    def work(some: int) -> None:
        for _ in range(some):
            store.submit(msgspec.structs.replace(spec, job_id=new_id(), created_at=store.now()))

    in_two_processes(count, work)


def long_files(install: Install, options: SubmissionOptions, count: int, size_bytes: int) -> list[Job]:
    """Submit jobs that encrypt a file each, which takes seconds. The file is a hole of so many bytes."""
    folder = install.state / "files"
    with (folder / "source").open("wb") as file:
        file.truncate(size_bytes)
    targets = [folder / f"target{number}" for number in range(count)]
    for target in targets:
        target.unlink(missing_ok=True)
    source = (folder / "source").as_uri()
    asked = [msgspec.structs.replace(options.job, source=source, target=each.as_uri()) for each in targets]
    return [install.core.submitter.files(replace(options, job=each)) for each in asked]


def wait(fact: Callable[[], object], seconds: float = START_S, what: str = "a process that is ready") -> None:
    """Wait until ``fact`` is true. Raises RuntimeError if it is not in time."""
    ends = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > ends:
            raise RuntimeError(f"not in {seconds:.0f} s: {what}")
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


class Transition(NamedTuple):
    """A job, the state that it came to, its error code, and the second by the server's clock."""

    job_id: str
    state: str
    code: str
    at: float


class Ends:
    """Reads the stream of transitions from now on."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client
        newest = cast("list[tuple[bytes, object]]", self._redis.xrevrange("kms:events", count=1))
        self._position: bytes | str = newest[0][0] if newest else "0-0"

    def later(self, seconds: float = _PATIENCE_S) -> Iterator[Transition]:
        """Transitions as they come, for so long."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            for position, fields in self._more():
                self._position = position
                yield Transition(
                    fields[b"subject"].decode(),
                    fields[b"type"].decode().removeprefix("kms.job."),
                    fields[b"code"].decode(),
                    int(position.partition(b"-")[0]) / 1e3,
                )

    def moment(self, job_id: str, state: str) -> float:
        """When a job comes to a state, by the server's clock. Raises RuntimeError if it does not."""
        for found in self.later():
            if (found.job_id, found.state) == (job_id, state):
                return found.at
        raise RuntimeError(f"no job got {state}")

    def await_end(self, count: int) -> Sequence[float]:
        """Until so many jobs have succeeded; when each did, in seconds of the server's clock.

        Raises RuntimeError if one ends otherwise, or none does.
        """
        moments: list[float] = []
        for found in self.later():
            if found.state in {"failed", "cancelled"}:
                raise RuntimeError(f"a job {found.state}: {found.code}")
            if found.state == "succeeded":
                moments.append(found.at)
            if len(moments) == count:
                return moments
        raise RuntimeError("jobs did not end")

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
