"""Whether cost grows as work does: with the size of a file, items of a job, workers, and jobs that wait.

Files are holes on a disk, ciphertexts lie in memory, results go to /dev/null: so the largest fits.
Jobs have a Valkey of their own with the AOF `always`; a deep queue is compared with an empty one.
"""

import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks import drive_kms, report
from benchmarks.bench_jobs import TERMS, bulk_items, bulk_job
from benchmarks.children import PYTHON, run
from benchmarks.fitting import COLUMNS, grown
from benchmarks.jobs_install import Ends, Install, in_two_processes, installed
from benchmarks.measure import Contender, Reading, Series, in_turn, memory, say

from kms_core.age.x25519 import X25519Identity

FILES_MIB: Final = (1, 16, 256, 1024, 4096, 16384)
ITEMS: Final = (10, 100, 1_000, 10_000, 100_000)
DEPTHS: Final = (10, 100, 1_000, 10_000, 100_000)
_MIB: Final = 1024 * 1024
_OFTEN_UP_TO_MIB: Final = 1024
_SPARE_BYTES: Final = 1024 * _MIB
_ASKED: Final = 200  # timed submissions at a depth; each is claimed, and waits no longer
_BUSY_JOBS, _BUSY_ITEMS, _WARM_JOBS, _ROUNDS = 16, 500, 4, 3


def main() -> None:
    options = report.options(
        "growth",
        "Files, items, workers and waiting jobs of growing number.",
        runs=3,
        budget_s=280.0,
        largest_mib=FILES_MIB[-1],
        deepest=DEPTHS[-1],
        dir="/dev/shm",  # noqa: S108 -- files in memory, and jobs whose disk costs nothing
        holes_dir="/var/tmp",  # noqa: S108 -- holes are read through the page cache, which gives its memory up
    )
    budget = options.budget(8)
    with tempfile.TemporaryDirectory(prefix="kms-bench-", dir=report.place(options.given.dir)) as name:
        folder = Path(name)
        parts = []
        for part, shares in ((_depths, 3), (_items, 1), (_workers, 1)):
            (below := folder / part.__name__).mkdir()
            parts.append(part(below, options, budget.share(shares)))
        with tempfile.TemporaryDirectory(prefix="kms-bench-", dir=options.given.holes_dir) as holes:
            parts += _files(folder, Path(holes, "source"), options, budget.share(3))
    options.write(parts)


# -- files -------------------------------------------------------------------------------------------


def _files(folder: Path, source: Path, options: report.Options, seconds: float) -> list[str]:
    identity = folder / "identity"
    identity.write_text(f"{X25519Identity.generate().export()}\n")
    identity.chmod(0o600)
    ends = time.monotonic() + seconds
    found: dict[str, list[tuple[int, Series]]] = {"seal": [], "open": []}
    for mib in FILES_MIB:
        (folder / "sealed").unlink(missing_ok=True)  # of the size before: all of it is memory
        need = mib * _MIB * 11 // 10 + _SPARE_BYTES
        if mib > options.given.largest_mib or need > memory("MemAvailable") or time.monotonic() > ends:
            say(
                f"SKIPPED files of {mib:,} MiB and more: {need // _MIB:,} MiB of memory, or time, are missing"
            )
            break
        often = mib <= _OFTEN_UP_TO_MIB
        plan = replace(options.plan, runs=options.plan.runs if often else 1)
        if (
            not often
        ):  # the kernel gives memory of the page cache back at that time, which counts as others' load
            plan = replace(plan, foreign=math.inf)
        with source.open("wb") as file:
            file.truncate(mib * _MIB)
        for contender in _file(folder, identity, source):  # a ciphertext is not there while sealing is timed
            [series] = in_turn([contender], plan, ends - time.monotonic())
            found[series.name].append((mib, series))
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


def _file(folder: Path, identity: Path, source: Path) -> Iterator[Contender]:
    sealed = folder / "sealed"
    drive = [*PYTHON, "benchmarks.drive_kms"]

    def seal() -> Reading:
        return run([*drive, "seal", str(identity), str(source), "/dev/null"])

    def open_() -> Reading:
        return run([*drive, "open", str(identity), str(sealed), "/dev/null"])

    yield Contender("seal", seal)
    drive_kms.seal(drive_kms.wrapper(identity), str(source), str(sealed))
    yield Contender("open", open_)


