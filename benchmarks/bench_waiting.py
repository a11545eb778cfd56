"""What waiting jobs cost others: readers of lists and status, a job whose worker is killed, an idle Redis.

Two installs, one with few jobs and one with many, all of them on a queue that no worker serves. The oldest 60
are cancelled, so a list of cancelled jobs begins at the far end of the tenant's jobs. The contenders of a
table are the two installs.
"""

import functools
import http.client
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks import report
from benchmarks.bench_jobs import TERMS, bulk_items
from benchmarks.jobs_install import Ends, Install, copy, installed, long_files
from benchmarks.measure import Contender, Reading, Series, in_turn, say
from benchmarks.report import Scale

from kms_protocol.wire import PREFIX

FEW: Final = 100
MANY: Final = 100_000
LEASE_S: Final = 5
OF_A_TENANT: Final = 60  # cancelled, so that a page of 50 is full
SERVED: Final = ("kms.files", "kms.maintenance")
_WORKERS: Final = ("first", "second")
_PATHS: Final = {
    "list by state, page of 50": f"{PREFIX}/jobs?state=cancelled&limit=50",
    "status of a job": f"{PREFIX}/jobs/{{job}}",
    "status of the service": f"{PREFIX}/status",
    "metrics": "/metrics",
}
_ASKED: Final = 50
_ASK_S: Final = 2.0
_IDLE_S: Final = 10.0
_SETTLE_S: Final = 60.0  # since the last submission, and since the worker began
_SOURCE_BYTES: Final = 3 * 1024**3  # a hole, so that the first attempt lasts for longer than a look at it
_TOP: Final = 5
_OURS: Final = ("info", "client|setinfo", "hello", "auth")  # of the look itself
_LATENCY: Final = Scale(key="p50_s", unit="ms", factor=1e3)
_AFTER: Final = Scale(key="over_s", unit="s after the kill, less the lease")
_RATE: Final = Scale(key="rate", unit="commands a second", digits=1)
_SENT: Final = Scale(key="scripts", digits=1)


@dataclass(frozen=True, slots=True)
class Waiting:
    """An install on which ``depth`` jobs wait, and one of them."""

    depth: int
    install: Install
    job: str

    @property
    def name(self) -> str:
        return f"{self.depth:,} jobs"


def main() -> None:
    options = report.options(
        "waiting",
        "Jobs that wait: reading, recovery and Redis beside them.",
        runs=3,
        budget_s=200.0,
        few=FEW,
        many=MANY,
        dir="/dev/shm",  # noqa: S108 -- jobs whose disk costs nothing
    )
    given, budget = options.given, options.budget(len(_PATHS) + 4)
    with (
        tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(given.dir)) as name,
        ExitStack() as stack,
    ):
        sides = [
            _waiting(stack, Path(name, str(depth)), depth, lease_s=LEASE_S)
            for depth in (given.many, given.few)
        ]
        parts = list(_reading(sides, options, budget.share(len(_PATHS))))
        for side in sides:
            for worker in _WORKERS:
                side.install.worker(worker, concurrency=1, queues=SERVED)
        contenders = [Contender(side.name, functools.partial(_recovery, side)) for side in sides]
        found = options.keep("second attempt", in_turn(contenders, options.plan, budget.share(2)))
        title = f"Second attempt after a killed worker; leases of {LEASE_S} s, two workers of another queue"
        parts.append(report.table(title, found, _AFTER))
        parts += _idle(stack, Path(name, "capped"), sides, options, budget.share(2))
    options.write(parts)


def _waiting(
    stack: ExitStack,
    folder: Path,
    depth: int,
    **jobs: Any,  # noqa: ANN401 -- settings of every kind
) -> Waiting:
    install = stack.enter_context(installed(folder, "no", **jobs))
    job = install.core.submitter.items(TERMS, bulk_items(1))
    begun = time.perf_counter()
    store = install.core.worker_context.store
    copy(install, job.job_id, OF_A_TENANT)
    for old in store.page(job.tenant, state="queued", limit=OF_A_TENANT, before=None)[0]:
        if old.job_id != job.job_id:
            store.cancel(old.job_id, job.tenant)
    copy(install, job.job_id, depth - OF_A_TENANT)
    say(f"{depth:,} jobs submitted in {time.perf_counter() - begun:.1f} s")
    return Waiting(depth, install, job.job_id)


# -- reading ----------------------------------------------------------------------------------------


