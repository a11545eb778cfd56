"""Whether cost grows as work does: with the size of a file, items of a job, workers, and jobs that wait.

Files lie in memory, with a source of holes and opened into
/dev/null, so that what is largest still fits; jobs have a Valkey of their own with the AOF `always`.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from benchmarks import drive_kms, report
from benchmarks.bench_jobs import TERMS, bulk_items, bulk_job
from benchmarks.children import PYTHON, run
from benchmarks.fitting import COLUMNS, grown
from benchmarks.jobs_install import Ends, Install, installed
from benchmarks.measure import Contender, Reading, Series, in_turn, memory, say

from kms_core.envelope.x25519 import Identity

FILES_MIB: Final = (1, 16, 256, 1024, 4096, 16384)
ITEMS: Final = (10, 100, 1_000, 10_000, 100_000)
DEPTHS: Final = (10, 100, 1_000, 10_000, 100_000)
_MIB: Final = 1024 * 1024
_OFTEN_UP_TO_MIB: Final = 1024
_SPARE_BYTES: Final = 1024 * _MIB
_ASKED: Final = (20, 200)  # timed submissions and claims at a depth: at least, at most
_SENDERS, _AT_ONCE = 4, 2_000
_BUSY_JOBS, _BUSY_ITEMS, _WARM_JOBS, _ROUNDS = 16, 500, 4, 3


def main() -> None:
    options = report.options(
        "growth",
        "Files, items, workers and waiting jobs of growing number.",
        runs=3,
        budget_s=180.0,
        largest_mib=FILES_MIB[-1],
        deepest=DEPTHS[-1],
        dir="/dev/shm",  # noqa: S108 -- files in memory, and jobs whose disk costs nothing
    )
    budget = options.budget(5)
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(options.given.dir)) as name:
        folder = Path(name)
        parts = _files(folder, options, 2 * budget.share())
        budget.share()
        for number, part in enumerate((_items, _workers, _depths)):
            (below := folder / str(number)).mkdir()
            parts.append(part(below, options, budget.share()))
    options.write(parts)


# -- files -------------------------------------------------------------------------------------------


def _files(folder: Path, options: report.Options, seconds: float) -> list[str]:
    identity = folder / "identity"
    identity.write_text(f"{Identity.generate().export()}\n")
    identity.chmod(0o600)
    ends = time.monotonic() + seconds
    found: dict[str, list[tuple[int, Series]]] = {"seal": [], "open": []}
    for mib in FILES_MIB:
        (folder / "sealed").unlink(missing_ok=True)  # of the size before: all of it is memory
        need = mib * _MIB * 22 // 10 + _SPARE_BYTES  # holes of the source take memory when they are read
        if mib > options.given.largest_mib or need > memory("MemAvailable") or time.monotonic() > ends:
            say(
                f"SKIPPED files of {mib:,} MiB and more: {need // _MIB:,} MiB of memory, or time, are missing"
            )
            break
        often = mib <= _OFTEN_UP_TO_MIB
        plan = replace(options.plan, runs=options.plan.runs if often else 1, warms=often)
        for series in in_turn(_file(folder, identity, mib * _MIB), plan, ends - time.monotonic()):
            found[series.name].append((mib, series))
    for name in ("source", "sealed"):  # they take the memory of what follows
        (folder / name).unlink(missing_ok=True)
    abouts, rows = zip(
        *(grown(f"{name} a file", "a MiB", of, options) for name, of in found.items()), strict=True
    )
    peaks = [
        [f"{name}, {mib:,} MiB", f"{peak / _MIB:.1f} MiB"]
        for name, of in found.items()
        for mib, series in of
        if (peak := series.median("peak_bytes"))
    ]
    for name, of in found.items():
        peak = max(max(series.values("peak_bytes"), default=0.0) for _, series in of)
        options.note(
            "core", name, {"peak_bytes": peak, "to": max(mib for mib, series in of if series.readings)}
        )
    return [
        report.grid("Files in memory, MiB", COLUMNS, [row for part in rows for row in part]),
        *abouts,
        report.grid("Peak memory of the envelope's driver", ["", "RSS"], peaks),
    ]


def _file(folder: Path, identity: Path, size: int) -> Sequence[Contender]:
    source, sealed = folder / "source", folder / "sealed"
    with source.open("wb") as file:
        file.truncate(size)
    drive = [*PYTHON, "benchmarks.drive_kms"]

    def seal() -> Reading:
        sealed.unlink(missing_ok=True)
        return run([*drive, "seal", str(identity), str(source), str(sealed)])

    def open_() -> Reading:
        return run([*drive, "open", str(identity), str(sealed), "/dev/null"])

    return [Contender("seal", seal, size), Contender("open", open_)]


# -- items and workers -------------------------------------------------------------------------------


def _items(folder: Path, options: report.Options, seconds: float) -> str:
    with installed(folder, "always") as install:
        install.worker("worker")
        contenders = [
            Contender(f"{count:,}", functools.partial(bulk_job, install, 1, count)) for count in ITEMS
        ]
        found = in_turn(contenders, options.plan, seconds)
    about, rows = grown("items of a job", "an item", list(zip(ITEMS, found, strict=True)), options)
    return "\n\n".join(
        [report.grid(f"One bulk job of items of {drive_kms.ITEM_BYTES:,} bytes", COLUMNS, rows), about]
    )


def _workers(folder: Path, options: report.Options, seconds: float) -> str:
    """Jobs of many items by one worker of one process and by two, in turn: while they do nothing else."""
    ends = time.monotonic() + seconds
    one, two = Series("1 worker of one process"), Series("2 workers of one process")
    with installed(folder, "always", concurrency=1) as install:
        install.worker("worker1")
        _busy(install)
        while len(two.readings) < _ROUNDS and (not two.readings or time.monotonic() < ends):
            one.readings.append(_busy(install))
            install.worker("worker2")
            two.readings.append(_busy(install))
            install.end("worker2")
    rates = [series.median("rate") or 0.0 for series in (one, two)]
    share = 1 - rates[1] / (2 * rates[0])
    options.note("deviation", "workers", {"share": abs(share), "to": 2})
    rate = report.Scale(key="rate", digits=0, more_is_better=True)
    rows = [[series.name, rate.median(series), rate.spread(series)] for series in (one, two)]
    title = f"Items a second in the midst of {_BUSY_JOBS} jobs of {_BUSY_ITEMS:,}"
    return "\n\n".join(
        [report.grid(title, ["", "median", "spread"], rows), f"Two give {1 - share:.0%} of twice one."]
    )


def _busy(install: Install) -> Reading:
    ends = Ends(install)
    ids = [install.core.desk.items(TERMS, bulk_items(_BUSY_ITEMS)).job_id for _ in range(_BUSY_JOBS)]
    moments = sorted(ends.await_end(_BUSY_JOBS))
    for job_id in ids:
        install.core.shop.spool.delete(job_id)
    midst = moments[_WARM_JOBS - 1 : -2]
    return {"rate": (len(midst) - 1) * _BUSY_ITEMS / (midst[-1] - midst[0])}


# -- jobs that wait ----------------------------------------------------------------------------------


def _depths(folder: Path, options: report.Options, seconds: float) -> str:
    """Nobody works, and nothing waits for the disk: what a submission and a claim cost while so many wait."""
    ends, rows = time.monotonic() + seconds, []
    found: dict[str, list[float]] = {"submit": [], "claim": []}
    with installed(folder, "no") as install:
        install.core.desk.items(TERMS, bulk_items(1))
        empty, waiting, kept = _used(install), 0, 0
        for depth in DEPTHS:
            if depth > options.given.deepest or not _filled(install, depth - waiting, ends):
                say(f"SKIPPED a depth of {depth:,} and more: no time, or not asked for")
                break
            kept += depth - waiting
            room = (_used(install) - empty) / kept
            submit, claim, asked = _costs(install, depth)
            waiting, kept = depth, kept + asked
            found["submit"].append(submit)
            found["claim"].append(claim)
            rows.append([f"{depth:,}", f"{submit * 1e6:,.0f}", f"{claim * 1e6:,.0f}", f"{room:,.0f}"])
    for name, costs in found.items() if rows else ():
        middle = statistics.median(costs)
        share = max(abs(cost / middle - 1) for cost in costs)
        options.note("deviation", f"{name} at depth", {"share": share, "to": waiting})
    columns = ["jobs that wait", "µs to submit one more", "µs to claim one", "bytes of Redis memory each"]
    return report.grid("Depth of the queue, medians, nobody works", columns, rows)


def _filled(install: Install, missing: int, ends: float) -> bool:
    """Submit so many; whether there was time to."""
    with ThreadPoolExecutor(_SENDERS) as pool:
        while missing > 0 and time.monotonic() < ends:
            some = min(missing, _AT_ONCE)
            list(pool.map(lambda _: install.core.desk.items(TERMS, bulk_items(1)), range(some)))
            missing -= some
    return not missing


def _costs(install: Install, depth: int) -> tuple[float, float, int]:
    """Median seconds of a submission and of a claim, and how many; what is claimed waits no longer."""
    ids, times = [], [time.perf_counter()]
    for _ in range(min(max(depth // 5, _ASKED[0]), _ASKED[1])):
        ids.append(install.core.desk.items(TERMS, bulk_items(1)).job_id)
        times.append(time.perf_counter())
    for job_id in ids:
        if install.core.shop.store.claim(job_id, "bench") is None:
            raise RuntimeError("a job that waits could not be claimed")
        times.append(time.perf_counter())
    took = [after - before for before, after in pairwise(times)]
    return statistics.median(took[: len(ids)]), statistics.median(took[len(ids) :]), len(ids)


def _used(install: Install) -> int:
    used: int = install.redis.info("memory")["used_memory"]
    return used


if __name__ == "__main__":
    main()
