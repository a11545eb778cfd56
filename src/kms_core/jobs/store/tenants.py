"""Jobs of each tenant: by state, submitted since a time, and why the newest ones failed.

All reads are bounded: none costs more where there are more jobs.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final, cast

from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.keys import PREFIX, job_key
from kms_core.jobs.store.records import named, number
from kms_core.jobs.store.store import JobStore

OPEN_STATES: Final = ("queued", "running", "committing")
_MOST_FAILED: Final = 20
"""The newest failed jobs that are looked at of each tenant, at least."""
_MOST_READ: Final = 2_000
"""Failed jobs that are looked at of all tenants, as long as each has its 20."""
_CAUSE_CHARS: Final = 64


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


def tenants(store: JobStore) -> list[str]:
    """The tenants that have jobs; names that none has are left out. Raises JobsUnavailable."""
    with redis_errors():
        return sorted(named(raw) for raw in cast("set[bytes]", store.redis.smembers(f"{PREFIX}tenants")))


def by_tenant(store: JobStore, since: float) -> list[TenantJobs]:
    """The jobs of each tenant, those with the most failures since ``since`` (seconds since the epoch) first.

    Raises JobsUnavailable.
    """
    names, width = tenants(store), len(OPEN_STATES) + 3
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


def submitted_since(store: JobStore, tenant: str, since: float) -> int:
    """The number of a tenant's jobs submitted since a time (seconds since the epoch).

    Raises JobsUnavailable.
    """
    with redis_errors():
        return int(store.redis.zcount(f"{PREFIX}tenant:{tenant}", since, "+inf"))
