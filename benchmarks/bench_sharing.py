"""How work is shared out: between a tenant with many jobs and one with few, and between hosts.

A job of the small tenant is submitted when the one before it has ended, while 10,000 of the big tenant wait
and two processes work; or while large files of the big tenant are encrypted. Two hosts are network namespaces
with a worker each; that an idle one is found while the other is in long files does not depend on a network.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Final, cast

from benchmarks import children, report
from benchmarks.bench_jobs import TERMS, bulk_items
from benchmarks.jobs_install import Ends, Install, in_two_processes, installed, long_files, wait
from benchmarks.measure import Contender, Reading, in_turn
from benchmarks.report import Cell, Scale
from benchmarks.running import free_port

from kms_core.auth import tokens
from kms_core.auth.policy import Principal
from kms_core.jobs.spec import BULK, MAINTENANCE
from kms_core.jobs.store.keys import job_key
from kms_core.jobs.submission.submitter import SubmissionOptions
from kms_protocol.wire import ENDED, JobItem
from support import rabbitmq
from support.network_hosts import Host, hosts_or_local

BIG: Final = 10_000
WAITING: Final = 1_000
FILE_MIB: Final = 3072  # a job over such a file lasts for longer than a look at it
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
_TIMES: Final = 10
_BEGUN: Final = Scale(key="worst_s", unit=f"s until it begins, worst of {_TIMES}")
_BEGUN_MEDIAN: Final = Scale(key="median_s")
_REQUIRED: Final = '[kms.auth]\nmode = "required"\n'  # without it there is one tenant


def main() -> None:
    options = report.options(
        "sharing",
        "Jobs of a small tenant behind a big one's, and two hosts.",
        runs=3,
        budget_s=200.0,
        big=BIG,
        waiting=WAITING,
        file_mib=FILE_MIB,
        dir="/dev/shm",  # noqa: S108 -- jobs whose disk costs nothing
    )
    given, budget = options.given, options.budget(4)
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(given.dir)) as name:
        folder = Path(name)
        parts = [
            _fairness(folder / "fair", options, budget.share()),
            _beside_files(folder / "files", options, budget.share()),
            _hosts(folder / "hosts", options, budget.share()),
            _idle_host(folder / "idle", options, budget.share()),
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


def _beside_files(folder: Path, options: report.Options, seconds: float) -> str:
    """The big tenant has as many large files as there are processes."""
    size_mib = options.given.file_mib
    with installed(folder, "no", settings=_REQUIRED) as install:
        here = f"{(install.state / 'files').as_uri()}/"
        big = _with_token(install, "big", f"encrypt read={here} write={here}")
        small = _with_token(install, "small", "*")
        waited = functools.partial(_waited, install, big, small, 1, size_mib)  # one process is for others
        install.worker("worker")
        contender = Contender(
            "beside two large files of another tenant", functools.partial(_ten_times, waited)
        )
        plan = replace(options.plan, warms=False)
        found = options.keep("beside files", in_turn([contender], plan, seconds))
    title = f"A job of a small tenant beside two files of {size_mib:,} MiB of another, two processes"
    return report.table(title, found, _BEGUN, more={"median": _BEGUN_MEDIAN.median})


def _with_token(install: Install, tenant: str, scope: str) -> SubmissionOptions:
    where = install.loaded.kms.auth.tokens_path
    token, _ = tokens.create(where, tokens.TokenRequest(tenant, tenant, [scope], timedelta(days=1)))
    return replace(TERMS, who=Principal(token.name, token.tenant, f"token:{token.id}"))


def _ten_times(waited: Callable[[], float]) -> Reading:
    waits = sorted(waited() for _ in range(_TIMES))
    return {"worst_s": waits[-1], "median_s": waits[len(waits) // 2]}


def _waited(
    install: Install, long: SubmissionOptions, one: SubmissionOptions, running: int, size_mib: int
) -> float:
    """Seconds until a job of one item begins while ``running`` of two long files are worked on.

    Raises RuntimeError if a file ends before the job begins.
    """
    ends = Ends(install.redis)
    files = {job.job_id for job in long_files(install, long, 2, size_mib * 1024**2)}
    begun = (found for found in ends.later() if found.job_id in files and found.state == "running")
    for _ in range(running):
        next(begun)
    job = install.core.submitter.items(one, _ITEMS)
    queued, running_at = ends.moment(job.job_id, "queued"), ends.moment(job.job_id, "running")
    for job_id in files:
        install.core.worker_context.store.cancel(job_id, long.who.tenant)
    ended = {}
    for found in ends.later():
        if found.state in ENDED and found.job_id in {*files, job.job_id}:
            ended[found.job_id] = found.state
        if len(ended) > len(files):
            break
    if "succeeded" in {ended.get(job_id) for job_id in files}:
        raise RuntimeError("a file ended before the job began: choose a larger --file-mib")
    return running_at - queued


# -- hosts -------------------------------------------------------------------------------------------


def _idle_host(folder: Path, options: report.Options, seconds: float) -> str:
    """Two workers of two processes each: files are for one of them, small jobs for both."""
    with ExitStack() as stack:
        brokers = {"Redis": ""}
        if children.installed(["rabbitmq-server"]):
            brokers["RabbitMQ"] = stack.enter_context(rabbitmq.server(folder / "server"))
        contenders = []
        for name, broker in brokers.items():
            install = stack.enter_context(installed(folder / name, "no", broker=broker))
            install.worker("busy")
            install.worker("idle", queues=[BULK, MAINTENANCE])
            waited = functools.partial(_waited, install, TERMS, TERMS, 2, options.given.file_mib)
            contenders.append(Contender(name, functools.partial(_ten_times, waited)))
        plan = replace(options.plan, warms=False)
        found = options.keep("idle host", in_turn(contenders, plan, seconds))
    title = "One host with both processes in long files, an idle one: a job of one item"
    return report.table(title, found, _BEGUN, more={"median": _BEGUN_MEDIAN.median})


def _hosts(folder: Path, options: report.Options, seconds: float) -> str:
    waiting = options.given.waiting
    with hosts_or_local(2) as both:
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
    url = f"redis://{host.test_address}:{port}/0"
    more = {**install.worker_environ(name, free_port(), {}), "KMS_REDIS_URL": url}
    install.run(name, "kms_worker.main", within=host.enter, **more)


def _workers(install: Install) -> Sequence[bytes]:
    return cast("list[bytes]", install.redis.zrange("kms:workers", 0, -1))


def _worker(install: Install, job_id: str) -> bytes:
    """The name of the worker that has had a job."""
    return (cast("bytes | None", install.redis.hget(job_key(job_id), "worker")) or b"").partition(b"/")[0]


if __name__ == "__main__":
    main()
