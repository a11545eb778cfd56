"""The service for tests: a Valkey server, the API and a worker as real processes over one state directory.

``service`` is one for the whole session: do not stop, kill or fill it. A test that wants to hurt something,
or wants other settings, makes its own ``Service``. ``core_of`` is the same core in this process, for tests
that stand in the middle of a job.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self, cast

import httpx2 as httpx
import pytest
from redis.exceptions import ConnectionError as RedisAway

from kms_cli.local import up
from kms_cli.local.directories import runtime_dir
from kms_core import secure_files
from kms_core.container import Core
from kms_core.container import build as build_core
from kms_core.jobs.model import NotifyWorker
from kms_core.programs import tether
from kms_core.programs.liveness import is_alive
from kms_core.redis_client import connect
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from kms_protocol.errors import EXIT_CONFIGURATION
from kms_protocol.wire import ENDED, PREFIX
from kms_worker import maintenance
from support import openapi_check
from support.embedded_valkey import EmbeddedValkey
from support.ports import free_port, is_of
from support.waiting import WAIT_S, until

STOP_S: Final = 60.0
CANARY: Final = "Kanarienvogel-4711"  # sent where a secret may be; it must not come back or be found
B64_CANARY: Final = b64encode(CANARY.encode()).decode()
CONTEXT: Final = "env=prod,service=api"
Json = dict[str, Any]
PROGRAMS: Final = {"api": "kms_api.main", "worker": "kms_worker.main"}


def b64(data: bytes) -> str:
    return b64encode(data).decode()


def unb64(text: str) -> bytes:
    return b64decode(text, validate=True)


def program(module: str, constants: Mapping[str, object], *, has_test_metrics: bool = False) -> list[str]:
    """The arguments for Python that run a module's ``main``, after other values for constants that it has.

    ``has_test_metrics``: with the metrics of ``support.inside``.
    """
    packages = (f"{module.partition('.')[0]}.", "kms_core.")
    named = [(*path.rsplit(".", 1), value) for path, value in constants.items() if path.startswith(packages)]
    if not named and not has_test_metrics:
        return ["-m", module]
    lines = [f"setattr(resolve_name({holder!r}), {name!r}, {value!r})" for holder, name, value in named]
    if has_test_metrics:
        lines += [f"sys.path.append({str(Path(__file__).parents[1])!r})", "import support.inside"]
    first = ["import sys", "from pkgutil import resolve_name"]
    return ["-c", "\n".join([*first, *lines, f"from {module} import main", "sys.exit(main())"])]


class Service:
    """One install. ``settings`` is TOML below the ``[kms]`` table; ``redis`` a URL, else its own server."""

    worker_probe = "/readyz"
    constants: Mapping[str, object] = MappingProxyType({})
    """Other values of constants in its processes, by their dotted names."""
    has_test_metrics = False
    """Whether its API has the metrics of ``support.inside``."""

    def __init__(self, folder: Path, settings: str = "", redis: str | None = None) -> None:
        self.state = folder / "state"
        self.files = self.state / "files"
        self.spool = self.state / "spool"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.logs = folder / "output"
        self.config = folder / "kms.toml"
        self.valkey = EmbeddedValkey(self.state)
        self._redis = redis
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for made in (folder, self.state, self.files, self.logs):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.config.write_text(f"[kms]\n{settings}")
        up.make_dev_keys(self.settings)
        hooks = {"response": [self._check]}
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_S, trust_env=False, event_hooks=hooks)

    def _check(self, answer: httpx.Response) -> None:
        if answer.request.url.port == self.port:  # the worker's metrics are another server's
            openapi_check.check(answer)

    @property
    def environ(self) -> dict[str, str]:
        named = {
            "KMS_CONFIG": str(self.config),
            "KMS_STATE_DIR": str(self.state),
            "KMS_PORT": str(self.port),
        }
        if self._redis:
            named["KMS_REDIS_URL"] = self._redis
        return {"HOME": "/nonexistent", "PATH": os.environ["PATH"], "TMPDIR": str(self.logs), **named}

    @property
    def settings(self) -> Settings:
        return load_settings(None, self.environ)

    def take_keys(self, other: "Service") -> None:
        """Copy the keys of another host of one install."""
        shutil.copytree(other.state / "age", self.state / "age", dirs_exist_ok=True)
        for name in ("spool.key", "intake.key"):
            shutil.copy2(other.state / name, self.state / name)

    # -- processes ---------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if not self._redis:
            self._redis = self.valkey.start().url
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        for name in list(self._processes):  # a warm shutdown takes seconds, and is a test of its own
            self.kill(name)
        self.valkey.stop()

    def start(self, *names: str) -> Self:
        """Start ``api``, ``worker`` (both, if none is named) and wait until they answer."""
        for name in names or PROGRAMS:
            self.spawn(name)
        for name in names or PROGRAMS:
            port = self.port + (name == "worker")
            until(lambda name=name, port=port: self._answers(name, port), f"{name} is up")  # type: ignore[misc]
        return self

    def spawn(self, name: str) -> None:
        """Start ``api`` or ``worker``, and wait for nothing."""
        inside = self.has_test_metrics and name == "api"
        argv = [sys.executable, "-P", *program(PROGRAMS[name], self.constants, has_test_metrics=inside)]
        with (self.logs / f"{name}.log").open("ab") as output:
            self._processes[name] = tether.spawn(argv, env=self.environ, output=output)

    def _answers(self, name: str, port: int) -> bool:
        assert self._processes[name].poll() is None, f"{name} ended:\n{self.output(name)}"
        is_worker = name == "worker"
        path = self.worker_probe if is_worker else "/livez"
        tls = not is_worker and self.settings.kms.server.tls_cert is not None
        answers = is_alive("127.0.0.1", port, tls=tls, path=path)
        return answers and is_of(port, self._processes[name].pid)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def pool_pids(self, name: str = "worker") -> list[int]:
        """The processes of a worker's pool, or those that another program has started."""
        children = Path(f"/proc/{self.pid(name)}/task/{self.pid(name)}/children")
        pids = [int(pid) for pid in children.read_text().split()]
        return [pid for pid in pids if not _is_maintenance(pid)]

    def signal_pool(self, number: signal.Signals, name: str = "worker") -> None:
        """Signal the pool processes of a worker."""
        for pid in self.pool_pids(name):
            os.kill(pid, number)

    def kill(self, name: str) -> None:
        """End a process and all that it started, at once, as the supervisor would find it."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self, name: str) -> int:
        """SIGTERM; the exit status."""
        self._processes[name].terminate()
        status = self._processes[name].wait(STOP_S)
        del self._processes[name]
        return status

    def output(self, *names: str) -> str:
        """What the processes printed."""
        return "".join(
            path.read_text() for name in names or PROGRAMS if (path := self.logs / f"{name}.log").exists()
        )

    def run_kms(self, *words: str, given: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the ``kms`` command beside the service; ``given`` is its input."""
        argv = [sys.executable, "-P", "-m", "kms_cli.main", *words]
        environ = self.environ | environ
        return subprocess.run(
            argv, env=environ, input=given, capture_output=True, text=True, timeout=120, check=False
        )

    def refusal(self, name: str, **environ: str) -> str:
        """What ``api`` or ``worker`` says that does not start, since its configuration is wrong."""
        argv = [sys.executable, "-P", "-m", PROGRAMS[name]]
        env = self.environ | environ
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == EXIT_CONFIGURATION, done.stderr
        return done.stderr

    # -- calls -------------------------------------------------------------------------------------

    def held(self, budget: str) -> float:
        """What requests hold of a budget of the API, which ``has_test_metrics``."""
        return self.metric(f'test_budget_held{{budget="{budget}"}}')

    def metric(self, series: str, **more: Any) -> float:  # noqa: ANN401 -- httpx's own keywords
        """The value of a metric of the API."""
        text = self.http.get("/metrics", **more).text
        (line,) = (line for line in text.splitlines() if line.startswith(f"{series} "))
        return float(line.split()[-1])

    def get(self, path: str, **more: Any) -> httpx.Response:  # noqa: ANN401 -- httpx's own keywords
        return self.http.get(f"{PREFIX}{path}", **more)

    def post(self, path: str, body: object = None, **more: Any) -> httpx.Response:  # noqa: ANN401 -- as above
        if body is not None:
            more["json"] = body
        return self.http.post(f"{PREFIX}{path}", **more)

    @property
    def degraded(self) -> list[str]:
        """What the status says that does not work."""
        found: list[str] = self.get("/status").json()["degraded"]
        return found

    def encrypt(self, plaintext: bytes, context: object = CONTEXT) -> bytes:
        answer = self.post("/encrypt", {"plaintext": b64(plaintext), "context": context})
        assert answer.status_code == 200, answer.text
        return unb64(answer.json()["ciphertext"])

    def decrypt(self, ciphertext: bytes, context: object = CONTEXT) -> bytes:
        answer = self.post("/decrypt", {"ciphertext": b64(ciphertext), "context": context})
        assert answer.status_code == 200, answer.text
        return unb64(answer.json()["plaintext"])

    def submit(self, job: Mapping[str, object], **headers: str) -> str:
        answer = self.post("/jobs", job, headers=_dashed(headers))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    def upload(self, kind: str, body: bytes | Iterable[bytes], context: str = "", **headers: str) -> str:
        headers = _dashed(headers) | ({"X-KMS-Context": context} if context else {})
        answer = self.post(f"/files/{kind}", content=body, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    def job(self, job_id: str) -> Json:
        answer = self.get(f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        found: Json = answer.json()
        return found

    def wait(self, job_id: str, state: str | None = None) -> Json:
        """The job, once it has ended (as ``state``, if that is given)."""
        until(lambda: self.job(job_id)["state"] in ENDED, f"the end of job {job_id}")
        found = self.job(job_id)
        assert state in {None, found["state"]}, f"{found}\n{self.output('worker')[-2000:]}"
        return found

    def result(self, job_id: str) -> bytes:
        answer = self.get(f"/jobs/{job_id}/result")
        assert answer.status_code == 200, answer.text
        return answer.content

    def lines(self, job_id: str) -> list[Json]:
        """The lines of the result of a job over items or many files."""
        return [json.loads(line) for line in self.result(job_id).splitlines()]

    def audited(self, **filters: str) -> list[Json]:
        """All audited operations: a page reads a bounded part of the log, and may be empty before its end."""
        found: list[Json] = []
        page: Json = {"more": True}
        while page["more"]:
            after = {"after": page["next"]} if "next" in page else {}
            answer = self.get("/audit", params={"limit": "1000", **filters, **after})
            assert answer.status_code == 200, answer.text
            page = answer.json()
            found += page["events"]
        return found

    def spooled(self) -> list[str]:
        """What rests in the spool, by path, and what of jobs that are listed rests in Redis.

        The install id and the marks of hosts are left out.
        """
        walk = os.walk(self.spool)
        found = (Path(folder, name) for folder, folders, names in walk for name in (*folders, *names))
        paths = (str(path.relative_to(self.spool)) for path in found)
        return sorted({*(path for path in paths if path.partition("/")[0] != "hosts"), *self._small_blobs()})

    def _small_blobs(self) -> Iterator[str]:
        if not self._redis:
            return
        with suppress(RedisAway), connect(self.settings.kms.redis) as client:
            lists = [b"kms:tenant:" + tenant for tenant in cast("set[bytes]", client.smembers("kms:tenants"))]
            ids = [raw.decode() for key in lists for raw in cast("list[bytes]", client.zrange(key, 0, -1))]
            for job_id in ids:
                names = cast("list[bytes]", client.hkeys(f"kms:blobs:{job_id}"))
                yield from [job_id] * bool(names)
                yield from (f"{job_id}/{name.decode()}" for name in names)


class Supervised(Service):
    """The same install run by ``kms up``, which starts again what dies."""

    _up: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        argv = [sys.executable, "-P", "-m", "kms_cli.main", "up"]
        with (self.logs / "up.log").open("ab") as output:
            self._up = tether.spawn(argv, env=self.environ, output=output)
        until(lambda: "kms: ready" in self.output("up"), "kms up is ready")
        self._redis = f"unix://{runtime_dir(self.state, self.environ)}/valkey.sock?db=0"
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._up.terminate()
        try:
            self._up.wait(STOP_S)
        finally:
            self._up.kill()

    def pid(self, name: str) -> int:
        """Of ``api``, ``worker`` or ``valkey``, once it has one."""
        path = self.state / "run" / f"{name}.pid"
        until(path.exists, f"a pid file of {name}")
        return int(path.read_text())

    def kill(self, name: str) -> None:
        """Kill one process, and wait until another runs in its place."""
        before = self.pid(name)
        os.kill(before, signal.SIGKILL)
        until(lambda: self.pid(name) != before, f"another {name}")


@contextmanager
def without_checks(service: Service) -> Iterator[None]:
    """No process of the install asks backends whether they work, so that all calls are those of requests."""
    (service.state / "run").mkdir(mode=0o700, exist_ok=True)
    with secure_files.lock(service.state / "run" / f"backends-{socket.gethostname()}.lock"):
        yield


def _dashed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def check_problem(answer: httpx.Response, status: int, code: str) -> None:
    """A refusal as docs/contract.md describes it, which echoes nothing."""
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem.keys() >= {"type", "title", "status", "detail", "code", "request_id"}
    assert problem["status"] == status
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert CANARY not in answer.text
    assert B64_CANARY not in answer.text


def _is_maintenance(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended by now
        return Path(f"/proc/{pid}/comm").read_text().strip() == maintenance.NAME
    return True


def core_of(service: Service, notify: NotifyWorker = lambda _: None) -> Core:
    """The core of an install in this process, with keys, spool and store; by default no worker is woken."""
    return build_core(service.settings, "test", notify)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey) -> Iterator[Service]:
    """A running service with default settings, for the whole session."""
    with Service(tmp_path_factory.mktemp("service"), redis=valkey.url) as running:
        yield running.start()


@pytest.fixture(scope="session")
def no_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An API that allows less than the default; there is no Redis."""
    settings = "require_context = true\n[kms.age]\naccept_foreign = false\n"
    with Service(tmp_path_factory.mktemp("no_redis"), settings, "unix:///nonexistent/valkey.sock") as running:
        yield running.start("api")


@pytest.fixture(scope="session")
def no_worker(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, database_numbers: Iterator[int]
) -> Iterator[Service]:
    """An API whose jobs stay queued, since no worker runs, with a spool of 1 MiB and no data keys."""
    url = valkey.files.url_of(next(database_numbers))
    settings = "[kms.jobs]\nspool_max_bytes = 1_048_576\n[kms.age]\ndata_keys = false\n"
    with Service(tmp_path_factory.mktemp("no_worker"), settings, url) as running:
        running.has_test_metrics = True
        yield running.start("api")


@pytest.fixture
def core(tmp_path: Path, redis_url: str) -> Core:
    """A core without processes, on an empty database: what a worker is made of, to be driven step by step."""
    return core_of(Service(tmp_path, "[kms.jobs]\nlease_s = 2\n", redis_url))
