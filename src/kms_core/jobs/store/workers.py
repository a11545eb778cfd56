"""Activity of workers and their queues, and the number of results that are kept.

All reads are bounded: none costs more where there are more jobs. A job is reported only after the store has
verified whose it is.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kms_core.jobs.model import QueuePriority
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.heartbeats import WORKER_SEEN_S
from kms_core.jobs.store.keys import PREFIX, job_key
from kms_core.jobs.store.records import named, number
from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import PRIORITIES, Priority

MOST_WORKERS: Final = 100
MOST_LEASES: Final = 200
_MOST_LEFT_ALONE: Final = 5


@dataclass(frozen=True, slots=True)
class WorkerActivity:
    """A worker as Redis knows it.

    ``silent_s`` is the time since its last heartbeat; None for one that is to stop and has jobs left.
    ``started`` is in seconds since the epoch; 0, and ``version`` empty, of one that is stopping. ``stuck`` is
    the number of its processes that hang. It takes no job that uses a resource in ``left_alone``: attempts
    hung there. ``jobs`` are the ids of the jobs that it runs; for a part, that of the whole job.
    """

    name: str
    silent_s: float | None
    processes: int = 0
    queues: tuple[str, ...] = ()
    version: str = ""
    started: float = 0.0
    stuck: int = 0
    left_alone: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()

    @property
    def is_live(self) -> bool:
        return self.silent_s is not None and self.silent_s <= WORKER_SEEN_S

    @property
    def state(self) -> str:
        if self.silent_s is None:
            return "stopping"
        if not self.is_live:
            return "not seen"
        return ("working" if self.jobs else "idle") if self.queues else "starting"


@dataclass(frozen=True, slots=True)
class QueueActivity:
    """A queue: processes that serve it, and jobs that run.

    ``waiting`` has for each priority the number of ready jobs, and for how long the oldest waits, in seconds.
    """

    name: str
    processes: int
    running: int
    waiting: Mapping[Priority, tuple[int, float]]

    @property
    def count(self) -> int:
        """Ready jobs."""
        return sum(count for count, _ in self.waiting.values())

    @property
    def oldest_s(self) -> float:
        return max(age_s for _, age_s in self.waiting.values())

    @property
    def is_unserved(self) -> bool:
        """True if jobs wait and no worker takes them."""
        return not self.processes and self.count > 0


@dataclass(frozen=True, slots=True)
class Activity:
    """``has_more``: there are more workers or running jobs than are listed.

    ``results`` of ended jobs are kept, and the next one expires at ``expires`` (seconds since the epoch).
    """

    workers: list[WorkerActivity]
    queues: list[QueueActivity]
    has_more: bool
    results: int
    expires: float


def read(store: JobStore) -> Activity:
    """All tenants' activity. Raises JobsUnavailable."""
    now = store.now()
    with redis_errors():
        pipeline = store.redis.pipeline(transaction=False)
        pipeline.zrevrange(f"{PREFIX}workers", 0, MOST_WORKERS - 1, withscores=True)
        pipeline.zrangebyscore(f"{PREFIX}leased", now, "+inf", 0, MOST_LEASES)
        pipeline.zcard(f"{PREFIX}ended")
        pipeline.zrange(f"{PREFIX}ended", 0, 0, withscores=True)
        seen, leased, ended, first = pipeline.execute()
        pipeline = store.redis.pipeline(transaction=False)
        for name, _ in seen:
            pipeline.hget(f"{PREFIX}slots", name)
            pipeline.hget(f"{PREFIX}stuck", name)
            pipeline.zrangebyscore(f"{PREFIX}stalls:{named(name)}", now, "+inf", 0, _MOST_LEFT_ALONE)
        for job_id in leased:
            pipeline.hmget(job_key(named(job_id)), "worker", "parent", "parts", "queue")
        found = pipeline.execute()
        notes, records = found[: 3 * len(seen)], found[3 * len(seen) :]
        held, running = _leases(leased, records)
        workers = [
            _worker(named(name), max(0.0, now - at), notes[3 * rank : 3 * rank + 3], held)
            for rank, (name, at) in enumerate(seen)
        ]
    workers += [WorkerActivity(name, None, jobs=tuple(jobs)) for name, jobs in held.items()]
    has_more = len(seen) == MOST_WORKERS or len(leased) == MOST_LEASES
    queues = _queues(store, workers, running)
    workers.sort(key=lambda each: each.name)
    return Activity(workers, queues, has_more, ended, number((b"%f" % first[0][1])[:10]) if first else 0.0)


def _leases(
    leased: Sequence[bytes], records: Sequence[Sequence[bytes | None]]
) -> tuple[dict[str, Sequence[str]], Counter[str]]:
    """The jobs that each worker runs, and the number of them in each queue; a job in parts runs in these."""
    held, running = defaultdict(list), Counter[str]()
    for job_id, (worker, parent, parts, queue) in zip(leased, records, strict=True):
        if worker and queue and not parts:
            held[named(worker).partition("/")[0]].append(named(parent or job_id))
            running[named(queue)] += 1
    return dict(held), running


def _worker(
    name: str,
    silent_s: float,
    notes: list[Any],
    held: dict[str, Sequence[str]],
) -> WorkerActivity:
    note, stuck, left_alone = notes
    processes, *words = named(note or b"").split() or [""]
    version, started = version_and_start(note or b"")
    return WorkerActivity(
        name,
        silent_s,
        int(number(processes.encode())),
        tuple(each for each in words if each in QUEUES),
        version,
        started,
        int(number(stuck)),
        tuple(named(each) for each in left_alone),
        tuple(held.pop(name, ())),
    )


def version_and_start(note: bytes) -> tuple[str, float]:
    """The version of a worker and when it started (seconds since the epoch), as it noted them.

    Empty and 0 for a worker that is stopping.
    """
    version, started, *_ = (*(each for each in named(note).split()[1:] if each not in QUEUES), "", "")
    return version, number(started[:10].encode())  # more digits would be no time


def _queues(
    store: JobStore, workers: Sequence[WorkerActivity], running: Mapping[str, int]
) -> list[QueueActivity]:
    now, ready = store.now(), waiting(store)
    return [
        QueueActivity(
            queue,
            sum(each.processes for each in workers if each.is_live and queue in each.queues),
            running[queue],
            {
                priority: (count, max(0.0, now - since))
                for priority in PRIORITIES
                for count, since in [ready[queue, priority]]
            },
        )
        for queue in QUEUES
    ]


def waiting(store: JobStore) -> Mapping[QueuePriority, tuple[int, float]]:
    """The number of ready jobs, and since when the oldest waits. Raises JobsUnavailable."""
    pairs: list[QueuePriority] = [(queue, priority) for queue in QUEUES for priority in PRIORITIES]
    with redis_errors():
        pipeline = store.redis.pipeline(transaction=False)
        for queue, priority in pairs:
            pipeline.zcard(f"{PREFIX}waiting:{queue}:{priority}")
            pipeline.zrange(f"{PREFIX}waiting:{queue}:{priority}", 0, 0, withscores=True)
        found = pipeline.execute()
    counts, firsts = found[::2], found[1::2]
    return {
        pair: (int(count), first[0][1] if first else math.inf)
        for pair, count, first in zip(pairs, counts, firsts, strict=True)
    }
