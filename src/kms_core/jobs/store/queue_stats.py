"""A look at all open jobs and at Redis itself, for metrics and status; changes nothing."""

from dataclasses import dataclass
from typing import Final

from kms_core.jobs.store import set_aside
from kms_core.jobs.store.redis_keys import PREFIX, answered, job_key, number, redis_errors
from kms_core.jobs.store.store import JobStore
from kms_core.observability import metrics

STATES: Final = ("queued", "running", "committing")
MOST_JOBS: Final = 10_000
_FIELDS: Final = ("state", "created_at", "not_before", "parent", "tenant")


@dataclass(frozen=True, slots=True)
class QueueStats:
    """``jobs`` by state, without the parts of others; over at most 10,000 open ones. Times in seconds.

    ``oldest_queued_s`` is since when the oldest job waits that could run; ``memory`` is what Redis uses of
    what it may (0 where nothing limits it).
    """

    jobs: dict[str, int]
    oldest_queued_s: float
    dead: int
    set_aside: int
    workers: int
    memory: float


def survey(store: JobStore, tenant: str | None = None) -> QueueStats:
    """Of all jobs, or of those of one tenant; ``dead``, ``set_aside`` and ``memory`` are always of all.

    Raises JobsUnavailable.
    """
    with redis_errors():
        now = store.now()
        ids: list[bytes] = store.shared(store.redis.zrange, f"{PREFIX}open", 0, MOST_JOBS - 1)
        pipeline = store.redis.pipeline(transaction=False)
        for raw in ids:
            pipeline.hmget(job_key(raw.decode(errors="replace")), *_FIELDS)
        pipeline.zcard(f"{PREFIX}dead")
        set_aside.count(pipeline)
        pipeline.info("memory")
        *rows, dead, aside, memory = [answered(one) for one in pipeline.execute(raise_on_error=False)]
    jobs = dict.fromkeys(STATES, 0)
    oldest = now
    for state, created_at, not_before, parent, owner in filter(None, rows):
        if tenant is not None and owner != tenant.encode():
            continue
        name = (state or b"").decode(errors="replace")
        if name in jobs and not parent:
            jobs[name] += 1
        if name == "queued" and number(not_before) <= now:
            oldest = min(oldest, number(created_at, now))
    return QueueStats(jobs, now - oldest, int(dead or 0), int(aside or 0), store.workers(), _share(memory))


def tell(found: QueueStats) -> None:
    """Put it into the metrics."""
    for state, count in found.jobs.items():
        metrics.JOBS_IN_STATE.labels(state).set(count)
    metrics.OLDEST_QUEUED.set(found.oldest_queued_s)
    metrics.DEAD_LETTERS.set(found.dead)
    metrics.MESSAGES_SET_ASIDE.set(found.set_aside)
    metrics.WORKERS.set(found.workers)
    metrics.REDIS_MEMORY.set(found.memory)


def lost() -> None:
    """Redis does not answer: a figure of yesterday would look like one of now."""
    gauges = (metrics.OLDEST_QUEUED, metrics.DEAD_LETTERS, metrics.WORKERS, metrics.REDIS_MEMORY)
    for gauge in (*gauges, metrics.MESSAGES_SET_ASIDE, *map(metrics.JOBS_IN_STATE.labels, STATES)):
        gauge.set(float("nan"))
    for family in metrics.QUEUE_DEPTH.collect():  # the lanes that the broker told of
        for sample in family.samples:
            metrics.QUEUE_DEPTH.labels(**sample.labels).set(float("nan"))


def _share(memory: dict[str, int]) -> float:
    most = memory.get("maxmemory", 0)
    return memory.get("used_memory", 0) / most if most else 0.0
