"""What one narrow token that misbehaves costs another tenant: its POST /encrypt beside each kind of crowd.

``kms up`` with one API process and default bounds. A crowd is connections of one token of tenant ``bad`` (the
logins need none) that hold what they get and send or read next to nothing; those that the service ends come
again, a hundred a second at most. The other tenant is ``wrk`` with four connections. The goal is a p99 of at
most twice the one alone.
"""

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import httpx2 as httpx
from benchmarks import http_load, report, running
from benchmarks.bench_overhead import CONTEXT, SIZE
from benchmarks.children import KMS
from benchmarks.http_load import Shot
from benchmarks.measure import Contender, Reading, in_turn
from benchmarks.report import Cell, Scale

from kms_core.auth import tokens
from kms_core.auth.tokens import TokenRequest
from kms_protocol.wire import ENDED, PREFIX
from support.service import b64

CONNECTIONS: Final = 4
SETTLE_S: Final = 2.0
WAIT_S: Final = 60.0
_MIB: Final = 1024 * 1024
_RESULT_BYTES: Final = 24 * _MIB
_DRIP_S: Final = 0.5
_TICK_S: Final = 0.1
_AGAIN_A_TICK: Final = 10
_P99: Final = Scale(key="p99_s", unit="ms p99", factor=1e3)
_P50: Final = Scale(key="p50_s", factor=1e3)
_RATE: Final = Scale(key="rate", digits=0)
_REFUSED: Final = Scale(key="ended", digits=0)
_LARGE: Final = 31 * _MIB
_SETTINGS: Final = """
[kms.auth]
mode = "required"
[kms.log]
level = "off"
[kms.jobs]
queues = ["kms.files", "kms.maintenance"]  # a bulk job is taken by no worker
"""
Maker = Callable[["Crowded"], "Kind"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request of a crowd: how many, what each sends at once, and what now and then."""

    count: int
    request: bytes
    drip: bytes = b""


@dataclass(frozen=True, slots=True)
class Crowded:
    """The service, and what the crowd asks for."""

    port: int
    shot: Shot
    token: str
    result: str

    def head(self, method: str, path: str, *lines: str) -> bytes:
        """A request of the token that misbehaves."""
        given = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self.token}"]
        return "\r\n".join([*given, *lines, "", ""]).encode()


def _uploads(at: Crowded) -> Kind:
    head = at.head("POST", f"{PREFIX}/files/encrypt", f"X-KMS-Context: {CONTEXT}", "Content-Length: 1000000")
    return Kind(300, head + b"slow", b"x")


def _bodies(at: Crowded) -> Kind:
    return Kind(
        32, at.head("POST", f"{PREFIX}/jobs", f"Content-Length: {_LARGE}") + b" " * 60_000, b" " * 1000
    )


def _streams(at: Crowded) -> Kind:
    return Kind(200, at.head("GET", f"{PREFIX}/jobs/events"))


def _readers(at: Crowded) -> Kind:
    return Kind(40, at.head("GET", f"{PREFIX}/jobs/{at.result}/result"))


def _logins(at: Crowded) -> Kind:
    del at
    return Kind(
        100, b"POST /ui/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\ntoken=", b"x"
    )


CROWDS: Final[dict[str, Sequence[Maker]]] = {
    "alone": (),
    "300 idle uploads": (_uploads,),
    "32 JSON bodies of 31 MiB that drip": (_bodies,),
    "200 event streams": (_streams,),
    "40 readers that take nothing": (_readers,),
    "100 unfinished logins": (_logins,),
    "all of them": (_uploads, _bodies, _streams, _readers, _logins),
}


def main() -> None:
    options = report.options(
        "crowd",
        "POST /encrypt of one tenant beside a token of another that misbehaves.",
        runs=5,
        budget_s=150.0,
        seconds=3.0,
        dir=tempfile.gettempdir(),
    )
    with (
        tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(options.given.dir)) as name,
        crowded(Path(name)) as at,
    ):
        contenders = [
            Contender(title, _run(at, makers, options.given.seconds)) for title, makers in CROWDS.items()
        ]
        title = f"POST /encrypt, {SIZE:,} B, {CONNECTIONS} connections"
        found = options.keep(title, in_turn(contenders, options.plan, options.budget(1).share()))
    more: dict[str, Cell] = {
        "p50 ms": _P50.median,
        "requests/s": _RATE.median,
        "connections ended": _REFUSED.median,
    }
    options.write([report.table(title, found, _P99, more=more), _ABOUT])


_ABOUT: Final = (
    "Every answer of the other tenant was 200. `connections ended` are those that the service refused or "
    "gave up within a run. Client and service share the processors."
)


def _run(at: Crowded, makers: Sequence[Maker], seconds: float) -> Callable[[], Reading]:
    def run() -> Reading:
        with crowd(at, [make(at) for make in makers]) as members:
            time.sleep(SETTLE_S)
            found = http_load.load(at.shot, CONNECTIONS, seconds)
            return {**found, "ended": float(members.ended)}

    return run


# -- the crowd ---------------------------------------------------------------------------------------


class Member:
    """One connection of the crowd."""

    def __init__(self, port: int, kind: Kind) -> None:
        self.kind = kind
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        self._socket.sendall(kind.request)
        self._socket.settimeout(0)

    def has_ended(self) -> bool:
        """Whether it was answered with a refusal, or closed; a stream or download that began goes on."""
        try:
            answer = self._socket.recv(10, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return not answer.startswith(b"HTTP/1.1 2")

    def drip(self) -> None:
        with suppress(OSError):
            self._socket.send(self.kind.drip)

    def close(self) -> None:
        self._socket.close()


class Members(threading.Thread):
    """Keeps a crowd as large as it is meant to be. ``ended`` counts connections that the service ended."""

    def __init__(self, port: int, kinds: Sequence[Kind]) -> None:
        super().__init__(daemon=True)
        self.ended = 0
        self._port = port
        self._over = threading.Event()
        self._members = [Member(port, kind) for kind in kinds for _ in range(kind.count)]

    def run(self) -> None:
        dripped = time.monotonic()
        while not self._over.wait(_TICK_S):
            self._replace()
            if time.monotonic() - dripped > _DRIP_S:
                dripped = time.monotonic()
                for member in self._members:
                    member.drip()

    def _replace(self) -> None:
        over = [number for number, member in enumerate(self._members) if member.has_ended()]
        for number in over[:_AGAIN_A_TICK]:
            self.ended += 1
            self._members[number].close()
            self._members[number] = Member(self._port, self._members[number].kind)

    def close(self) -> None:
        self._over.set()
        self.join()
        for member in self._members:
            member.close()


@contextmanager
def crowd(at: Crowded, kinds: Sequence[Kind]) -> Iterator[Members]:
    """A crowd that stays until the block ends."""
    members = Members(at.port, kinds)
    members.start()
    try:
        yield members
    finally:
        members.close()


# -- the service -------------------------------------------------------------------------------------


@contextmanager
def crowded(folder: Path) -> Iterator[Crowded]:
    """The service with a token of each tenant, and a large result."""
    state, port, config = folder / "state", running.free_port(), folder / "kms.toml"
    config.write_text(_SETTINGS)
    state.mkdir()
    tokens_path = state / "tokens.json"
    good = tokens.create(tokens_path, TokenRequest("good", "good", ("encrypt",), timedelta(days=1)))[1]
    scopes = (f"encrypt context={CONTEXT}", "jobs:read,jobs:write")
    bad = tokens.create(tokens_path, TokenRequest("bad", "bad", scopes, timedelta(days=1)))[1]
    argv = [*KMS, "up", "--config", str(config), *running.where(state, port)]
    url = f"http://127.0.0.1:{port}"
    with (folder / "kms-up.log").open("ab") as errors, running.ready(argv, errors):
        body = f'{{"plaintext": "{b64(bytes(SIZE))}", "context": "{CONTEXT}"}}'
        shot = Shot(f"{url}{PREFIX}/encrypt", body, {"Authorization": f"Bearer {good}"})
        with httpx.Client(base_url=url + PREFIX, timeout=WAIT_S, trust_env=False) as client:
            client.headers["Authorization"] = f"Bearer {bad}"
            result = _result(client)
        yield Crowded(port, shot, bad, result)


def _result(client: httpx.Client) -> str:
    """The id of a job whose result is large. Raises RuntimeError if it does not end."""
    headers = {"X-KMS-Context": CONTEXT}
    made = client.post("/files/encrypt", content=bytes(_RESULT_BYTES), headers=headers).raise_for_status()
    job_id, ends = str(made.json()["job_id"]), time.monotonic() + WAIT_S
    while client.get(f"/jobs/{job_id}").raise_for_status().json()["state"] not in ENDED:
        if time.monotonic() > ends:
            raise RuntimeError("the job did not end")
        time.sleep(0.05)
    return job_id


if __name__ == "__main__":
    main()
