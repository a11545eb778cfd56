"""How work is shared out: between a tenant with many jobs and one with few, and between two hosts.

Both count rather than time. A job of the small tenant is submitted when the one before it has ended, while
10,000 of the big tenant wait and two processes work. Two hosts are network namespaces with a worker each.
"""

import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

from benchmarks import report
from benchmarks.bench_jobs import TERMS, bulk_items
from benchmarks.jobs_install import Ends, Install, in_two_processes, installed, wait
from benchmarks.measure import Contender, Reading, in_turn
from benchmarks.report import Cell, Scale
from benchmarks.running import free_port

from kms_core.auth.policy import Principal
from kms_core.jobs.store.redis_keys import job_key
from kms_protocol.wire import JobItem
from support.network_hosts import Host, hosts

BIG: Final = 10_000
WAITING: Final = 1_000
_BIG: Final = replace(TERMS, who=Principal("big", "big"))
_SMALL: Final = replace(TERMS, who=Principal("small", "small"))
_ITEMS: Final = [JobItem(plaintext=b"secret")]
_WARM: Final = 20
_SMALLS: Final = 10
_SMALLS_S: Final = 60.0
_LONG_ITEMS: Final = 50  # some 20 ms of work
_SHARED_OUT: Final = 200
_JOINS_S: Final = 2.0
_BEFORE: Final = Scale(key="worst", unit="jobs of the big tenant, worst", digits=0)
_MEDIAN: Final = Scale(key="median", digits=0)
_APART: Final = Scale(key="apart_s", unit="s until both are busy")
_SHARE: Final = Scale(key="share", factor=100, digits=0)


def main() -> None:
    options = report.options(
        "sharing",
        "Jobs of a small tenant behind a big one's, and two hosts.",
        runs=3,
        budget_s=200.0,
        big=BIG,
        waiting=WAITING,
        dir="/dev/shm",  # noqa: S108 -- jobs whose disk costs nothing
    )
    given, budget = options.given, options.budget(2)
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(given.dir)) as name:
        folder = Path(name)
        parts = [
            _fairness(folder / "fair", options, budget.share()),
            _hosts(folder / "hosts", options, budget.share()),
        ]
    options.write(parts)


# -- tenants -----------------------------------------------------------------------------------------


def _fairness(folder: Path, options: report.Options, seconds: float) -> str:
    """Every reading has an install of its own, since the queue of one would help or burden the next."""
    big = options.given.big
    name = f"behind {big:,} of another tenant"
    plan = replace(options.plan, warms=False)
    contender = Contender(name, functools.partial(_behind, folder, big))
    found = options.keep("small tenant", in_turn([contender], plan, seconds))
    title = "A job of a small tenant, two processes: jobs of the big one that start before it"
    return report.table(title, found, _BEFORE, more={"median": _MEDIAN.median})


def _behind(folder: Path, big: int) -> Reading:
    with tempfile.TemporaryDirectory(dir=_made(folder)) as name, installed(Path(name), "no") as install:
        submitter = install.core.submitter

        def fill(count: int) -> None:
            for _ in range(count):
                submitter.items(_BIG, _ITEMS)

        in_two_processes(big, fill)
        ends = Ends(install.redis)
        install.worker("worker")
        ends.await_end(_WARM)
        counts: list[int] = []
        until = time.monotonic() + _SMALLS_S
        while len(counts) < _SMALLS and (not counts or time.monotonic() < until):
            ends = Ends(install.redis)
            job = submitter.items(_SMALL, _ITEMS)
            counts.append(_started_before(ends, job.job_id))
            if not install.core.worker_context.store.page("big", state="queued", limit=1, before=None)[0]:
                break
    return {"worst": max(counts), "median": sorted(counts)[len(counts) // 2]}


def _started_before(ends: Ends, job_id: str) -> int:
    """Jobs that start after this one is queued and before it starts; returns when it has ended."""
    queued, count, before = False, 0, -1
    for found in ends.later():
        if found.job_id == job_id:
            queued = True
            if found.state == "running":
                before = count
            elif found.state == "succeeded":
                return before
        elif queued and found.state == "running":
            count += 1
    raise RuntimeError("the small tenant's job did not end")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- hosts -------------------------------------------------------------------------------------------


def _hosts(folder: Path, options: report.Options, seconds: float) -> str:
    waiting = options.given.waiting
    with hosts(2) as both:
        contenders = [
            Contender("both start together", functools.partial(_busy, folder, both, waiting, 0.0)),
            Contender("one joins another", functools.partial(_busy, folder, both, waiting, _JOINS_S)),
        ]
        plan = replace(options.plan, warms=False)
        found = options.keep("two hosts", in_turn(contenders, plan, seconds))
        kind = "network namespaces" if both[0].is_separate else "ONE HOST: no namespaces here"
    title = f"{waiting:,} jobs wait for two hosts of one process ({kind})"
    more: dict[str, Cell] = {f"% of the next {_SHARED_OUT} by the idler one": _SHARE.median}
    return report.table(title, found, _APART, more=more)


def _busy(folder: Path, both: Sequence[Host], waiting: int, joins_s: float) -> Reading:
    """From the first job that a host runs, or the first heartbeat of one that joins, until both run one."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory(dir=_made(folder)) as name,
        installed(Path(name), "no", tcp=port, concurrency=1) as install,
    ):

        def fill(count: int) -> None:
            for _ in range(count):
                install.core.submitter.items(TERMS, bulk_items(_LONG_ITEMS))

        in_two_processes(waiting, fill)
        ends = Ends(install.redis)
        started = []
        for number, host in enumerate(both):
            if number:
                time.sleep(joins_s)
            _start(install, f"host{number}", host, port)
        wait(lambda: len(_workers(install)) == len(both))
        seen = time.time()
        firsts: dict[bytes, float] = {}
        for found in ends.later():
            if found.state == "running":
                started.append(_worker(install, found.job_id))
                firsts.setdefault(started[-1], found.at)
            if len(firsts) == len(both):
                break
        since = seen if joins_s else min(firsts.values())
        share = _share(install, ends)
        return {"apart_s": max(firsts.values()) - since, "share": share, "waiting": waiting}


def _share(install: Install, ends: Ends) -> float:
    """The part of the next jobs that the host with fewer of them runs."""
    names: list[bytes] = []
    for found in ends.later():
        if found.state == "running":
            names.append(_worker(install, found.job_id))
        if len(names) == _SHARED_OUT:
            break
    return min(names.count(name) for name in _workers(install)) / len(names)


def _start(install: Install, name: str, host: Host, port: int) -> None:
    url = f"redis://{host.us}:{port}/0"
    more = {**install.worker_environ(name, free_port(), {}), "KMS_REDIS_URL": url}
    install.run(name, "kms_worker.main", within=host.enter, **more)


def _workers(install: Install) -> Sequence[bytes]:
    return cast("list[bytes]", install.redis.zrange("kms:workers", 0, -1))


def _worker(install: Install, job_id: str) -> bytes:
    """The name of the worker that has had a job."""
    return (cast("bytes | None", install.redis.hget(job_key(job_id), "worker")) or b"").partition(b"/")[0]


if __name__ == "__main__":
    main()
