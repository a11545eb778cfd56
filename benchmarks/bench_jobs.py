"""What a job costs over a bare Celery task on the same broker, and what an item costs in a bulk job.

The peer is a Celery worker with the same settings and pool whose task does nothing but say so in Redis. The
end of a job is its record in the stream of transitions, which is read as the peer's word is: blocking. The
peer of items is their sealing in as many processes as the worker has, and nothing else.
"""

import functools
import multiprocessing
import multiprocessing.pool
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks import drive_kms, report
from benchmarks.jobs_install import Callers, Ends, Install, Nothings, installed, resident_bytes, wait
from benchmarks.measure import Contender, Reading, descendants, in_turn, used_s
from benchmarks.report import Scale

from kms_core.auth.policy import Principal
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol.wire import JobIn, JobItem

WHO: Final = Principal("local")
CONTEXT: Final = "env=prod,service=api"
ITEM_BYTES: Final = drive_kms.ITEM_BYTES
PROCESSES: Final = 2
_WORKER: Final = "worker of 2"
TERMS: Final = SubmissionOptions.of(WHO, JobIn(kind="encrypt", context=CONTEXT))
_SENDERS: Final = 4
_MIB: Final = 1024 * 1024
_QUEUED_S: Final = 300.0
_SCALED_ITEMS: Final = 20_000
_WARM_ITEMS: Final = 1_000
_BODY: Final = {"kind": "encrypt", "context": CONTEXT, "items": [{"plaintext": "c2VjcmV0"}]}
_RATE: Final = Scale(key="rate", unit="a second", digits=0, more_is_better=True)
Send = Callable[[int], None]
Await = Callable[[int], object]


def main() -> None:
    options = report.options(
        "jobs",
        "Jobs and bare Celery tasks in turn on one broker.",
        runs=5,
        budget_s=150.0,
        jobs=1000,
        singles=200,
        items=100_000,
        queued=2_000,
        fsync="always",
        inline_bytes=16_384,
        dir=tempfile.gettempdir(),
    )
    given = options.given
    with (
        tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(given.dir)) as name,
        installed(Path(name), given.fsync, inline_bytes=given.inline_bytes) as install,
    ):
        waiting = _queued(install, given.queued)
        api = install.api()
        pids = {"API": api, "worker": install.worker(_WORKER), "bare": install.bare()}
        wait(
            lambda: not install.redis.zcard("kms:open"), _QUEUED_S, "the end of what was queued for its size"
        )
        Nothings(install).send(0)
        Nothings(install).await_end(1)
        idle = {name: resident_bytes(pid) for name, pid in pids.items()}
        budget = options.budget(4)
        parts = [
            f"Valkey on a unix socket, AOF `{given.fsync}`, `inline_bytes = {given.inline_bytes}`; "  # noqa: ISC004
            f"two pool processes each; state in `{given.dir}`.",
            _single(install, options, budget.share()),
            _pipelined(install, options, budget.share()),
            _bulk(install, options, budget.share()),
        ]
        used = {name: resident_bytes(pid) for name, pid in pids.items()}
        options.note("room", "idle", idle)
        options.note("room", "queued job", waiting)
        parts += [_scaling(install, options, budget.share()), _memory(waiting, idle, used)]
    options.write(parts)


# -- single jobs -------------------------------------------------------------------------------------


def _ways(install: Install) -> list[tuple[str, Send, Callable[[], Await]]]:
    """How a job is sent, and how its end is awaited: ours first."""
    nothings, callers = Nothings(install), Callers(install.port, _BODY)
    items = [JobItem(plaintext=b"secret")]

    def ours(number: int) -> None:
        del number
        install.core.submitter.items(TERMS, items)

    def ends() -> Await:
        return Ends(install.redis).await_end

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
    found = options.keep("one at a time", in_turn(contenders, options.plan, seconds))
    scale = Scale(key="p50_s", unit="ms from sending to the end", factor=1e3)
    title = f"One at a time, worker idle: {options.given.singles} in a row"
    return report.table(title, found, scale, more={"p99 ms": Scale(key="p99_s", factor=1e3).median})


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
        Contender(name, functools.partial(all_at_once, send, ends, options.given.jobs))
        for name, send, ends in _ways(install)
    ]
    found = options.keep("all at once", in_turn(contenders, options.plan, seconds))
    sent: dict[str, report.Cell] = {"sent in s": Scale(key="sent_s").median}
    title = f"{options.given.jobs:,} at once from {_SENDERS} threads, until the last has ended"
    return report.table(title, found, _RATE, more=sent)


def all_at_once(send: Send, ends: Callable[[], Await], count: int) -> Reading:
    await_end = ends()
    begun = time.perf_counter()
    with ThreadPoolExecutor(_SENDERS) as pool:
        list(pool.map(send, range(count)))
    sent = time.perf_counter()
    await_end(count)
    return {"rate": count / (time.perf_counter() - begun), "sent_s": sent - begun}


# -- bulk --------------------------------------------------------------------------------------------


def bulk_items(count: int) -> Iterator[JobItem]:
    plaintext = os.urandom(ITEM_BYTES)
    return (JobItem(plaintext=plaintext) for _ in range(count))


