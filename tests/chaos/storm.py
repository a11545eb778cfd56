"""A storm over a whole install: mixed jobs, while everything that can die does, at random points of a seed.

Real processes, a real Valkey (AOF ``always``) on a unix socket, nothing but 127.0.0.1, and bounded: as many
orders and blows as the plan says, each wait with its end. ``chaos.orders`` says what is asked for,
``chaos.weather`` what goes wrong, ``chaos.judge`` what must hold afterwards.
"""

import os
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chaos.births import Births
from chaos.crowd import Crowd
from chaos.fleet import Fleet, Peer, small_disk
from chaos.judge import Judge
from chaos.orders import Book
from chaos.weather import Weather
from service import core_of

SETTINGS: Final = """
[kms.jobs]
lease_s = 2
attempts = 50
watchdog_s = 30
spool_dir = "{spool}"
"""
_PAST_S: Final = 2 * 3600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything. ``blows`` are counts by name; ``outage_s`` is how long the key is away."""

    jobs: int
    workers: int
    senders: int
    scale: float
    outage_s: float
    patience_s: float
    blows: Mapping[str, int]


SHORT: Final = Plan(
    jobs=60,
    workers=2,
    senders=4,
    scale=0.5,
    outage_s=2.0,
    patience_s=90.0,
    blows={
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
        "roll": 1,
        "cut": 1,
        "silence": 1,
    },
)
LONG: Final = Plan(
    jobs=1000,
    workers=3,
    senders=6,
    scale=1.0,
    outage_s=60.0,
    patience_s=600.0,
    blows={
        "child": 30,
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
        "roll": 2,
        "cut": 1,
        "silence": 1,
    },
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a storm was, and what was found: no ``faults``, or one line each."""

    seed: int
    seconds: float
    jobs: int
    losses: int
    struck: Mapping[str, int]
    states: Mapping[str, int]
    ends: Mapping[str, int]
    glimpses: int
    faults: Sequence[str]

    def row(self) -> str:
        """A line of the table in benchmarks/RESULTS.md."""
        struck, states = (
            ", ".join(f"{name} {count}" for name, count in sorted(which.items()))
            for which in (self.struck, self.states)
        )
        cells = (self.seed, self.jobs, struck, states, self.losses, len(self.faults), round(self.seconds))
        return f"| {' | '.join(map(str, cells))} |"


def run(folder: Path, plan: Plan, seed: int) -> Verdict:
    """One storm, from the first process to the last search. Call it from the main thread."""
    begun = time.monotonic()
    with small_disk(folder / "disk") as disk, closing(Peer(folder / "peer")) as peer:
        spool = disk or folder / "state" / "spool"
        with Fleet(folder, SETTINGS.format(spool=spool), plan.workers, peer) as fleet:
            fleet.spool = spool
            judge, weather, crowd = _rage(fleet.launch(), plan, seed, has_disk=disk is not None)
        judge.search(folder)  # Valkey has written its last
    return Verdict(
        seed=seed,
        seconds=time.monotonic() - begun,
        jobs=len(crowd.tickets),
        losses=judge.losses,
        struck=weather.struck,
        states=judge.states,
        ends=fleet.ends,
        glimpses=len(crowd.glimpses),
        faults=judge.faults,
    )


def _rage(fleet: Fleet, plan: Plan, seed: int, *, has_disk: bool) -> tuple[Judge, Weather, Crowd]:
    crowd = Crowd(fleet, Book(fleet, core_of(fleet), seed, scale=plan.scale), plan.jobs, plan.senders, seed)
    weather = Weather(fleet, crowd, random.Random(seed), outage_s=plan.outage_s)  # noqa: S311 -- repeatable
    with Births(fleet.files) as births:
        crowd.start()
        _blow(weather, crowd, fleet, _forecast(plan, seed, has_disk=has_disk))
        while crowd.busy:
            fleet.tend()
            time.sleep(0.1)
        crowd.close()
        fleet.calm()
        judge = Judge(fleet, crowd, births, room_was_short="full" in weather.struck)
        judge.wait(plan.patience_s)
        judge.hear()
        judge.expire()
        _sweep(fleet)
        judge.spool_is_empty()
    return judge, weather, crowd


def _forecast(plan: Plan, seed: int, *, has_disk: bool) -> list[tuple[int, str]]:
    """Blows, and how many jobs were accepted before each."""
    rng = random.Random(seed + 1)  # noqa: S311 -- repeatable, no secret
    names = [name for name, count in plan.blows.items() for _ in range(count) if has_disk or name != "full"]
    rng.shuffle(names)
    return list(zip(sorted(rng.randrange(plan.jobs * 9 // 10) for _ in names), names, strict=True))


def _blow(weather: Weather, crowd: Crowd, fleet: Fleet, forecast: Sequence[tuple[int, str]]) -> None:
    for after, name in forecast:
        while crowd.busy and len(crowd.tickets) < after:
            fleet.tend()
            time.sleep(0.02)
        weather.strike(name)
        fleet.tend()


def _sweep(fleet: Fleet) -> None:
    """Orphans are swept when they are an hour old: they are now, and a worker that starts looks at once."""
    past = time.time() - _PAST_S
    for path in fleet.spool.iterdir():
        os.utime(path, (past, past))
    for name in fleet.workers:
        fleet.again(name)
