"""What instrumentation costs POST /encrypt, and how long a scrape takes.

The first is the processor time of one call in process, with every metric and count and with none of them. The
second asks the server of a worker's parent for /metrics, over 8 processes that have moved every metric there
is with the labels of a busy service, and gauges of 100 keys: each scrape sums the files of all of them.
"""

import functools
import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Final

from benchmarks import bench_auth, report
from benchmarks.children import ROOT, environ
from benchmarks.measure import Contender, Reading, Series, in_turn, used_s
from benchmarks.report import Cell, Scale
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from kms_core.observability import logs, metrics, multiprocess_metrics
from kms_core.operation import UsageCounters

PROCESSES: Final = 8
KEYS: Final = 100
SCRAPES: Final = 20
START_S: Final = 60.0
_CALL: Final = Scale(unit="µs of processor a call", factor=1e6, digits=1)
_SCRAPE: Final = Scale(unit="ms a scrape", factor=1e3, digits=1)
_SPENT: Final = Scale(key="spent_s", factor=1e3, digits=1)
_SIZE: Final = Scale(key="bytes", factor=1e-3, digits=0)


def main() -> None:
    options = report.options(
        "metrics", "The cost of instrumentation, and of a scrape.", runs=15, budget_s=35.0
    )
    budget = options.budget(2)
    with tempfile.TemporaryDirectory(prefix="kms-bench-") as name:
        folder = Path(name)
        with _callers(folder) as contenders:
            found = in_turn(contenders, options.plan, budget.share())
        parts = [
            report.table(
                "POST /encrypt, 1,024 B, in process, no credential", options.keep("calls", found), _CALL
            )
        ]
        parts += _share(found)
        with _worker(folder / "metrics") as server:
            found = in_turn([_scrapes(*server)], options.plan, budget.share())
        title = f"/metrics over {PROCESSES} processes and {KEYS} keys"
        more: dict[str, Cell] = {"ms of processor": _SPENT.median, "kB": _SIZE.median}
        parts.append(report.table(title, found, _SCRAPE, more=more))
    options.write(parts)


def _share(found: Sequence[Series]) -> list[str]:
    """Of each process, which is compared with itself."""
    pairs = zip(found[::2], found[1::2], strict=True)
    medians = ((full.name, full.median("seconds"), bare.median("seconds")) for full, bare in pairs)
    return [
        f"Instrumentation of {name}: {(with_all - with_none) / with_all:.1%} of a call."
        for name, with_all, with_none in medians
        if with_all and with_none
    ]


# -- calls -------------------------------------------------------------------------------------------

CALL: Final = """
import os
import sys
from pathlib import Path
from kms_core.observability import multiprocess_metrics
multiprocess_metrics.share(os.environ)
from benchmarks import bench_metrics
bench_metrics.answer(Path(sys.argv[1]))
"""


def answer(state: Path) -> None:
    """Make a run of calls for each line of input, and print the seconds of one. ``silent``: no metrics."""
    logs.configure("error", json=True)
    application = bench_auth.built(state, "")
    print(flush=True)
    for line in sys.stdin:
        with silent() if line.strip() == "silent" else nullcontext():
            print(bench_auth.run(application, [], {})["seconds"], flush=True)


@contextmanager
def _callers(folder: Path) -> Iterator[list[Contender]]:
    """A process alone, and one of several, whose metrics are in files that they share."""
    (folder / "shared").mkdir()
    shared = {multiprocess_metrics.FOLDER: str(folder / "shared"), multiprocess_metrics.SLOT: "api-1"}
    with (
        _python(CALL, str(folder / "alone")) as alone,
        _python(CALL, str(folder / "several"), **shared) as several,
    ):
        yield [
            Contender("a process alone", functools.partial(_asked, alone, "")),
            Contender("alone, without metrics", functools.partial(_asked, alone, "silent")),
            Contender("one of several", functools.partial(_asked, several, "")),
            Contender("one of several, without metrics", functools.partial(_asked, several, "silent")),
        ]


def _asked(process: subprocess.Popen[str], word: str) -> Reading:
    if not (process.stdin and process.stdout):
        raise RuntimeError("no pipe to the process")
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return {"seconds": float(process.stdout.readline())}