def bulk_job(install: Install, jobs: int, items: int) -> Reading:
    """From the first job given to the end of the last."""
    ends = Ends(install.redis)
    used = _used_s(install)
    begun = time.perf_counter()
    ids = [install.core.submitter.items(TERMS, bulk_items(items)).job_id for _ in range(jobs)]
    accepted = time.perf_counter()
    ends.await_end(jobs)
    done = time.perf_counter()
    for job_id in ids:
        install.core.worker_context.spool.delete(job_id)
    return {
        "seconds": done - begun,
        "rate": jobs * items / (done - begun),
        "accept_rate": jobs * items / (accepted - begun),
        "per_item_s": (done - begun) / (jobs * items),
        "worker_cpu_s": (_used_s(install) - used) / (jobs * items),
    }


def _calls(install: Install, count: int) -> Reading:
    """The same work by plain calls, in one process and no job."""
    begun = time.perf_counter()
    for item in bulk_items(count):
        install.core.kms.encrypt(WHO, item.plaintext or b"", TERMS.context)
    return {"rate": count / (time.perf_counter() - begun)}


def _crypto(pool: multiprocessing.pool.Pool, count: int) -> Reading:
    """Sealing alone, in the processes of the pool."""
    begun = time.perf_counter()
    pool.map(drive_kms.seal_items, [count // PROCESSES] * PROCESSES, chunksize=1)
    return {"rate": count / (time.perf_counter() - begun)}


def _bulk(install: Install, options: report.Options, seconds: float) -> str:
    large = options.given.items
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        pool.map(drive_kms.seal_items, [1] * PROCESSES, chunksize=1)
        contenders = [
            Contender("8 jobs of 1,000 items", functools.partial(bulk_job, install, 8, 1_000)),
            Contender(f"1 job of {large:,} items", functools.partial(bulk_job, install, 1, large)),
            Contender("8,000 calls of Kms.encrypt, one process", functools.partial(_calls, install, 8_000)),
            Contender("the crypto alone, two processes", functools.partial(_crypto, pool, 20_000)),
        ]
        few = replace(options.plan, runs=min(3, options.plan.runs))
        found = options.keep("bulk", in_turn(contenders, few, seconds))
    accept = Scale(key="accept_rate", unit="", digits=0).median
    used = Scale(key="worker_cpu_s", factor=1e6, digits=0).median
    title = f"Items of {ITEM_BYTES:,} bytes, from the first one given to the end of the last job"
    return report.table(title, found, _RATE, more={"accepted a second": accept, "worker µs an item": used})


def _used_s(install: Install) -> float:
    """Processor seconds of our workers so far."""
    workers = [process.pid for name, (process, _) in install.running.items() if name.startswith("worker")]
    return sum(used_s(pid) for worker in workers for pid in (worker, *descendants(worker)))


def _scaling(install: Install, options: report.Options, seconds: float) -> str:
    """One worker of one process and one of two, in turn; Redis and the sender have the same processors."""
    items = min(_SCALED_ITEMS, options.given.items)
    contenders = [
        Contender(name, functools.partial(_scaled, install, count, items))
        for name, count in (("two processes", PROCESSES), ("one process", 1))
    ]
    few = replace(options.plan, runs=min(3, options.plan.runs), warms=False)
    found = options.keep("processes", in_turn(contenders, few, seconds))
    title = f"One job of items of {ITEM_BYTES:,} bytes, by a worker of one or two processes"
    return report.table(title, found, _RATE)


def _scaled(install: Install, count: int, items: int) -> Reading:
    name = f"worker of {count}"
    if name not in install.running:
        for other in [each for each in install.running if each.startswith("worker")]:
            install.end(other)
        install.worker(name, concurrency=count)
        bulk_job(install, 1, _WARM_ITEMS)
    return bulk_job(install, 1, items)


# -- room --------------------------------------------------------------------------------------------


def _queued(install: Install, count: int) -> Reading:
    """Bytes of Redis memory and of its append-only file for each job that waits; they are done later."""
    line, disk = install.redis, install.place.data_dir / "appendonlydir"

    def sizes() -> tuple[int, int]:
        return line.info("memory")["used_memory"], sum(file.stat().st_size for file in disk.iterdir())

    items = [JobItem(plaintext=b"secret")]
    install.core.submitter.items(TERMS, items)
    before = sizes()
    for _ in range(count):
        install.core.submitter.items(TERMS, items)
    after = sizes()
    return {"memory": (after[0] - before[0]) / count, "disk": (after[1] - before[1]) / count}


def _memory(waiting: Reading, idle: Mapping[str, int], used: Mapping[str, int]) -> str:
    rows = [
        ["Redis memory, a queued job and its message", f"{waiting['memory']:,.0f} bytes", ""],
        ["append-only file, the same", f"{waiting['disk']:,.0f} bytes", ""],
    ]
    for name, what in (
        ("API", "an API process"),
        ("worker", "a worker and its two pool processes, shared pages once"),
        ("bare", "the bare Celery worker, the same"),
    ):
        rows.append([what, *(f"{sizes[name] / _MIB:,.0f} MiB" for sizes in (idle, used))])
    return report.grid("Room", ["", "idle, before the jobs above", "after them"], rows)


if __name__ == "__main__":
    main()