# -- items and workers -------------------------------------------------------------------------------


def _items(folder: Path, options: report.Options, seconds: float) -> str:
    with installed(folder, "always") as install:
        install.worker("worker")
        contenders = [
            Contender(f"{count:,}", functools.partial(bulk_job, install, 1, count)) for count in ITEMS
        ]
        found = in_turn(contenders[:-1], options.plan, seconds)
        found += in_turn(
            contenders[-1:], replace(options.plan, runs=1, warms=False), seconds
        )  # as long as all
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
    ends = Ends(install.redis)
    ids = [install.core.submitter.items(TERMS, bulk_items(_BUSY_ITEMS)).job_id for _ in range(_BUSY_JOBS)]
    moments = sorted(ends.await_end(_BUSY_JOBS))
    for job_id in ids:
        install.core.worker_context.spool.delete(job_id)
    midst = moments[_WARM_JOBS - 1 : -2]
    return {"rate": (len(midst) - 1) * _BUSY_ITEMS / (midst[-1] - midst[0])}


# -- jobs that wait ----------------------------------------------------------------------------------


def _depths(folder: Path, options: report.Options, seconds: float) -> str:
    """What a submission and a claim cost while so many wait, beside the same on an install where none does.

    No worker runs, and nothing waits for the disk. Both are measured in turn: the machine's own pace changes
    by more than depth costs.
    """
    ends, rows = time.monotonic() + seconds, []
    found: dict[str, list[float]] = {"submit": [], "claim": []}
    for name in ("deep", "empty"):
        (folder / name).mkdir()
    with installed(folder / "deep", "no") as install, installed(folder / "empty", "no") as beside:
        install.core.submitter.items(TERMS, bulk_items(1))
        bare, waiting, kept = _used(install), 0, 0
        for depth in DEPTHS:
            if depth > options.given.deepest or not _filled(install, depth - waiting, ends):
                say(f"SKIPPED a depth of {depth:,} and more: no time, or not asked for")
                break
            kept += depth - waiting
            room = (_used(install) - bare) / kept
            costs = _costs((install, beside))
            waiting, kept = depth, kept + _ASKED
            cells = []
            for name, (deep, empty) in costs.items():
                found[name].append(deep / empty)
                cells += [f"{deep * 1e6:,.0f}", f"{deep / empty - 1:+.1%}"]
            rows.append([f"{depth:,}", *cells, f"{room:,.0f}"])
    for name, shares in found.items() if rows else ():
        worst = max(abs(share - 1) for share in shares)
        options.note("deviation", f"{name} at depth", {"share": worst, "to": waiting})
    columns = ["jobs that wait", "µs to submit one more", "off an empty queue", "µs to claim one"]
    columns += ["off an empty queue", "bytes of Redis memory each"]
    return report.grid("Depth of the queue, medians, without workers", columns, rows)


def _filled(install: Install, missing: int, ends: float) -> bool:
    """Submit so many, from two processes; whether there was time to."""

    def fill(count: int) -> None:
        for _ in range(count):
            install.core.submitter.items(TERMS, bulk_items(1))
            if time.monotonic() > ends:
                sys.exit(1)

    try:
        in_two_processes(missing, fill)
    except RuntimeError:
        return False
    return True


def _costs(installs: Sequence[Install]) -> Mapping[str, Sequence[float]]:
    """Median seconds of a submission, and of its claim, on each install."""
    submit: list[list[float]] = [[] for _ in installs]
    claim: list[list[float]] = [[] for _ in installs]
    for _ in range(_ASKED):
        for number, install in enumerate(installs):
            begun = time.perf_counter()
            job = install.core.submitter.items(TERMS, bulk_items(1))
            submitted = time.perf_counter()
            if install.core.worker_context.store.claim(job.job_id, "bench") is None:
                raise RuntimeError("a job that waits could not be claimed")
            claim[number].append(time.perf_counter() - submitted)
            submit[number].append(submitted - begun)
    return {
        name: [statistics.median(each) for each in took]
        for name, took in (("submit", submit), ("claim", claim))
    }


def _used(install: Install) -> int:
    used: int = install.redis.info("memory")["used_memory"]
    return used


if __name__ == "__main__":
    main()
