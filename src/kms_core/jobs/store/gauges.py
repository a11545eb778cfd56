"""Figures of all queues, and the gauges that show them as metrics."""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Final

from kms_core.jobs.model import QueuePriority
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.heartbeats import live_workers
from kms_core.jobs.store.keys import PREFIX
from kms_core.jobs.store.records import number
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.store.tenants import OPEN_STATES, tenants
from kms_core.jobs.store.workers import version_and_start, waiting
from kms_core.observability import metrics

OTHER: Final = "other"
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
    names = [tenant] if tenant is not None else tenants(store)
    now, bounded, width = store.now(), list(store.resource_leases), len(OPEN_STATES) + 1
    with redis_errors():
        pipeline = store.redis.pipeline(transaction=False)
        for name in names:
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
        rows = [counts[at : at + width] for at in range(0, width * len(names), width)]
        spooled = {name: int(number(row[-1])) for name, row in zip(names, rows, strict=True)}
        hanging = sum(int(number(count)) for count in stuck.values())
        noted = Counter(version_and_start(note)[0] for note in slots.values())
    ready = waiting(store)
    oldest = min((since for count, since in ready.values() if count), default=now)
    return QueueStats(
        {state: sum(row[at] for row in rows) for at, state in enumerate(OPEN_STATES)},
        {lane: count for lane, (count, _) in ready.items()},
        max(0.0, now - oldest),
        dead,
        len(live_workers(store)),
        memory["used_memory"] / memory["maxmemory"] if memory.get("maxmemory") else 0.0,
        spooled,
        hanging,
        dict(zip(bounded, counts[width * len(names) :], strict=True)),
        for_newer_workers(store),
        {version: count for version, count in noted.items() if version},
    )


def for_newer_workers(store: JobStore) -> int:
    """The number of open jobs that wait for a worker of a newer version. Raises JobsUnavailable."""
    with redis_errors():
        return int(store.redis.zcard(f"{PREFIX}newer"))


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
    """Set the gauges of queues to NaN while Redis does not answer: old figures would look current."""
    gauges = (
        metrics.OLDEST_QUEUED,
        metrics.WORKERS,
        metrics.STORAGE_USED.labels("redis"),
        metrics.REDIS_OK.labels("writes"),
        metrics.STUCK_PROCESSES,
    )
    for gauge in (*gauges, *map(metrics.JOBS_IN_STATE.labels, (*OPEN_STATES, NEWER, DEAD))):
        gauge.set(float("nan"))
    for metric in (metrics.QUEUE_DEPTH, metrics.RESOURCE_LEASES):  # with the labels reported before
        for sample in (sample for family in metric.collect() for sample in family.samples):
            metric.labels(**sample.labels).set(float("nan"))
