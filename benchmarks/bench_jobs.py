"""What a job costs over a bare Celery task on the same broker, and what an item costs in a bulk job.

The peer is a Celery worker with the same settings and pool whose task does nothing but say so in Redis. The
end of a job is its record in the stream of transitions, which is read as the peer's word is: blocking.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.jobs_install import (
    Callers,
    Ends,
    Install,
    Nothings,
    installed,
    largest_bytes,
    resident_bytes,
    wait,
)
from benchmarks.measure import Contender, Plan, Reading, Series, descendants, in_turn
from benchmarks.report import Scale

from kms_core.context import Context
from kms_core.jobs.desk import Terms
from kms_core.policy import Principal
from kms_core.wire import JobItem

WHO: Final = Principal("local")
CONTEXT: Final = "env=prod,service=api"
ITEM_BYTES: Final = 1024
SIZES: Final = (100, 1_000, 10_000, 100_000)
_TERMS: Final = Terms(WHO, "encrypt", Context.parse(CONTEXT))
_SENDERS: Final = 4
_SETTLE_S: Final = 2.0
_QUEUED: Final = 2_000
_BODY: Final = {"kind": "encrypt", "context": CONTEXT, "items": [{"plaintext": "c2VjcmV0"}]}
_RATE: Final = Scale(key="rate", unit="a second", digits=0, more_is_better=True)
_P99: Final[dict[str, report.Cell]] = {"p99 ms": Scale(key="p99_s", factor=1e3).median}
Send = Callable[[int], None]
Await = Callable[[int], None]


def main() -> None:
    options = report.options(
        "jobs",
        "Jobs and bare Celery tasks in turn on one broker.",
        runs=5,
        budget_s=240.0,
        jobs=1000,
        singles=200,
        fsync="always",
        dir=tempfile.gettempdir(),
    )
    given = options.given
    with (
        tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(given.dir)) as name,
        installed(Path(name), given.fsync) as install,
    ):
        waiting = _queued(install)
        install.api()
        pids = install.worker("worker1"), install.bare()
        wait(lambda: not install.redis.zcard("kms:open"))  # what was queued for its size is done
        idle = [largest_bytes(pid) for pid in (install.running["api"][0].pid, pids[0])]
        Nothings(install).send(0)
        Nothings(install).await_end(1)
        budget = options.budget(4)
        parts = [
            f"Valkey on a unix socket, AOF `{given.fsync}`, two pool processes each; state in `{given.dir}`.",
            _single(install, options, budget.share()),
            _pipelined(install, options, budget.share()),
            _bulk(install, options.plan, budget.share()),
            _sizes(install, options.plan, budget.share()),
            _memory(waiting, idle, *map(resident_bytes, pids)),
        ]
        install.worker("worker2")
        parts.append(_two_workers(install))
    options.write(parts)


# -- single jobs -------------------------------------------------------------------------------------


def _ways(install: Install) -> list[tuple[str, Send, Callable[[], Await]]]:
    """How a job is sent, and how its end is awaited: ours first."""
    nothings, callers = Nothings(install), Callers(install.port, _BODY)
    items = [JobItem(plaintext=b"secret")]

    def ours(number: int) -> None:
        del number
        install.core.desk.items(_TERMS, items)

    def ends() -> Await:
        return Ends(install).await_end

    return [
        ("job of one item, sent in process", ours, ends),
        ("the same over HTTP", callers.send, ends),
        ("bare Celery, a task that does nothing", nothings.send, lambda: nothings.await_end),
    ]


def _single(install: Install, options: report.Options, seconds: float) -> str:
    contenders = [
        Contender(name, functools.partial(_one_by_one, send, ends, options.given.singles))
        for name, send, ends in _ways(install)
    ]
    found = in_turn(contenders, options.plan, seconds)
    scale = Scale(key="p50_s", unit="ms from sending to the end", factor=1e3)
    title = f"One at a time, worker idle: {options.given.singles} in a row"
    return report.table(title, found, scale, more=_P99)


def _one_by_one(send: Send, ends: Callable[[], Await], count: int) -> Reading:
    times = []
    await_end = ends()
    for number in range(count):
        begun = time.perf_counter()
        send(number)
        await_end(1)
        times.append(time.perf_counter() - begun)
    times.sort()
    return {"p50_s": times[count // 2], "p99_s": times[count * 99 // 100]}


def _pipelined(install: Install, options: report.Options, seconds: float) -> str:
    contenders = [
        Contender(name, functools.partial(_all_at_once, send, ends, options.given.jobs))
        for name, send, ends in _ways(install)
    ]
    found = in_turn(contenders, options.plan, seconds)
    sent: dict[str, report.Cell] = {"sent in s": Scale(key="sent_s").median}
    title = f"{options.given.jobs:,} at once from {_SENDERS} threads, until the last has ended"
    return report.table(title, found, _RATE, more=sent)


def _all_at_once(send: Send, ends: Callable[[], Await], count: int) -> Reading:
    await_end = ends()
    begun = time.perf_counter()
    with ThreadPoolExecutor(_SENDERS) as pool:
        list(pool.map(send, range(count)))
    sent = time.perf_counter()
    await_end(count)
    return {"rate": count / (time.perf_counter() - begun), "sent_s": sent - begun}


# -- bulk --------------------------------------------------------------------------------------------


def _items(count: int) -> Iterator[JobItem]:
    plaintext = os.urandom(ITEM_BYTES)
    return (JobItem(plaintext=plaintext) for _ in range(count))


def _bulk_job(install: Install, jobs: int, items: int) -> Reading:
    """Accepted, then done: ``work_s`` begins when the last job is accepted."""
    ends = Ends(install)
    used = _used_s(install)
    begun = time.perf_counter()
    ids = [install.core.desk.items(_TERMS, _items(items)).job_id for _ in range(jobs)]
    accepted = time.perf_counter()
    ends.await_end(jobs)
    done = time.perf_counter()
    for job_id in ids:
        install.core.shop.spool.delete(job_id)
    return {
        "rate": jobs * items / (done - begun),
        "accept_rate": jobs * items / (accepted - begun),
        "per_item_s": (done - begun) / (jobs * items),
        "worker_cpu_s": (_used_s(install) - used) / (jobs * items),
    }


def _calls(install: Install, count: int) -> Reading:
    """The same work by plain calls, in one process and no job."""
    begun = time.perf_counter()
    for item in _items(count):
        install.core.kms.encrypt(WHO, item.plaintext or b"", _TERMS.context)
    return {"rate": count / (time.perf_counter() - begun)}


def _bulk(install: Install, plan: Plan, seconds: float) -> str:
    contenders = [
        Contender("8 jobs of 1,000 items", functools.partial(_bulk_job, install, 8, 1_000)),
        Contender("1 job of 100,000 items", functools.partial(_bulk_job, install, 1, 100_000)),
        Contender("8,000 calls of Kms.encrypt, one process", functools.partial(_calls, install, 8_000)),
    ]
    found = in_turn(contenders, Plan(min(3, plan.runs), plan.foreign, plan.tries), seconds)
    accept = Scale(key="accept_rate", unit="", digits=0).median
    title = f"Items of {ITEM_BYTES:,} bytes, from the first one given to the end of the last job"
    return report.table(title, found, _RATE, more={"accepted a second": accept, **_CPU})


def _sizes(install: Install, plan: Plan, seconds: float) -> str:
    contenders = [
        Contender(f"{size:,} items", functools.partial(_bulk_job, install, 1, size)) for size in SIZES
    ]
    found = in_turn(contenders, Plan(min(3, plan.runs), plan.foreign, plan.tries), seconds)
    scale = Scale(key="per_item_s", unit="µs an item", factor=1e6, digits=0)
    return report.table("One bulk job", found, scale, more=_CPU)


_CPU: Final[dict[str, report.Cell]] = {
    "worker µs an item": Scale(key="worker_cpu_s", factor=1e6, digits=0).median
}


def _used_s(install: Install) -> float:
    """Processor seconds of our workers so far."""
    total = 0
    for name, (process, _) in install.running.items():
        if name.startswith("worker"):
            for pid in (process.pid, *descendants(process.pid)):
                total += sum(
                    map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
                )
    return total / os.sysconf("SC_CLK_TCK")


# -- room --------------------------------------------------------------------------------------------


def _queued(install: Install) -> tuple[float, float]:
    """Bytes of Redis memory and of its append-only file for each job that waits; they are done later."""
    line, disk = install.redis, install.place.data_dir / "appendonlydir"

    def sizes() -> tuple[int, int]:
        return line.info("memory")["used_memory"], sum(file.stat().st_size for file in disk.iterdir())

    items = [JobItem(plaintext=b"secret")]
    install.core.desk.items(_TERMS, items)
    before = sizes()
    for _ in range(_QUEUED):
        install.core.desk.items(_TERMS, items)
    after = sizes()
    return (after[0] - before[0]) / _QUEUED, (after[1] - before[1]) / _QUEUED


def _memory(waiting: tuple[float, float], idle: Sequence[int], ours: int, bare: int) -> str:
    rows = [
        ["Redis memory, a queued job and its message", f"{waiting[0]:,.0f} bytes"],
        ["append-only file, the same", f"{waiting[1]:,.0f} bytes"],
        ["the API, asked for nothing yet (RSS)", f"{idle[0] / 2**20:,.0f} MiB"],
        [f"the largest process of a worker, after {_QUEUED:,} jobs (RSS)", f"{idle[1] / 2**20:,.0f} MiB"],
        ["a worker and its two pool processes (PSS)", f"{ours / 1e6:,.0f} MB"],
        ["the bare Celery worker, the same", f"{bare / 1e6:,.0f} MB"],
    ]
    return report.grid("Room", ["", ""], rows)


def _two_workers(install: Install) -> str:
    """After the others: the second worker runs from here on."""
    rows = []
    for names in (("worker1", "worker2"), ("worker1",)):
        if "worker2" not in names:
            install.end("worker2")
        time.sleep(_SETTLE_S)
        found = Series("", [_bulk_job(install, 8, 1_000) for _ in range(3)])
        rows.append([str(len(names)), str(2 * len(names)), _RATE.median(found), _RATE.spread(found)])
    columns: Sequence[str] = ("workers", "pool processes", "items a second, median", "spread")
    return report.grid(f"8 jobs of 1,000 items; this machine has {os.cpu_count()} processors", columns, rows)


if __name__ == "__main__":
    main()
