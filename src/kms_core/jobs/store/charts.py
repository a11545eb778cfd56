"""Jobs and operations by intervals of time, for charts.

All reads are bounded: none costs more where there are more jobs.

Of the sums of all operations there is a point a minute, in a stream of a day. The sums only grow, so a point
that is missing loses nothing: what it would have had is in the next one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.keys import PREFIX, job_key
from kms_core.jobs.store.records import named, number
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.store.usage import shared_usage
from kms_core.observability.metrics import operations_used
from kms_protocol.wire import STATES

SAMPLE: Final = 5
"""The jobs of each interval whose durations are looked at."""
MOST_POINTS: Final = 1440
_POINTS: Final = f"{PREFIX}operations"
_SUM: Final = re.compile(rb"[0-9]{1,15}")


@dataclass(frozen=True, slots=True)
class Interval:
    """Jobs submitted from ``start`` on, in seconds since the epoch, by the state that they are in now.

    ``waited_s`` and ``ran_s`` are means over the newest ``SAMPLE`` of those that succeeded; None without any.
    """

    start: float
    counts: Mapping[str, int]
    waited_s: float | None
    ran_s: float | None


@dataclass(frozen=True, slots=True)
class OperationInterval:
    """Operations of all tenants counted from ``start`` on, in seconds since the epoch.

    ``failed`` includes those that were refused.
    """

    start: float
    succeeded: int
    failed: int


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
