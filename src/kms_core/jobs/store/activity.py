"""Workers and what they do, queues, and the jobs of the last hours, for the pages; changes nothing.

All reads are bounded: none costs more where there are more jobs. A job is told of only after the store has
verified whose it is.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.maintenance import WORKER_SEEN_S
from kms_core.jobs.store.redis_keys import PREFIX, job_key, number, redis_errors
from kms_core.jobs.store.store import JobStore
from kms_protocol.wire import STATES, Priority

MOST_WORKERS: Final = 100
MOST_LEASES: Final = 200
SAMPLE: Final = 5
"""The jobs of each interval whose durations are looked at."""


@dataclass(frozen=True, slots=True)
class WorkerActivity:
    """A worker as Redis knows it.

    ``silent_s`` is the time since its last heartbeat; None for one that was told to stop and has jobs left.
    ``started`` is in seconds since the epoch; 0, and ``version`` empty, of one that is stopping. ``jobs`` are
    the ids of jobs that it runs, of a part that of the whole. ``stuck`` of its processes cannot be ended. It
    takes no job that uses a resource in ``left_alone``: attempts hung there.
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


@dataclass(frozen=True, slots=True)
class Interval:
    """Jobs submitted from ``start`` on, in seconds since the epoch, by the state that they are in now.

    ``waited_s`` and ``ran_s`` are means over the newest ``SAMPLE`` of those that succeeded; None without any.
    """

    start: float
    counts: Mapping[str, int]
    waited_s: float | None
    ran_s: float | None


def read(store: JobStore) -> Activity:
    """All tenants' activity. Raises JobsUnavailable, RecordRefused."""
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
            pipeline.zrangebyscore(f"{PREFIX}stalls:{name.decode()}", now, "+inf", 0, SAMPLE)
        for job_id in leased:
            pipeline.hmget(job_key(job_id.decode()), "worker", "parent", "parts", "queue")
        found = pipeline.execute()
        notes, records = found[: 3 * len(seen)], found[3 * len(seen) :]
        held, running = _leases(leased, records)
        workers = [
            _worker(name.decode(), max(0.0, now - at), notes[3 * rank : 3 * rank + 3], held)
            for rank, (name, at) in enumerate(seen)
        ]
    workers += [WorkerActivity(name, None, jobs=tuple(jobs)) for name, jobs in held.items()]
    has_more = len(seen) == MOST_WORKERS or len(leased) == MOST_LEASES
    queues = _queues(store, workers, running)
    workers.sort(key=lambda each: each.name)
    return Activity(workers, queues, has_more, ended, first[0][1] if first else 0.0)


def _leases(
    leased: Sequence[bytes], records: Sequence[Sequence[bytes | None]]
) -> tuple[dict[str, Sequence[str]], Counter[str]]:
    """The jobs that each worker runs, and the number of them in each queue; a job in parts runs in these."""
    held, running = defaultdict(list), Counter[str]()
    for job_id, (worker, parent, parts, queue) in zip(leased, records, strict=True):
        if worker and queue and not parts:
            held[worker.decode().partition("/")[0]].append((parent or job_id).decode())
            running[queue.decode()] += 1
    return dict(held), running


def _worker(
    name: str,
    silent_s: float,
    notes: list[Any],
    held: dict[str, Sequence[str]],
) -> WorkerActivity:
    note, stuck, left_alone = notes
    processes, *words = (note or b"0").decode().split()
    version, started = [each for each in words if each not in QUEUES] or ("", "0")
    return WorkerActivity(
        name,
        silent_s,
        int(processes),
        tuple(each for each in words if each in QUEUES),
        version,
        float(started),
        int(stuck or 0),
        tuple(each.decode() for each in left_alone),
        tuple(held.pop(name, ())),
    )


def _queues(
    store: JobStore, workers: Sequence[WorkerActivity], running: Mapping[str, int]
) -> list[QueueActivity]:
    now, ready = store.now(), store.waiting()
    return [
        QueueActivity(
            queue,
            sum(each.processes for each in workers if each.is_live and queue in each.queues),
            running[queue],
            {
                priority: (count, max(0.0, now - since))
                for (of, priority), (count, since) in ready.items()
                if of == queue
            },
        )
        for queue in QUEUES
    ]


def intervals(store: JobStore, tenant: str, every_s: int, count: int) -> list[Interval]:
    """The last intervals of so many seconds, the oldest first; the last one is not over.

    Lists of jobs are by submission, and a job stays in them for a day after its end. Raises JobsUnavailable,
    RecordRefused.
    """
    last = int(store.now()) // every_s * every_s
    starts = [last - every_s * back for back in reversed(range(count))]
    with redis_errors():
        pipeline = store.redis.pipeline(transaction=False)
        for start in starts:
            for state in STATES:
                pipeline.zcount(f"{PREFIX}state:{tenant}:{state}", start, f"({start + every_s}")
            key = f"{PREFIX}state:{tenant}:succeeded"
            pipeline.zrevrangebyscore(key, f"({start + every_s}", start, 0, SAMPLE)
        found = pipeline.execute()
        rows = [found[at : at + len(STATES) + 1] for at in range(0, len(found), len(STATES) + 1)]
        pipeline = store.redis.pipeline(transaction=False)
        for *_, ids in rows:
            for job_id in ids:
                pipeline.hmget(job_key(job_id.decode()), "created_at", "started_at", "ended_at")
        times = iter(pipeline.execute())
        spans = [list(filter(None, (_spans(next(times)) for _ in ids))) for *_, ids in rows]
    return [
        Interval(
            start,
            dict(zip(STATES, row, strict=False)),
            *(sum(each) / len(of) for each in zip(*of, strict=True)) if of else (None, None),
        )
        for start, row, of in zip(starts, rows, spans, strict=True)
    ]


def _spans(record: Sequence[bytes | None]) -> tuple[float, float] | None:
    """For how long a job waited and ran, in seconds; None unless its record says so."""
    created, started, ended = map(number, record)
    return (started - created, ended - started) if 0 < created <= started <= ended else None
