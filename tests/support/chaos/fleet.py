"""An install over hosts that share Redis and buckets, and no disk: two APIs and three workers.

This thread is the host with Redis and the buckets, and that of the clients. Each other host has three lines
to it: for its clients, to Redis, and to the buckets.
"""

import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Self, cast
from urllib.parse import urlsplit

import httpx2 as httpx
from redis import Redis

from kms_core.programs import tether
from kms_core.programs.liveness import is_alive
from support import object_stores, redis_servers
from support.blob_stores import PREFIX
from support.canary.secrets import Search
from support.chaos.cluster import SupervisedByTest
from support.credentials import bearer
from support.network_hosts import Host, isolated_network
from support.object_stores import ObjectStore, TestBucket
from support.service import CANARY, PROGRAMS, STOP_S, Service
from support.waiting import until

CLIENTS: Final = "clients"
REDIS: Final = "redis"
BUCKETS: Final = "s3"
LINES: Final = (CLIENTS, REDIS, BUCKETS)
APIS: Final = ("api1", "api2")
WORKERS: Final = ("worker1", "worker2", "worker3")
LEASE_S: Final = 3
PATIENCE_S: Final = 10.0  # of a client with an answer, whose line may be cut
ANY_ADDRESS: Final = "0.0.0.0"  # noqa: S104 -- of a namespace
SECRETS: Final = ("age/private_key.txt", "spool.key", "intake.key")
HOST_SETTINGS: Final = f"""bind = "{ANY_ADDRESS}"
[kms.auth]
mode = "required"
tokens = "s3://{{state}}/tokens"
"""
SETTINGS: Final = f"""
[kms.jobs]
lease_s = {LEASE_S}
attempts = 50
concurrency = 1
inline_bytes = 4096
input_grace_s = 1
[kms.jobs.spool_bucket]
url = "s3://{{spool}}/{PREFIX}"
timeout_s = 3
{{line}}
[kms.jobs.buckets.{{state}}]
timeout_s = 3
{{line}}
[kms.jobs.buckets.{{files}}]
read = ["in/"]
write = ["out/"]
timeout_s = 3
{{line}}
"""
S3_CONNECTION: Final = f"""endpoint = "{{endpoint}}"
allow_http = true
access_key_id = "{object_stores.ACCESS_KEY}"
secret_key_file = "{{secret}}"
"""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all hosts share: Redis and three buckets."""

    redis: redis_servers.Server
    store: ObjectStore
    spool: TestBucket
    state: TestBucket
    files: TestBucket

    def settings(self, folder: Path, s3_host: str, *, is_host: bool = True) -> str:
        folder.mkdir(parents=True)
        secret = folder / "s3-secret"
        secret.write_text(object_stores.SECRET)
        secret.chmod(0o600)
        line = S3_CONNECTION.format(
            endpoint=f"http://{s3_host}:{urlsplit(self.store.url).port}", secret=secret
        )
        names = {"state": self.state.name, "spool": self.spool.name, "files": self.files.name}
        return (HOST_SETTINGS * is_host + SETTINGS).format(line=line, **names)


class Machine(Service):
    """The installation on one host: one program, with a state directory and copies of the secrets.

    ``settings`` must bind it to all addresses.
    """

    def __init__(self, folder: Path, host: Host, settings: str, redis: str, like: Service) -> None:
        super().__init__(folder, settings, redis)
        self.take_keys(like)
        self.host, self.name, self.program = host, folder.name, folder.name.rstrip("0123456789")
        self.port = 8082  # each host has ports of its own
        self.address = host.lines[CLIENTS].address
        self.http.base_url = f"http://{self.address}:{self.port}"
        self.http.timeout = PATIENCE_S

    def argv(self, name: str) -> list[str]:
        return [*self.host.enter, sys.executable, "-P", "-m", PROGRAMS[name]]

    def spawn(self, name: str) -> None:
        with (self.logs / f"{name}.log").open("ab") as output:
            self._processes[name] = tether.spawn(self.argv(name), env=self.environ, output=output)

    @property
    def is_up(self) -> bool:
        return self.program == "worker" or is_alive(self.address, self.port)

    @property
    def status(self) -> int | None:
        """The exit status of its process; None while it runs."""
        return self._processes[self.program].poll()

    def roll(self) -> None:
        """SIGTERM; once it has ended, start it again and wait until it is up."""
        self._processes[self.program].terminate()
        self._processes.pop(self.program).wait(STOP_S)
        self.spawn(self.program)
        until(lambda: self.is_up, f"{self.name} is up")

    def kms(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``kms`` on this host."""
        argv = [*self.host.enter, sys.executable, "-P", "-m", "kms_cli.main", *words]
        return subprocess.run(
            argv, env=self.environ, capture_output=True, text=True, check=False, timeout=STOP_S
        )