def _reading(sides: list[Waiting], options: report.Options, seconds: float) -> Iterator[str]:
    for side in sides:
        side.install.api()
    for what, path in _PATHS.items():
        contenders = [Contender(side.name, functools.partial(_asked, side, path)) for side in sides]
        found = options.keep(what, in_turn(contenders, options.plan, seconds / len(_PATHS)))
        yield report.table(f"GET {path}: {what}", found, _LATENCY)


def _asked(side: Waiting, path: str) -> Reading:
    """The median of up to 50 answers, in two seconds or with one."""
    connection = http.client.HTTPConnection("127.0.0.1", side.install.port, timeout=300)
    times: list[float] = []
    ends = time.monotonic() + _ASK_S
    while len(times) < _ASKED and (not times or time.monotonic() < ends):
        begun = time.perf_counter()
        connection.request("GET", path.format(job=side.job))
        answer = connection.getresponse()
        text = answer.read()
        times.append(time.perf_counter() - begun)
        if answer.status != http.HTTPStatus.OK:
            raise RuntimeError(f"GET {path} answered {answer.status}: {text[:200]!r}")
    connection.close()
    return {"p50_s": sorted(times)[len(times) // 2]}


# -- recovery ------------------------------------------------------------------------


def _recovery(side: Waiting) -> Reading:
    """Kill the worker that runs a job, and await the second attempt by the other one."""
    install = side.install
    ends = Ends(install.redis)
    (job,) = long_files(install, TERMS, 1, _SOURCE_BYTES)
    ends.moment(job.job_id, "running")
    holder = install.holder(job.job_id)
    if not holder:
        raise RuntimeError("the first attempt ended before its worker could be killed")
    install.kill(holder)
    killed = _redis_s(install)
    again = ends.moment(job.job_id, "running")
    install.core.worker_context.store.cancel(job.job_id, job.tenant)
    ends.moment(job.job_id, "cancelled")
    install.worker(holder, concurrency=1, queues=SERVED)
    return {"over_s": again - killed - LEASE_S}


def _redis_s(install: Install) -> float:
    seconds, micro = install.redis.time()
    return float(seconds + micro / 1e6)


# -- idle ---------------------------------------------------------------------------------


def _idle(
    stack: ExitStack, folder: Path, sides: list[Waiting], options: report.Options, seconds: float
) -> Iterator[str]:
    """Commands of an API and a worker of two processes that find nothing to do."""
    capped = _waiting(stack, folder, sides[0].depth, lease_s=600, tenant_leases=1)
    if capped.install.core.worker_context.store.claim(capped.job, "bench/1") is None:
        raise RuntimeError("a job that waits could not be claimed")
    capped.install.api()
    capped.install.worker("idle")
    for side in sides:
        for worker in _WORKERS:
            side.install.end(worker)
        side.install.worker("idle", queues=SERVED)
    time.sleep(_SETTLE_S)
    what = {
        f"{sides[0].name}, of a queue without workers": sides[0].install,
        f"{capped.name}, of a tenant at its cap": capped.install,
        f"{sides[1].name}, of a queue without workers": sides[1].install,
    }
    contenders = [
        Contender(name, functools.partial(_commands, name, install)) for name, install in what.items()
    ]
    plan = replace(options.plan, warms=False)
    found: list[Series] = list(options.keep("idle", in_turn(contenders, plan, seconds)))
    title = "Redis commands a second while one API and one worker are idle, each command of a script counted"
    yield report.table(title, found, _RATE, more={"scripts a second": _SENT.median})


def _commands(name: str, install: Install) -> Reading:
    before, begun = _counts(install), time.monotonic()
    time.sleep(_IDLE_S)
    after, took = _counts(install), time.monotonic() - begun
    rates = {word: (count - before.get(word, 0)) / took for word, count in after.items()}
    top = sorted(rates.items(), key=lambda each: -each[1])[:_TOP]
    say(f"{name}: " + ", ".join(f"{word} {rate:.1f}/s" for word, rate in top))
    return {"rate": sum(rates.values()), "scripts": rates.get("evalsha", 0.0) + rates.get("eval", 0.0)}


def _counts(install: Install) -> Mapping[str, int]:
    """Calls of each command so far, but for those that ask for this."""
    found: Mapping[str, Any] = install.redis.info("commandstats")
    names = {key: key.removeprefix("cmdstat_") for key in found}
    return {names[key]: each["calls"] for key, each in found.items() if names[key] not in _OURS}


if __name__ == "__main__":
    main()
