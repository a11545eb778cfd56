"""Each script of Redis where its work is largest: a store in that state, and the call that runs it once.

Redis does nothing else while a script runs, so its work must have a bound. What callers choose has one in the
contract. Tenants, workers, roots and keys are named by operators: ``TENANTS`` and so on are large installs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import redis

from kms_api.ui.sessions import MOST_OF_CREDENTIAL, MOST_OF_TENANT, Sessions
from kms_core.auth.policy import Principal
from kms_core.jobs.events.outbox import Delivery, Outbox
from kms_core.jobs.model import Attempt, Checkpoint, RecordKey, part_id
from kms_core.jobs.recovery.reaper import forget, reap_all
from kms_core.jobs.spec import QUEUES, AnyJob, JobSpec, SignedEnd
from kms_core.jobs.store.heartbeats import processes_stuck, worker_lives, worker_seen
from kms_core.jobs.store.scripts import SCRIPTS
from kms_core.jobs.store.store import JobStore
from kms_core.jobs.store.usage import UsageFlush
from kms_core.operation import UsageCounters
from support.embedded_valkey import unrestricted
from support.job_stores import (
    COMMIT,
    TENANT,
    accepted,
    commands,
    connect,
    expire_leases,
    forge,
    resealed,
    take,
    with_jobs,
)

TENANTS: Final = 1_000
WORKERS: Final = 1_000
ROOTS: Final = 20
PARTS: Final = 400
"""Of 100,000 files above 100 GiB in all (``[kms.jobs] fanout_files``)."""
TALLIES: Final = 1_000
"""Counts of a part over 500 files, each of another version that was found, and left."""
ALL_TALLIES: Final = 5_000
"""Of a whole: an Age key has some 2,500 versions at most."""
OPEN_JOBS: Final = 100_000
LABELS: Final = 16
BACKEND: Final = "backend:bounded"
RESOURCES: Final = ("root:/source", "root:/target", BACKEND, "backend:second", "backend:third")
"""Source, target and the backends of a key."""
KEY: Final = RecordKey((b"k" * 32,))
RULES: Final = with_jobs(resource_leases=dict.fromkeys(RESOURCES[2:], 1))
LATER: Final = "later-feature"


class Bound(NamedTuple):
    """The call that ``prepare`` returns runs ``most`` commands; ``much`` is what the database has much of."""

    script: str
    much: str
    most: int
    prepare: Callable[[JobStore], Callable[[], object]]

    @property
    def name(self) -> str:
        return f"{self.script}: {self.much}"


class Measured(NamedTuple):
    """The commands of a call for each script that it runs, those within it too, and the longest run of one.

    A script of less than ``LOGGED_US`` counts as 0: a log of shorter ones would have each command within it.
    """

    commands: int
    microseconds: int


LOGGED_US: Final = 100


@contextmanager
def server(folder: Path) -> Iterator[redis.Redis]:
    """A server that knows all scripts, whose client may empty it and read its log of slow commands."""
    with unrestricted(folder) as url, closing(connect(url)) as client:
        for script in SCRIPTS.values():
            client.script_load(script)
        client.config_set("slowlog-log-slower-than", LOGGED_US)
        yield client


def measured(client: redis.Redis, bound: Bound) -> Measured:
    """Empty the database, prepare a bound in it, and run its call once."""
    client.flushall()
    store = JobStore(client, KEY, None, RULES, lambda: True)
    run = bound.prepare(store)
    client.slowlog_reset()
    scripts, every = _scripts(client), commands(store)
    run()
    every = commands(store) - every
    slow: Any = client.slowlog_get(1_000)
    took = [each["duration"] for each in slow if each["command"].startswith(b"EVALSHA")]
    return Measured(every // (_scripts(client) - scripts), max(took, default=0))


def _scripts(client: redis.Redis) -> int:
    found: Any = client.info("commandstats")
    return int(found.get("cmdstat_evalsha", {"calls": 0})["calls"])


# -- jobs ----------------------------------------------------------------------------------------------


def _largest(**changes: object) -> AnyJob:
    """A job with all that a caller may give it."""
    texts = {f"name-{number}": "v" * 128 for number in range(LABELS)}
    hooks = {"callback": "hook", "group_callback": "hook", "group": "group", "group_jobs": 10_000}
    return accepted(
        **{"labels": texts, "metadata": texts, "items": PARTS, "source": "items", **hooks, **changes}
    )


def _submitted(store: JobStore, **changes: object) -> str:
    return store.submit(_largest(**changes), resources=RESOURCES).job_id


def _small(store: JobStore, tenant: str, resources: Sequence[str] = (BACKEND,), **changes: object) -> str:
    made = accepted(**{"items": 1, "source": "items", "tenant": tenant, **changes})
    return store.submit(made, resources=resources).job_id


def _next(store: JobStore) -> object:
    return store.next("w/1", QUEUES, woken=False)


def _crowded(store: JobStore) -> Attempt:
    """An attempt that holds a backend for which each tenant waits."""
    claim = _waited_for(store)
    assert _next(store) is None
    return claim


def _waited_for(store: JobStore) -> Attempt:
    claim = take(store, _submitted(store))
    for number in range(TENANTS):
        _small(store, f"tenant-{number}")
    return claim


def _parts(claim: Attempt) -> list[JobSpec]:
    whole = claim.accepted.job_id
    changes = {
        "parent": whole,
        "labels": {},
        "metadata": {},
        "group": "",
        "callback": "",
        "group_callback": "",
    }
    made = [part_id(whole, number) for number in range(PARTS)]
    return [msgspec.structs.replace(claim.accepted, job_id=part, **changes) for part in made]


def _split(store: JobStore) -> tuple[str, list[str]]:
    """A job in parts, and these; they may run at the same time."""
    store.resource_leases = {}
    claim = take(store, _submitted(store))
    parts = _parts(claim)
    store.split(claim, parts)
    return claim.accepted.job_id, [part.job_id for part in parts]


def _tallied(store: JobStore, job_id: str, count: int) -> None:
    forge(store, job_id, **{f"tally:found:key/{number}": "1" for number in range(count)})


# -- what is prepared ------------------------------------------------------------------------------------


def _add_counts(store: JobStore) -> Callable[[], object]:
    counters = UsageCounters()
    counters.put_back({f"tenant {number} encrypt ok": 1 for number in range(10 * TENANTS)})
    return UsageFlush(counters, store.redis).round


def _begin_session(store: JobStore) -> Callable[[], object]:
    sessions = Sessions(store.redis, KEY)
    for number in range(MOST_OF_TENANT):
        sessions.begin(Principal("someone", TENANT, f"token:{number // MOST_OF_CREDENTIAL}"))
    return lambda: sessions.begin(Principal("someone", TENANT, "token:0"))


def _cancel_queued(store: JobStore) -> Callable[[], object]:
    job_id = _submitted(store)
    _crowded(store)
    return lambda: store.cancel(job_id, TENANT)


def _cancel_parts(store: JobStore) -> Callable[[], object]:
    whole, parts = _split(store)
    for part in parts:
        store.defer(take(store, part), 600)
    return lambda: store.cancel(whole, TENANT)


def _claim_newer(store: JobStore) -> Callable[[], object]:
    for kind in ("encrypt", "rewrap"):
        for _ in range(200):
            job_id = _small(store, TENANT, (), kind=kind)
            forge(store, job_id, needs=LATER)
    for _ in range(200):
        forge(store, _small(store, TENANT, (), source="upload", items=0), needs=LATER)
    return lambda: _next(store)


def _claim_blocked(store: JobStore) -> Callable[[], object]:
    _waited_for(store)
    return lambda: _next(store)


def _claim_large(store: JobStore) -> Callable[[], object]:
    store.large_job_bytes = 1
    large = {"size_bytes": 10, "source": "upload", "items": 0, "kind": "decrypt"}
    _small(store, TENANT, (), **large)
    assert _next(store)
    for number in range(TENANTS):
        _small(store, f"tenant-{number}", (), **large)
    return lambda: _next(store)


def _claim_classes(store: JobStore) -> Callable[[], object]:
    """One tenant has jobs between all roots, and its worker leaves these alone."""
    roots = [f"root:/{number}" for number in range(ROOTS)]
    processes_stuck(store, "w", 1, 600, roots)
    for source in roots:
        for target in roots:
            _small(store, TENANT, [source, target])
            _small(store, TENANT, [source, target, BACKEND])
    return lambda: _next(store)


def _claim_expired(store: JobStore) -> Callable[[], object]:
    job_id = _submitted(store)
    _crowded(store)
    forge(store, job_id, run_by="1")
    return lambda: store.claim(job_id, "w/1")


def _committing(store: JobStore) -> Callable[[], object]:
    claim = take(store, _submitted(store))
    return lambda: store.committing(claim, COMMIT)


def _defer(store: JobStore) -> Callable[[], object]:
    claim = _crowded(store)
    return lambda: store.defer(claim, 0.0)


def _end_parent(store: JobStore) -> Callable[[], object]:
    claim = _crowded(store)
    job_id = claim.accepted.job_id
    forge(store, job_id, parts=str(PARTS), parts_left="0")
    tallies = {f"found:key/{number}": 1 for number in range(ALL_TALLIES)}
    end = SignedEnd(fence=1, attempt=1, state="succeeded", tallies=tallies, kept_until=time.time() + 1e5)
    job = store.get(job_id, TENANT)
    return lambda: store.end_parent(job, end, claim.spec)


def _finish(store: JobStore) -> Callable[[], object]:
    claim = _crowded(store)
    return lambda: store.finish(claim, "succeeded")


def _finish_part(store: JobStore) -> Callable[[], object]:
    _, parts = _split(store)
    claim = take(store, parts[0])
    _tallied(store, parts[0], TALLIES)
    return lambda: store.finish(claim, "succeeded")


def _forget(store: JobStore) -> Callable[[], object]:
    for _ in range(200):
        claim = take(store, _submitted(store))
        store.finish(claim, "succeeded")
        store.redis.delete(f"kms:job:{claim.accepted.job_id}")
    names: Any = store.redis.zrange("kms:records", 0, -1)
    store.redis.zadd("kms:records", dict.fromkeys(names, 1))
    return lambda: forget(store)


def _input_removed(store: JobStore) -> Callable[[], object]:
    job_id = _submitted(store)
    return lambda: store.call_each("input_removed", [job_id])


def _lock(store: JobStore) -> Callable[[], object]:
    return lambda: store.lock("reaper", "w", 10)


def _move_delivery(store: JobStore) -> Callable[[], object]:
    many = {f"entry-{number}": number for number in range(OPEN_JOBS)}
    store.redis.zadd("kms:webhooks:due:hook", many)
    delivery = Delivery(
        delivery_id="d",
        endpoint="hook",
        job_id="j",
        state="succeeded",
        body=b"{}" * 20_000,
        created_at=time.time(),
        tenant=TENANT,
        entry=b"entry-1",
    )
    return lambda: Outbox(store, {}).put_off(delivery)


def _probe(store: JobStore) -> Callable[[], object]:
    return store.condition


def _purged(store: JobStore) -> Callable[[], object]:
    job_id = _submitted(store)
    return lambda: store.purged(job_id)


def _put_aside(store: JobStore) -> Callable[[], object]:
    job_id = _submitted(store)
    _crowded(store)
    forge(store, job_id, sealed=resealed(store, job_id, needs=[LATER]))
    store.resource_leases = {}
    return lambda: store.claim(job_id, "w/1")


def _reap(store: JobStore) -> Callable[[], object]:
    job_id = _crowded(store).accepted.job_id
    expire_leases(store)
    return lambda: reap_all(store, [job_id])


def _reap_expired(store: JobStore) -> Callable[[], object]:
    job_id = _crowded(store).accepted.job_id
    expire_leases(store)
    forge(store, job_id, run_by="1")
    return lambda: reap_all(store, [job_id])


def _release(store: JobStore) -> Callable[[], object]:
    claim = take(store, _submitted(store))
    store.finish(claim, "failed", "attempts_exhausted")
    job = store.get(claim.accepted.job_id, TENANT)
    return lambda: store.release(job)


def _renew(store: JobStore) -> Callable[[], object]:
    store.large_job_bytes = 0
    claim = take(store, _submitted(store))
    return lambda: store.renew(claim, {"items_done": 1, "items_failed": 1, "bytes_done": 1})


def _retry(store: JobStore) -> Callable[[], object]:
    claim = take(store, _submitted(store))
    job_id = claim.accepted.job_id
    store.finish(claim, "failed", "attempts_exhausted")
    _tallied(store, job_id, ALL_TALLIES)
    return lambda: store.retry(job_id, TENANT)


def _split_all(store: JobStore) -> Callable[[], object]:
    claim = _crowded(store)
    parts = _parts(claim)
    return lambda: store.split(claim, parts)


def _split_again(store: JobStore) -> Callable[[], object]:
    whole, parts = _split(store)
    for part in parts:
        store.finish(take(store, part), "failed", "attempts_exhausted")
    forge(store, whole, state="failed", error="attempts_exhausted")
    store.retry(whole, TENANT)
    claim = take(store, whole)
    again = _parts(claim)
    return lambda: store.split(claim, again)


def _stalled(store: JobStore) -> Callable[[], object]:
    claim = _crowded(store)
    return lambda: store.stalled(claim)


def _step(store: JobStore) -> Callable[[], object]:
    _, parts = _split(store)
    claim = take(store, parts[0])
    counts = {f"tally:found:key/{number}": number for number in range(TALLIES)}
    return lambda: store.step(claim, Checkpoint(), counts)


def _stuck(store: JobStore) -> Callable[[], object]:
    return lambda: processes_stuck(store, "w", 1, 600, [f"root:/{number}" for number in range(ROOTS)])


def _submit(store: JobStore) -> Callable[[], object]:
    job, blob = _largest(), ("items", b"x" * 16_384)
    return lambda: store.submit(job, "key", RESOURCES, blob)


def _submit_after_expiry(store: JobStore) -> Callable[[], object]:
    """No worker has run until all open jobs expired, but for the one that leaves room."""
    names = [f"{number:036}" for number in range(OPEN_JOBS - 1)]
    store.redis.zadd(f"kms:open:{TENANT}", dict.fromkeys(names, 1))
    store.redis.zadd("kms:open", dict.fromkeys(names, 1))
    return _submit(store)


def _submit_beside_events(store: JobStore) -> Callable[[], object]:
    """No worker has sent an event for a week."""
    store.redis.zadd("kms:webhooks:due:hook", {f"{number:036}" * 20: 1 for number in range(OPEN_JOBS)})
    return _submit(store)


def _wake(store: JobStore) -> Callable[[], object]:
    for kind, source in (("encrypt", "items"), ("rewrap", "items"), ("encrypt", "upload")):
        store.submit(accepted(kind=kind, source=source, items=int(source == "items")))
    return store.wake


def _withdraw(store: JobStore) -> Callable[[], object]:
    job_id = _submitted(store)
    _crowded(store)
    sealed = store.seen(job_id, TENANT)[1]
    keys = [f"kms:job:{job_id}", f"kms:tenant:{TENANT}"]
    return lambda: store.unconfirmed_error(None, keys, job_id, sealed)


def _worker_seen(store: JobStore) -> Callable[[], object]:
    """Half of the workers have gone, and jobs wait for a newer version."""
    for _ in range(100):
        forge(store, _small(store, TENANT, ()), needs=LATER)
    assert _next(store) is None
    for number in range(WORKERS):
        worker_lives(store, f"host-{number}", 2)
        store.redis.hset("kms:slots", f"host-{number}", "2")
        store.redis.hset("kms:stuck", f"host-{number}", "1")
    store.redis.zadd("kms:workers", {f"host-{number}": 1 for number in range(WORKERS // 2)})
    return lambda: worker_seen(store, "w", 2, QUEUES)


BOUNDS: Final = (
    Bound("add_counts", "counts of tenants", 1_005, _add_counts),
    Bound("begin_session", "sessions of the tenant", 12, _begin_session),
    Bound("cancel", "tenants that wait", 8_200, _cancel_queued),
    Bound("cancel", "parts that are deferred", 5_000, _cancel_parts),
    Bound("claim", "jobs for a newer worker", 6_600, _claim_newer),
    Bound("claim", "tenants of a full backend", 15_500, _claim_blocked),
    Bound("claim", "tenants with large jobs only", 6_200, _claim_large),
    Bound("claim", "roots that are left alone", 1_700, _claim_classes),
    Bound("claim", "expired, tenants that wait", 8_200, _claim_expired),
    Bound("committing", "-", 12, _committing),
    Bound("defer", "tenants that wait", 8_200, _defer),
    Bound("end_parent", "tenants that wait, tallies", 8_200, _end_parent),
    Bound("finish", "tenants that wait, labels", 8_200, _finish),
    Bound("finish", "tallies of a part", 1_100, _finish_part),
    Bound("forget", "200 jobs with their labels", 6_500, _forget),
    Bound("input_removed", "-", 6, _input_removed),
    Bound("lock", "-", 4, _lock),
    Bound("move_delivery", "-", 5, _move_delivery),
    Bound("probe", "-", 9, _probe),
    Bound("purged", "-", 14, _purged),
    Bound("put_aside", "tenants that wait", 4_100, _put_aside),
    Bound("reap", "tenants that wait", 8_200, _reap),
    Bound("reap", "expired, tenants that wait", 8_200, _reap_expired),
    Bound("release", "-", 12, _release),
    Bound("renew", "resources", 25, _renew),
    Bound("retry", "tallies", 2_550, _retry),
    Bound("split", "parts, tenants that wait", 9_000, _split_all),
    Bound("split", "parts of an earlier generation", 4_200, _split_again),
    Bound("stalled", "tenants that wait", 8_200, _stalled),
    Bound("step", "tallies", 8, _step),
    Bound("stuck", "roots", 45, _stuck),
    Bound("submit", "labels", 65, _submit),
    Bound("submit", "jobs of the tenant that expired", 65, _submit_after_expiry),
    Bound("submit", "events that nothing sent", 65, _submit_beside_events),
    Bound("wake", "queues", 15, _wake),
    Bound("withdraw", "tenants that wait", 8_200, _withdraw),
    Bound("worker_seen", "workers", 1_150, _worker_seen),
)
