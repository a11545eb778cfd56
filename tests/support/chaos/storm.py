"""A storm over a whole install: mixed jobs, while everything that can die does, at random points of a seed.

Real processes, a real Valkey (AOF ``always``) on a unix socket, nothing but 127.0.0.1, and bounded: as many
requests and faults as the plan says, each wait with its end. ``job_mix`` says what is asked for,
``fault_injection`` what goes wrong, ``job_checks`` what must hold afterwards.
"""

import os
import random
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.chaos.cluster import Cluster, Peer
from support.chaos.fault_injection import FaultInjection
from support.chaos.inotify_counter import NameCounter
from support.chaos.job_checks import JobChecks
from support.chaos.job_mix import JobMix
from support.chaos.load import Load
from support.frozen_disk import MIB, disk_or_none
from support.service import core_of
from support.small_disk import small_disk_or_none

SPOOL_BYTES: Final = 512 * MIB
SETTINGS: Final = """
[kms.jobs]
lease_s = 2
attempts = 50
stall_s = 4
spool_dir = "{spool}"
"""
_CRASHES: Final = ("api 1", "worker 1")  # others: a start without its key
_PAST_S: Final = 2 * 3600.0
_CUT: Final = (b'"reason": "requeued"', b'"reason": "committing"', b'"event": "job.stalled"')
"""In a worker's log: an attempt lost its lease while it worked or put its file in place, or it hung."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything. ``faults_by_name`` are counts; ``outage_s`` is how long the key is away.

    ``disk_mib`` is the size of the disk of sources and targets, ``min_interrupted`` how many
    attempts must be.
    """

    jobs: int
    workers: int
    senders: int
    scale: float
    outage_s: float
    patience_s: float
    disk_mib: int
    min_interrupted: int
    faults_by_name: Mapping[str, int]


