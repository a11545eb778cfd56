"""What authentication and the audit log cost POST /encrypt over HTTP; ``bench_transit`` has peers.

Two API processes behind one port, over a state directory on a disk; OpenBao, which other scripts start from
here, is one process of many threads. wrk keeps its connections. The processor time of the servers for each
request is disturbed less by other programs than requests a second are.
"""

import json
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from benchmarks import http_load, report, running
from benchmarks.children import PYTHON, ROOT, environ
from benchmarks.http_load import Shot
from benchmarks.measure import Contender, Reading, descendants, in_turn, say, used_s
from benchmarks.report import Cell, Scale

from kms_cli.local import up
from kms_core.auth import tokens
from kms_core.auth.tokens import TokenRequest
from kms_core.settings.load import load as load_settings
from kms_protocol.wire import PREFIX
from support.openbao import Bao

CONNECTIONS: Final = (1, 16)
PROCESSES: Final = 2
SIZE: Final = 1024
START_S: Final = 30.0
CONTEXT: Final = "env=prod,service=api"
SCOPES: Final = (
    "jobs:read,jobs:write key=x",
    "decrypt key=other-*",
    "encrypt key=def* context=env=prod,service=*",
)
_PLAINTEXT: Final = b64encode(bytes(SIZE)).decode()
_BODY: Final = json.dumps({"plaintext": _PLAINTEXT, "context": CONTEXT})
_PLAIN: Final = json.dumps({"plaintext": _PLAINTEXT})
ABOUT: Final = f"{PROCESSES} API processes; one connection reaches one of them. Client: `wrk`, one thread."
_RATE: Final = Scale(key="rate", unit="requests/s", digits=0, more_is_better=True)
_CPU: Final = Scale(key="cpu_request_s", unit="µs of processor a request", factor=1e6, digits=0)
_P50, _P99 = (Scale(key=key, factor=1e3) for key in ("p50_s", "p99_s"))


@dataclass(frozen=True, slots=True)
class Server:
    """One way to answer: what is sent to it, and the processes that answer."""

    name: str
    shot: Shot
    pids: Sequence[int]

    def loaded(self, connections: int, seconds: float) -> Reading:
        """What the client saw, and ``cpu_request_s`` of all the server's processes."""
        before = sum(map(used_s, self.pids))
        found = http_load.load(self.shot, connections, seconds)
        spent = sum(map(used_s, self.pids)) - before
        return {**found, "cpu_request_s": spent / found["requests"]}


@dataclass(frozen=True, slots=True)
class Way:
    """Settings of ours: credential, record; and what is sent."""

    name: str
    has_auth: bool
    durability: str = ""
    """``write``, ``fsync``, or empty for no audit log at all."""
    path: str = f"{PREFIX}/encrypt"
    body: str = _BODY
    method: str = "POST"
    scopes: tuple[str, ...] = SCOPES
    settings: str = ""
    """Further tables of the settings."""


WAYS: Final = (
    Way("kms: token, audit write", has_auth=True, durability="write"),
    Way("kms: token, audit fsync", has_auth=True, durability="fsync"),
    Way("kms: token, no audit log", has_auth=True),
    Way("kms: no credential, no audit log", has_auth=False),
)


def main() -> None:
    options = report.options(
        "overhead",
        "POST /encrypt with and without authentication and audit, in turn.",
        runs=5,
        budget_s=40.0,
        seconds=1.0,
        dir="/var/tmp",  # noqa: S108 -- a disk is the point: fsync waits for it
    )
    if http_load.CLIENT != "wrk":
        say("SKIPPED: wrk is NOT INSTALLED, and a slower client would be what is measured")
        return
    with ExitStack() as stack:
        name = tempfile.TemporaryDirectory(
            prefix="kms-bench-", dir=report.place(options.given.dir), ignore_cleanup_errors=True
        )
        folder = Path(stack.enter_context(name))
        servers = [stack.enter_context(ours(way, folder / str(at))) for at, way in enumerate(WAYS)]
        budget = options.budget(len(CONNECTIONS))
        parts = [
            compared(f"POST /encrypt, {SIZE:,} B", servers, connections, options, budget.share())
            for connections in CONNECTIONS
        ]
    options.write([*parts, ABOUT])


