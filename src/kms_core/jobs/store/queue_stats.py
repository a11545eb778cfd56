"""Counts of open jobs, and figures of Redis, for metrics and status; changes nothing. O(t) in the tenants."""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Final

from kms_core.jobs.model import QueuePriority
from kms_core.jobs.store.redis_keys import PREFIX, redis_errors
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics

OTHER: Final = "other"
STATES: Final = ("queued", "running", "committing")
NEWER: Final = "for_newer_workers"
"""The value of ``state`` for jobs that wait for a newer worker; they are queued, too."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """``jobs`` by state, without the parts of others; ``depths`` are ready jobs by queue and priority.

    ``spooled`` are bytes of uploads and items by tenant. ``oldest_queued_s`` is the age in seconds of the
    oldest job that could run; ``memory`` is the share of its limit that Redis uses (0 without a limit).
    ``stuck`` processes of workers cannot be ended; ``leases`` are of the resources that have a bound.
    ``newer`` jobs wait for a worker of a newer version.
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


def survey(store: JobStore, tenant: str | None = None) -> QueueStats:
    """Statistics of all jobs; ``jobs`` of one tenant, if one is named.

    Raises JobsUnavailable, RecordRefused.
    """
    tenants = [tenant] if tenant is not None else store.tenants()
    now, bounded, width = store.now(), list(store.resource_leases), len(STATES) + 1
    with redis_errors():
        pipeline = store.redis.pipeline(transaction=False)
        for name in tenants:
            for state in STATES:
                pipeline.zcard(f"{PREFIX}state:{name}:{state}")
            pipeline.hget(f"{PREFIX}spooled:{name}", "sum")
        for resource in bounded:
            pipeline.zcount(f"{PREFIX}used:{resource}", now, "+inf")
        pipeline.zcard(f"{PREFIX}dead")
        pipeline.info("memory")
        pipeline.hgetall(f"{PREFIX}stuck")
        *counts, dead, memory, stuck = pipeline.execute()
        rows = [counts[at : at + width] for at in range(0, width * len(tenants), width)]
        spooled = {name: int(row[-1] or 0) for name, row in zip(tenants, rows, strict=True)}
        hanging = sum(map(int, stuck.values()))
    waiting = store.waiting()
    oldest = min((since for count, since in waiting.values() if count), default=now)
    return QueueStats(
        {state: sum(row[at] for row in rows) for at, state in enumerate(STATES)},
        {lane: count for lane, (count, _) in waiting.items()},
        max(0.0, now - oldest),
        dead,
        store.workers(),
        _share(memory),
        spooled,
        hanging,
        dict(zip(bounded, counts[width * len(tenants) :], strict=True)),
        store.for_newer_workers(),
    )


def tell(found: QueueStats, tenants: Container[str]) -> None:
    """Put it into the metrics; sizes of all tenants but ``tenants`` are one sum, which is named other."""
    sizes = Counter({OTHER: 0})
    for name, size_bytes in found.spooled.items():
        sizes[name if name in tenants else OTHER] += size_bytes
    for name, size_bytes in sizes.items():
        metrics.SPOOL_TENANT.labels(name).set(size_bytes)
    for state, count in found.jobs.items():
        metrics.JOBS_IN_STATE.labels(state).set(count)
    metrics.JOBS_IN_STATE.labels(NEWER).set(found.newer)
    for (queue, priority), depth in found.depths.items():
        metrics.QUEUE_DEPTH.labels(queue, priority).set(depth)
    metrics.OLDEST_QUEUED.set(found.oldest_queued_s)
    metrics.DEAD_LETTERS.set(found.dead)
    metrics.WORKERS.set(found.workers)
    metrics.REDIS_MEMORY.set(found.memory)
    metrics.STUCK_PROCESSES.set(found.stuck)
    for resource, count in found.leases.items():
        metrics.RESOURCE_LEASES.labels(resource).set(count)


def lost() -> None:
    """Redis does not answer: a figure of yesterday would look like one of now."""
    gauges = (
        metrics.OLDEST_QUEUED,
        metrics.DEAD_LETTERS,
        metrics.WORKERS,
        metrics.REDIS_MEMORY,
        metrics.REDIS_WRITABLE,
        metrics.STUCK_PROCESSES,
    )
    for gauge in (*gauges, *map(metrics.JOBS_IN_STATE.labels, (*STATES, NEWER))):
        gauge.set(float("nan"))
    for told in (metrics.QUEUE_DEPTH, metrics.RESOURCE_LEASES):  # those told of before
        for sample in (sample for family in told.collect() for sample in family.samples):
            told.labels(**sample.labels).set(float("nan"))


def _share(memory: dict[str, int]) -> float:
    most = memory.get("maxmemory", 0)
    return memory.get("used_memory", 0) / most if most else 0.0