SHORT: Final = Plan(
    jobs=60,
    workers=2,
    senders=4,
    scale=0.5,
    outage_s=2.0,
    patience_s=90.0,
    disk_mib=1024,
    min_interrupted=0,
    faults_by_name={
        "child": 2,
        "worker": 1,
        "api": 1,
        "valkey": 1,
        "all": 1,
        "flood": 1,
        "echo": 2,
        "clock": 1,
        "full": 1,
        "outage": 1,
        "freeze": 1,
        "hang": 1,
        "roll": 1,
        "cut": 1,
        "silence": 1,
    },
)
LONG: Final = Plan(
    jobs=1000,
    workers=3,
    senders=6,
    scale=0.5,
    outage_s=30.0,
    patience_s=600.0,
    disk_mib=16 * 1024,
    min_interrupted=200,
    faults_by_name={
        "child": 210,
        "worker": 20,
        "api": 15,
        "valkey": 15,
        "all": 5,
        "flood": 3,
        "echo": 20,
        "clock": 2,
        "full": 3,
        "outage": 1,
        "freeze": 5,
        "hang": 5,
        "roll": 2,
        "cut": 1,
        "silence": 1,
    },
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a storm was, and what was found: no ``violations``, or one line each."""

    seed: int
    seconds: float
    jobs: int
    losses: int
    interrupted: int
    injected: Mapping[str, int]
    states: Mapping[str, int]
    unexpected_exits: Mapping[str, int]
    glimpses: int
    violations: Sequence[str]

    def row(self) -> str:
        """A line of the table in benchmarks/RESULTS.md."""
        injected, states = (
            ", ".join(f"{name} {count}" for name, count in sorted(which.items()))
            for which in (self.injected, self.states)
        )
        counts = (self.interrupted, self.losses, len(self.violations), round(self.seconds))
        cells = (self.seed, self.jobs, injected, states, *counts)
        return f"| {' | '.join(map(str, cells))} |"


def run(folder: Path, plan: Plan, seed: int) -> Verdict:
    """One storm, from the first process to the last search. Call it from the main thread."""
    begun = time.monotonic()
    with small_disk_or_none(folder / "disk", SPOOL_BYTES) as disk, closing(Peer(folder / "peer")) as peer:
        (state := folder / "state").mkdir(mode=0o700)
        spool = disk or state / "spool"
        with (
            disk_or_none(state / "files", plan.disk_mib * MIB) as files,
            Cluster(folder, SETTINGS.format(spool=spool), plan.workers, peer) as cluster,
        ):
            cluster.spool, cluster.disk = spool, files
            checks, faults, load = _run_under_faults(cluster.launch(), plan, seed, has_disk=disk is not None)
        checks.search(folder)  # Valkey has written its last
        checks.violations += [f"ended by itself: {end}" for end in _CRASHES if cluster.unexpected_exits[end]]
    return Verdict(
        seed=seed,
        seconds=time.monotonic() - begun,
        jobs=len(load.accepted_jobs),
        losses=checks.losses,
        interrupted=_cut(cluster),
        injected=faults.injected,
        states=checks.states,
        unexpected_exits=cluster.unexpected_exits,
        glimpses=len(load.glimpses),
        violations=checks.violations,
    )


def _run_under_faults(
    cluster: Cluster, plan: Plan, seed: int, *, has_disk: bool
) -> tuple[JobChecks, FaultInjection, Load]:
    load = Load(
        cluster, JobMix(cluster, core_of(cluster), seed, scale=plan.scale), plan.jobs, plan.senders, seed
    )
    faults = FaultInjection(cluster, load, random.Random(seed), outage_s=plan.outage_s)  # noqa: S311 -- repeatable
    with NameCounter(cluster.files) as creations:
        load.start()
        impossible = {name for name, disk in (("full", has_disk), ("hang", cluster.disk)) if not disk}
        _inject_all(faults, load, cluster, _schedule(plan, seed, impossible))
        while load.busy:
            cluster.restart_dead()
            time.sleep(0.1)
        load.close()
        cluster.wait_until_up()
        checks = JobChecks(cluster, load, lambda: creations.count)
        checks.wait(plan.patience_s)
        checks.check_results()
        checks.expire()
        _sweep(cluster)
        checks.spool_is_empty()
    return checks, faults, load


def _cut(cluster: Cluster) -> int:
    """How many attempts did not get to their end: killed, frozen for longer than a lease, or hung."""
    logs = b"".join((cluster.logs / f"{name}.log").read_bytes() for name in cluster.workers)
    return sum(logs.count(word) for word in _CUT)


def _schedule(plan: Plan, seed: int, impossible: Collection[str]) -> list[tuple[int, str]]:
    """Faults, and how many jobs are accepted before each."""
    rng = random.Random(seed + 1)  # noqa: S311 -- repeatable, no secret
    names = [
        name for name, count in plan.faults_by_name.items() for _ in range(count) if name not in impossible
    ]
    rng.shuffle(names)
    return list(zip(sorted(rng.randrange(plan.jobs * 9 // 10) for _ in names), names, strict=True))


def _inject_all(
    faults: FaultInjection, load: Load, cluster: Cluster, schedule: Sequence[tuple[int, str]]
) -> None:
    """The load does not run ahead: each fault meets jobs."""
    for after, name in schedule:
        load.request_limit = max(after, len(load.accepted_jobs)) + load.count // len(schedule)
        while load.busy and len(load.accepted_jobs) < after:
            cluster.restart_dead()
            time.sleep(0.02)
        faults.inject(name)
        cluster.restart_dead()
    load.request_limit = sys.maxsize


def _sweep(cluster: Cluster) -> None:
    """Orphans are swept when they are an hour old: they are now, and a worker that starts looks at once."""
    past = time.time() - _PAST_S
    for path in cluster.spool.iterdir():
        os.utime(path, (past, past))
    for name in cluster.workers:
        cluster.again(name)
