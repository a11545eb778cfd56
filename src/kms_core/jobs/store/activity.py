"""Workers and what they do, queues, usage, and the jobs of the last hours, for pages and metrics.

All reads are bounded: none costs more where there are more jobs. A job is told of only after the store has
verified whose it is.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, cast

import redis

from kms_core.jobs.model import QueuePriority
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.maintenance import WORKER_SEEN_S
from kms_core.jobs.store.redis_keys import PREFIX, SCRIPTS, flat, job_key, named, number, redis_errors
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics
from kms_core.observability.metrics import UsageCounters, operations_used
from kms_core.periodic import PeriodicThread
from kms_protocol.errors import JobsUnavailable
from kms_protocol.wire import STATES, Priority

MOST_WORKERS: Final = 100
MOST_LEASES: Final = 200
_CAUSE_CHARS: Final = 64
SAMPLE: Final = 5
"""The jobs of each interval whose durations are looked at."""


@dataclass(frozen=True, slots=True)
class WorkerActivity:
    """A worker as Redis knows it.

    ``silent_s`` is the time since its last heartbeat; None for one that was told to stop and has jobs left.
    ``started`` is in seconds since the epoch; 0, and ``version`` empty, of one that is stopping. ``jobs`` are
    the ids of jobs that it runs, of a part that of the whole. ``stuck`` of its processes hang. It
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
            pipeline.zrangebyscore(f"{PREFIX}stalls:{named(name)}", now, "+inf", 0, SAMPLE)
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
    version, started, *_ = (*(each for each in words if each not in QUEUES), "", "")
    return WorkerActivity(
        name,
        silent_s,
        int(number(processes.encode())),
        tuple(each for each in words if each in QUEUES),
        version,
        number(started[:10].encode()),  # more digits would be no time
        int(number(stuck)),
        tuple(named(each) for each in left_alone),
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

    Lists of jobs are by submission, and a job stays in them for a day after its end. Raises JobsUnavailable.
    """
    starts = _starts(store, every_s, count)
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
                pipeline.hmget(job_key(named(job_id)), "created_at", "started_at", "ended_at")
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


def _starts(store: JobStore, every_s: int, count: int) -> list[int]:
    last = int(store.now()) // every_s * every_s
    return [last - every_s * back for back in reversed(range(count))]


def _spans(record: Sequence[bytes | None]) -> tuple[float, float] | None:
    """For how long a job waited and ran, in seconds; None unless its record says so."""
    created, started, ended = map(number, record)
    return (started - created, ended - started) if 0 < created <= started <= ended else None


def submitted_since(store: JobStore, tenant: str, since: float) -> int:
    """The number of a tenant's jobs submitted since a time (seconds since the epoch).

    Raises JobsUnavailable.
    """
    with redis_errors():
        return int(store.redis.zcount(f"{PREFIX}tenant:{tenant}", since, "+inf"))


_MOST_FAILED: Final = 20
"""The newest failed jobs that are looked at of each tenant, at least."""
_MOST_READ: Final = 2_000
"""Failed jobs that are looked at of all tenants, as long as each has its 20."""


@dataclass(frozen=True, slots=True)
class TenantJobs:
    """Jobs of a tenant, as Redis says, by state; ``failed`` ended since a time, for these ``causes``.

    ``unseen`` older failed jobs were not looked at, although the newer ones all ended since that time.
    """

    tenant: str
    queued: int
    running: int
    failed: int
    dead: int
    causes: Counter[str] = field(default_factory=Counter)
    unseen: int = 0


def by_tenant(store: JobStore, since: float) -> list[TenantJobs]:
    """The jobs of each tenant, those with the most failures since ``since`` (seconds since the epoch) first.

    Raises JobsUnavailable.
    """
    names, width = store.tenants(), len(OPEN_STATES) + 3
    most = max(_MOST_FAILED, _MOST_READ // max(1, len(names)))
    with redis_errors():
        pipeline = store.redis.pipeline(transaction=False)
        for name in names:
            for state in OPEN_STATES:
                pipeline.zcard(f"{PREFIX}state:{name}:{state}")
            pipeline.zcard(f"{PREFIX}dead:{name}")
            pipeline.zcard(f"{PREFIX}state:{name}:failed")
            pipeline.zrevrange(f"{PREFIX}state:{name}:failed", 0, most - 1)
        found = pipeline.execute()
        rows = [found[at : at + width] for at in range(0, len(found), width)]
        pipeline = store.redis.pipeline(transaction=False)
        for job_id in (job_id for row in rows for job_id in row[-1]):
            pipeline.hmget(job_key(named(job_id)), "ended_at", "error")
        ended = iter(pipeline.execute())
    jobs = []
    for name, (queued, running, committing, dead, kept, failed) in zip(names, rows, strict=True):
        ends = [next(ended) for _ in failed]
        causes = Counter(named(code or b"")[:_CAUSE_CHARS] for at, code in ends if number(at) >= since)
        unseen = kept - len(failed) if causes.total() == len(failed) else 0
        jobs.append(TenantJobs(name, queued, running + committing, causes.total(), dead, causes, unseen))
    return sorted(jobs, key=lambda each: (-each.failed, -each.dead, -each.queued, each.tenant))


OTHER: Final = "other"
OPEN_STATES: Final = ("queued", "running", "committing")
NEWER: Final = "for_newer_workers"
"""The value of ``state`` for jobs that wait for a newer worker; they are queued, too."""
DEAD: Final = "dead"
"""The value of ``state`` for jobs that used up their attempts."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """``jobs`` by state, without the parts of others; ``depths`` are ready jobs by queue and priority.

    ``spooled`` are bytes of uploads and items by tenant. ``oldest_queued_s`` is the age in seconds of the
    oldest job that could run; ``memory`` is the share of its limit that Redis uses (0 without a limit).
    ``stuck`` processes of workers hang; ``leases`` are of the resources that have a bound.
    ``newer`` jobs wait for a worker of a newer version; ``versions`` counts workers by their version.
    """

    jobs: dict[str, int]
    depths: dict[QueuePriority, int]
    oldest_queued_s: float
    dead: int
    workers: int
    memory: float
    spooled: dict[str, int]
    stuck: int = 0
    leases: Mapping[str, int] = field(default_factory=dict)
    newer: int = 0
    versions: Mapping[str, int] = field(default_factory=dict)


def survey_queues(store: JobStore, tenant: str | None = None) -> QueueStats:
    """Statistics of all jobs; ``jobs`` of one tenant, if one is named. Raises JobsUnavailable."""
    tenants = [tenant] if tenant is not None else store.tenants()
    now, bounded, width = store.now(), list(store.resource_leases), len(OPEN_STATES) + 1
    with redis_errors():
        pipeline = store.redis.pipeline(transaction=False)
        for name in tenants:
            for state in OPEN_STATES:
                pipeline.zcard(f"{PREFIX}state:{name}:{state}")
            pipeline.hget(f"{PREFIX}spooled:{name}", "sum")
        for resource in bounded:
            pipeline.zcount(f"{PREFIX}used:{resource}", now, "+inf")
        pipeline.zcard(f"{PREFIX}dead")
        pipeline.info("memory")
        pipeline.hgetall(f"{PREFIX}stuck")
        pipeline.hgetall(f"{PREFIX}slots")
        *counts, dead, memory, stuck, slots = pipeline.execute()
        rows = [counts[at : at + width] for at in range(0, width * len(tenants), width)]
        spooled = {name: int(number(row[-1])) for name, row in zip(tenants, rows, strict=True)}
        hanging = sum(int(number(count)) for count in stuck.values())
        noted = Counter(_worker("", 0.0, [note, None, ()], {}).version for note in slots.values())
    waiting = store.waiting()
    oldest = min((since for count, since in waiting.values() if count), default=now)
    return QueueStats(
        {state: sum(row[at] for row in rows) for at, state in enumerate(OPEN_STATES)},
        {lane: count for lane, (count, _) in waiting.items()},
        max(0.0, now - oldest),
        dead,
        store.workers(),
        memory["used_memory"] / memory["maxmemory"] if memory.get("maxmemory") else 0.0,
        spooled,
        hanging,
        dict(zip(bounded, counts[width * len(tenants) :], strict=True)),
        store.for_newer_workers(),
        {version: count for version, count in noted.items() if version},
    )


def set_queue_gauges(found: QueueStats, tenants: Container[str]) -> None:
    """Put it into the metrics; sizes of all tenants but ``tenants`` are one sum, which is named other."""
    sizes = Counter({OTHER: 0})
    for name, size_bytes in found.spooled.items():
        sizes[name if name in tenants else OTHER] += size_bytes
    for name, size_bytes in sizes.items():
        metrics.SPOOL_TENANT.labels(name).set(size_bytes)
    for state, count in (found.jobs | {NEWER: found.newer, DEAD: found.dead}).items():
        metrics.JOBS_IN_STATE.labels(state).set(count)
    for (queue, priority), depth in found.depths.items():
        metrics.QUEUE_DEPTH.labels(queue, priority).set(depth)
    metrics.OLDEST_QUEUED.set(found.oldest_queued_s)
    metrics.WORKERS.set(found.workers)
    metrics.STORAGE_USED.labels("redis").set(found.memory)
    metrics.STUCK_PROCESSES.set(found.stuck)
    for resource, count in found.leases.items():
        metrics.RESOURCE_LEASES.labels(resource).set(count)


def clear_queue_gauges() -> None:
    """Redis does not answer: a figure of yesterday would look like one of now."""
    gauges = (
        metrics.OLDEST_QUEUED,
        metrics.WORKERS,
        metrics.STORAGE_USED.labels("redis"),
        metrics.REDIS_OK.labels("writes"),
        metrics.STUCK_PROCESSES,
    )
    for gauge in (*gauges, *map(metrics.JOBS_IN_STATE.labels, (*OPEN_STATES, NEWER, DEAD))):
        gauge.set(float("nan"))
    for told in (metrics.QUEUE_DEPTH, metrics.RESOURCE_LEASES):  # those told of before
        for sample in (sample for family in told.collect() for sample in family.samples):
            told.labels(**sample.labels).set(float("nan"))


EVERY_S: Final = 2.0
_AT_ONCE: Final = 1_000  # counts: some milliseconds, in which Redis does nothing else
_KEY: Final = f"{PREFIX}tally"


def shared_usage(client: redis.Redis) -> dict[str, int]:
    """The counts that all processes have flushed. Raises JobsUnavailable."""
    with redis_errors():
        found = cast("dict[bytes, bytes]", client.hgetall(_KEY))
        return {named(name): int(number(count)) for name, count in found.items()}


# A point a minute of the sums of all operations, in a stream of a day. The sums only grow, so a point that
# is missing loses nothing: what it would have had is in the next one.

MOST_POINTS: Final = 1440
_POINTS: Final = f"{PREFIX}operations"
_SUM: Final = re.compile(rb"[0-9]{1,15}")


@dataclass(frozen=True, slots=True)
class OperationInterval:
    """Operations of all tenants counted from ``start`` on, in seconds since the epoch.

    ``failed`` includes those that were refused.
    """

    start: float
    succeeded: int
    failed: int


def add_point(store: JobStore) -> None:
    """Add the sums of now to the stream. Raises JobsUnavailable."""
    used = operations_used(shared_usage(store.redis)).values()
    succeeded, failed = (sum(counts[at] for counts in used) for at in (0, 1))
    with redis_errors():
        store.redis.xadd(
            _POINTS, {"succeeded": succeeded, "failed": failed}, maxlen=MOST_POINTS, approximate=False
        )


def operations(store: JobStore, every_s: int, count: int) -> list[OperationInterval]:
    """The last intervals of so many seconds, the oldest first, from the differences between points.

    What happened between two points counts at the later one; sums that fell began at 0 again. Entries that
    the service did not write are left out. Raises JobsUnavailable.
    """
    counts = {start: [0, 0] for start in _starts(store, every_s, count)}
    first = min(counts) * 1000
    with redis_errors():
        pipeline = store.redis.pipeline(transaction=False)
        pipeline.xrevrange(_POINTS, max=f"({first}-0", count=1)
        pipeline.xrange(_POINTS, min=first, count=MOST_POINTS)
        before, since = pipeline.execute()
        points = [point for entry in before + since if (point := _point(*entry))]
    for (_, *earlier), (at, *later) in pairwise(points):
        interval = counts.get(at // every_s * every_s, [0, 0])
        for series, (low, high) in enumerate(zip(earlier, later, strict=True)):
            interval[series] += high - low if high >= low else high
    return [OperationInterval(start, *sums) for start, sums in counts.items()]


def _point(name: bytes, fields: Mapping[bytes, bytes]) -> tuple[int, int, int] | None:
    """The time of a point (seconds since the epoch) and its two sums; None for another entry."""
    sums = [fields.get(series, b"") for series in (b"succeeded", b"failed")]
    if len(fields) != len(sums) or not all(map(_SUM.fullmatch, sums)):
        return None
    return int(name.partition(b"-")[0]) // 1000, int(sums[0]), int(sums[1])


class UsageFlush(PeriodicThread):
    """Flushes the counts every 2 seconds, and a last time when stopped; without Redis they are kept."""

    def __init__(self, counters: UsageCounters, client: redis.Redis) -> None:
        super().__init__("usage-flush", EVERY_S, failed="tally.lost")
        self._counters = counters
        self._client = client

    def round(self) -> None:
        counts = list(self._counters.take().items())
        add = self._client.register_script(SCRIPTS["add_counts"])
        for start in range(0, len(counts), _AT_ONCE):
            try:
                with redis_errors():
                    add([_KEY], flat(dict(counts[start : start + _AT_ONCE])))
            except JobsUnavailable:
                self._counters.put_back(dict(counts[start:]))
                return

    def finish(self) -> None:
        self.round()

    def stop(self, wait_s: float = EVERY_S) -> None:
        super().stop(wait_s)