def compared(
    title: str, servers: Sequence[Server], connections: int, options: report.Options, share_s: float
) -> str:
    """A table of these servers, loaded in turn."""
    contenders = [
        Contender(server.name, _run(server, connections, options.given.seconds)) for server in servers
    ]
    found = options.keep(f"{title}, {connections}", in_turn(contenders, options.plan, share_s))
    more: dict[str, Cell] = {
        "p50 ms": _P50.median,
        "p99 ms": _P99.median,
        _CPU.unit: _CPU.median,
        "spread of that": _CPU.spread,
    }
    return report.table(
        f"{title}, {connections} connection{'s' * (connections > 1)}", found, _RATE, more=more
    )


def _run(server: Server, connections: int, seconds: float) -> Callable[[], Reading]:
    return lambda: server.loaded(connections, seconds)


# -- ours --------------------------------------------------------------------------------------------


@contextmanager
def ours(way: Way, state: Path) -> Iterator[Server]:
    """The service, ready. Without Redis: single calls do not ask it."""
    token, port = _prepared(way, state), running.free_port()
    argv = [*PYTHON, "kms_api.main", "--config", str(state / "kms.toml")]
    env = _environ(state) | {"KMS_PORT": str(port)}
    if not way.durability:
        env |= {"PYTHONPATH": str(ROOT / "benchmarks/no_audit_log")}
    with running.started(argv, env, f"http://127.0.0.1:{port}/livez") as leader:
        pids = _answering(leader)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        shot = Shot(f"http://127.0.0.1:{port}{way.path}", way.body, headers, way.method)
        yield Server(way.name, shot, pids)


def _answering(leader: int) -> Sequence[int]:
    """The processes of the service, once all are there."""
    ends = time.monotonic() + START_S
    while len(found := descendants(leader)) < PROCESSES:
        if time.monotonic() > ends:
            raise RuntimeError(f"of {PROCESSES} processes there are {len(found)}")
        time.sleep(0.05)
    return found


def _prepared(way: Way, state: Path) -> str:
    """Settings, keys and, where one is asked for, a token."""
    state.mkdir()
    text = f"[kms.server]\nprocesses = {PROCESSES}\n[kms.log]\nlevel = 'off'\n"
    text += f"[kms.audit]\ndurability = '{way.durability or 'write'}'\n"
    text += "[kms.auth]\nmode = 'required'\n" if way.has_auth else ""
    text += way.settings
    (state / "kms.toml").write_text(text)
    up.make_dev_keys(load_settings(state / "kms.toml", _environ(state)))
    if not way.has_auth:
        return ""
    return tokens.create(state / "tokens.json", TokenRequest("ci", "default", way.scopes, timedelta(days=1)))[
        1
    ]


def _environ(state: Path) -> dict[str, str]:
    own = {"HOME": str(state), "KMS_STATE_DIR": str(state), "KMS_REDIS_URL": "unix:///nonexistent.sock"}
    return {**environ(), **own}


# -- theirs ------------------------------------------------------------------------------------------


@contextmanager
def theirs(folder: Path, *, has_audit: bool, body: str = _PLAIN, method: str = "POST") -> Iterator[Server]:
    """A dev server, in memory; its audit log is a file on the same disk as ours."""
    folder.mkdir()
    server = Bao(folder, audit=folder / "audit.log" if has_audit else None)
    try:
        shot = Shot(
            f"{server.url}/v1/transit/encrypt/{server.new_key()}",
            body,
            {"X-Vault-Token": server.token()},
            method,
        )
        yield Server(f"OpenBao transit, {'file audit' if has_audit else 'no audit'}", shot, [server.pid])
    finally:
        server.close()


if __name__ == "__main__":
    main()