class LoadBalancer(httpx.BaseTransport):
    """Sends each request to one of the APIs; for a result, to one that did not take the job."""

    def __init__(self, apis: Sequence[Machine], seed: int) -> None:
        self.taken: defaultdict[str, set[str]] = defaultdict(set)
        self.crossed = 0
        self._apis = apis
        self._rng = random.Random(seed)  # noqa: S311 -- repeatable, no secret
        self._inner = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.split("/")
        took = self.taken[path[-2]] if path[-1] == "result" else set()
        others = [api for api in self._apis if api.address not in took]
        self.crossed += len(others) < len(self._apis)
        api = self._rng.choice(others or self._apis)
        request.url = request.url.copy_with(host=api.address, port=api.port)
        request.headers["Host"] = request.url.netloc.decode()
        return self._inner.handle_request(request)

    def note(self, answer: httpx.Response) -> None:
        """Remember which API took a job."""
        if answer.status_code == httpx.codes.ACCEPTED:
            answer.read()
            self.taken[answer.json()["job_id"]].add(answer.request.url.host)

    def close(self) -> None:
        self._inner.close()


class Fleet(SupervisedByTest):
    """All hosts, as clients see them. ``unexpected_exits`` counts processes that no test had told to end."""

    def __init__(self, folder: Path, hosts: Sequence[Host], shared: Shared, seed: int) -> None:
        mine = folder / "clients"
        super().__init__(mine, shared.settings(mine / "s3", "127.0.0.1", is_host=False), shared.redis.url())
        self.folder, self.shared = folder, shared
        self.machines = {
            name: Machine(
                folder / name,
                host,
                shared.settings(folder / name, host.lines[BUCKETS].test_address),
                shared.redis.url(host=host.lines[REDIS].test_address),
                like=self,
            )
            for name, host in zip((*APIS, *WORKERS), hosts, strict=True)
        }
        self.unexpected_exits: Counter[str] = Counter()
        self.secrets = {"canary": CANARY.encode()}
        self.http.close()
        self.spread = LoadBalancer([self.machines[name] for name in APIS], seed)
        self.port = self.machines[APIS[0]].port
        hooks = {"response": [self.spread.note, self._check]}
        self.http = httpx.Client(
            base_url=f"http://api:{self.port}",
            transport=self.spread,
            timeout=PATIENCE_S,
            trust_env=False,
            event_hooks=hooks,
        )

    def launch(self) -> Self:
        """Start all hosts, and give the clients a token."""
        for machine in self.machines.values():
            machine.spawn(machine.program)
        for machine in self.machines.values():
            until(lambda machine=machine: self._is_up(machine), f"{machine.name} is up")  # type: ignore[misc]
        bucket = self.shared.files
        places = f"read={bucket.url('in/')} write={bucket.url('out/')}"
        self.token = self.new_token("clients", "*", f"* {places}", on=APIS[0])
        self.http.headers.update(bearer(self.token))
        return self

    def _is_up(self, machine: Machine) -> bool:
        assert machine.status is None, f"{machine.name} ended:\n{machine.output(machine.program)}"
        return machine.is_up

    def new_token(self, name: str, *scopes: str, on: str) -> str:
        """Make a token by ``kms token`` on a host."""
        path = self.files / f"token-{name}"
        words = [word for scope in scopes for word in ("--scope", scope)]
        made = self.machines[on].kms("token", "create", "--name", name, *words, "-o", str(path))
        assert made.returncode == 0, made.stderr
        text = path.read_text().strip()
        self.secrets[f"token {name}"] = text.split("_", 2)[2].encode()
        return text

    def restart_dead(self) -> None:
        for machine in self.machines.values():
            if machine.status is not None:
                self.unexpected_exits[f"{machine.name} {machine.status}"] += 1
                with suppress(ProcessLookupError):  # it left no children
                    machine.kill(machine.program)
                machine.spawn(machine.program)

    @cached_property
    def admin(self) -> Redis:
        return self.shared.redis.admin()

    def spooled(self) -> list[str]:
        keys = (key.removeprefix(PREFIX) for key in self.shared.spool.keys())  # noqa: SIM118 -- no dict
        paths = (key for key in keys if key.partition("/")[0] != "hosts")
        return sorted({*paths, *self._small_blobs()})

    def worker_of(self, job_id: str) -> str | None:
        """The name of the host that runs a job, if one does."""
        if self.admin.zscore("kms:state:default:running", job_id) is None:
            return None
        found = cast("bytes | None", self.admin.hget(f"kms:job:{job_id}", "worker")) or b""
        number = found.decode().removeprefix("host").partition(":")[0]
        return [*self.machines][int(number) - 1] if number else None

    def has_ended(self, job_id: str) -> bool:
        """Whether a job has ended."""
        return self.admin.hget(f"kms:job:{job_id}", "state") not in {b"queued", b"running", b"committing"}

    @property
    def troubles(self) -> dict[str, object]:
        """What each API says of itself."""
        found: dict[str, object] = {}
        for name in APIS:
            try:
                answer = self.machines[name].get("/status", headers=bearer(self.token))
            except httpx.TransportError as exc:
                found[name] = type(exc).__name__
            else:
                found[name] = answer.json().get("degraded") if answer.is_success else answer.status_code
        return found

    def settle(self) -> None:
        """Wait until all APIs say that all is well."""
        until(lambda: not any(self.troubles.values()), lambda: f"all is well: {self.troubles}", poll_s=0.3)

    def search(self) -> list[str]:
        """Secrets where none may be: Redis' files, the buckets of spool and tokens, state, logs."""
        allowed: dict[Path, list[str]] = {}
        for service in (self, *self.machines.values()):
            for name in SECRETS:
                lines = (service.state / name).read_bytes().splitlines()
                keys = [line for line in lines if line and not line.startswith(b"#")]
                self.secrets |= {f"{name} {number}": key for number, key in enumerate(keys)}
                allowed[service.state / name] = [f"{name} {number}" for number in range(len(keys))]
        of_users = (self.folder / "weed").glob(f"{self.shared.files.name}_*")
        return Search(self.secrets).files(self.folder, allowed, but=[self.files, *of_users])

    def __exit__(self, *given: object) -> None:
        for machine in self.machines.values():
            machine.__exit__(None, None, None)
        self.admin.close()
        self.shared.store.admin.close()
        super().__exit__(None, None, None)


@contextmanager
def fleet(folder: Path, seed: int) -> Iterator[Fleet]:
    """The hosts, not started yet. Call it from the main thread."""
    with ExitStack() as stack:
        hosts = stack.enter_context(isolated_network(len((*APIS, *WORKERS)), LINES))
        redis = stack.enter_context(redis_servers.server(folder / "redis", None, bind=ANY_ADDRESS))
        (folder / "weed").mkdir()
        server, store = object_stores.start_weed(folder / "weed", ANY_ADDRESS)
        stack.callback(server.wait)
        stack.callback(server.kill)
        shared = Shared(redis, store, store.new(), store.new(), store.new())
        versioning: Mapping[str, str] = {"Status": "Enabled"}
        store.admin.put_bucket_versioning(
            Bucket=shared.files.name,
            VersioningConfiguration=versioning,  # type: ignore[arg-type]
        )
        yield stack.enter_context(Fleet(folder, hosts, shared, seed))