@contextmanager
def silent() -> Iterator[None]:
    """No metric moves and nothing is counted: the code as if it had not been written, but for the calls."""
    places: list[tuple[object, str, object]] = [
        (Counter, "inc", _nothing),
        (Gauge, "inc", _nothing),
        (Gauge, "dec", _nothing),
        (Histogram, "observe", _nothing),
        (MetricWrapperBase, "labels", _itself),
        (UsageCounters, "note", _nothing),
    ]
    kept = [(owner, name, vars(owner)[name]) for owner, name, _ in places]
    for owner, name, instead in places:
        setattr(owner, name, instead)
    try:
        yield
    finally:
        for owner, name, was in kept:
            setattr(owner, name, was)


def _nothing(*_: object) -> None:
    pass


def _itself(metric: object, *_: object) -> object:
    return metric


# -- scrapes -----------------------------------------------------------------------------------------

MOVE: Final = """
import sys
from benchmarks import bench_metrics
bench_metrics.move(int(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""
SERVE: Final = """
import socket
import sys
from kms_core.auth.authenticator import MetricsAccess
from kms_core.auth.policy import AllowAll
from kms_core.proxies import Proxies
from kms_worker.metrics_server import MetricsApp, MetricsServer
listener = socket.create_server(("127.0.0.1", 0))
access = MetricsAccess("open", None, AllowAll(), Proxies(()))
server = MetricsServer(listener, MetricsApp(access, (), lambda: True))
print()
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


def move(number: int) -> None:
    """Every metric of one process, under the labels that a busy service has."""
    backends = ("age", "cosmian", "transit", "awskms")
    metrics.announce(backends, ("hook-a", "hook-b"))
    operations = ("encrypt", "decrypt", "generate_data_key", "rewrap", "reseal", "rotate")
    results = ("ok", "decrypt_failed", "forbidden", "backend_unavailable")
    for operation, backend, mode, result in product(operations, backends, ("sync", "job"), results):
        metrics.OPERATION_SECONDS.labels(operation, backend, mode, result).observe(0.001)
    for route, status in product((f"/route/{at}" for at in range(20)), ("200", "400", "401", "403", "503")):
        metrics.HTTP_SECONDS.labels(route, "POST", status).observe(0.001)
    for backend, call, result in product(
        backends, ("wrap", "unwrap", "versions", "health"), ("ok", "refused")
    ):
        metrics.BACKEND_SECONDS.labels(backend, call, result).observe(0.001)
    for key in range(KEYS):
        labels = (f"key-{key}", backends[key % len(backends)])
        metrics.KEY_AGE_SECONDS.labels(*labels).set(number)
        metrics.KEY_BUDGET.labels(*labels).set(0.5)
        metrics.KEY_ROTATION_DUE.labels(*labels).set(0)
    for kind in operations[:4]:
        metrics.JOB_SECONDS.labels(kind).observe(1)
        metrics.JOB_WAIT_SECONDS.labels(kind).observe(1)


@contextmanager
def _worker(folder: Path) -> Iterator[tuple[int, int]]:
    """The processes, each with its files in ``folder``, and the server that sums them: its id and port."""
    folder.mkdir()
    own = {multiprocess_metrics.FOLDER: str(folder)}
    with ExitStack() as stack:
        for number in range(PROCESSES):
            stack.enter_context(_python(MOVE, str(number), **own))
        server = stack.enter_context(_python(SERVE, **own))
        yield server.pid, int(server.stdout.readline()) if server.stdout else 0


@contextmanager
def _python(program: str, *words: str, **own: str) -> Iterator[subprocess.Popen[str]]:
    """A program that prints an empty line when it is ready, and ends with its input."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environ(), **own, "PYTHONPATH": path},
        text=True,
    ) as process:
        if not (process.stdout and process.stdout.readline()):
            raise RuntimeError("a process did not get ready")
        yield process
        if process.stdin:
            process.stdin.close()


def _scrapes(pid: int, port: int) -> Contender:
    def run() -> Reading:
        started, before, size = time.perf_counter(), used_s(pid), 0
        for _ in range(SCRAPES):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
            connection.request("GET", "/metrics")
            size = len(connection.getresponse().read())
            connection.close()
        seconds, spent = time.perf_counter() - started, used_s(pid) - before
        return {"seconds": seconds / SCRAPES, "spent_s": spent / SCRAPES, "bytes": float(size)}

    return Contender("the worker's parent", run)


if __name__ == "__main__":
    main()
