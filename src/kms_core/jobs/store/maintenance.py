"""Store operations of the reaper and of workers' threads: due jobs, expired ones, wake-ups, heartbeats.

Nothing here opens a sealed record.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, cast
from urllib.parse import quote

import redis
import structlog

from kms_core.jobs.model import Attempt, Job, NotifyWorker, QueuePriority, RecordKey
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.errors import is_unreadable, redis_errors
from kms_core.jobs.store.keys import PREFIX, busy_key, job_key
from kms_core.jobs.store.records import named
from kms_core.jobs.store.replicas import ReplicaWait
from kms_core.jobs.store.scripts import SCRIPTS, raise_for
from kms_core.jobs.store.wake_ups import encode_message, list_key
from kms_core.observability import metrics
from kms_core.settings.model import KmsSection
from kms_protocol.errors import DurabilityUnconfirmed, JobsUnavailable, RedisFull, RedisReadOnly
from kms_protocol.units import GiB, MiB
from kms_protocol.wire import PRIORITIES

WORKER_SEEN_S: Final = 5.0
"""A silent worker counts as alive for so many seconds: five heartbeats."""
DUE: Final = ("leased", "delayed", "expiring")
"""Sets of open jobs by when to look at them: leases, delays, expiries."""
ANY_KEY: Final = f"{PREFIX}open"
"""The key of scripts that are about no job: all keys are in one slot."""
FULL: Final = 0.95
"""The used part of Redis's memory from which on no job is accepted: accepted ones can run and end."""
UNBOUNDED: Final = 2 * GiB
"""Bytes of memory to go by where Redis has no maxmemory: small blobs rest in it up to half of that."""
StoreCondition = Literal["available", "unavailable", "full", "read_only"]
_CONDITIONS: Final[Mapping[type, StoreCondition]] = {RedisFull: "full", RedisReadOnly: "read_only"}
_CLOCK_KEPT_S: Final = 10.0
_ENDED_KEPT_S: Final = 600  # for how a process ended, after the end of its lease
_AT_ONCE: Final = 200  # some milliseconds, in which Redis does nothing else
_TENANTS: Final = f"{PREFIX}tenants"
_WORKERS: Final = f"{PREFIX}workers"
Script = Callable[..., list[bytes]]
_log = structlog.get_logger(__name__)


class StoreMaintenance:
    """JobStore inherits it. All raise JobsUnavailable without Redis."""

    large_job_bytes = 64 * MiB
    """A job that reads as much is large; large jobs leave room for others, see ``[kms.jobs]``."""
    retry_within_s = 86_400.0

    def __init__(
        self,
        client: redis.Redis,
        record_key: RecordKey,
        notify: NotifyWorker | None,
        section: KmsSection,
        has_several_tenants: Callable[[], bool] = lambda: False,
    ) -> None:
        """If ``notify`` is None, the broker's lists are in this Redis, and scripts push wake-ups there.

        ``has_several_tenants``: jobs may come from more than one.
        """
        self.redis = client
        self.record_key = record_key
        self.section = section
        self.rules = section.jobs
        self.resource_leases = {
            quote(name, safe="/:"): most for name, most in section.jobs.resource_leases.items()
        }
        self.has_several_tenants = has_several_tenants
        self._notify = notify
        self.has_room = True
        """Return whether less than half of the memory was used at the last ``ping`` or claim."""
        self._clock = (0.0, -math.inf)  # the time of Redis, and when that was read by ours
        self._waits = ReplicaWait(client, section.redis)
        self._run: dict[str, Script] = {name: client.register_script(text) for name, text in SCRIPTS.items()}

    def script(self, name: str) -> Script:
        """A script of ``lua``, to be called with keys and arguments."""
        return self._run[name]

    def _call(self, name: str, job_id: str, *given: Any) -> list[bytes]:  # noqa: ANN401 -- as redis-py
        """The answer of a script about a job, or about none, whose id is empty."""
        with redis_errors():
            return self._run[name]([job_key(job_id) if job_id else ANY_KEY], [job_id, *given])

    def run_confirmed(self, name: str, job_id: str, given: Sequence[Any], *, waits: bool = True) -> None:
        """Run a script of one job. Raises LeaseLost, JobCancelled, DurabilityUnconfirmed."""
        with redis_errors():
            (word, *_), confirmed = self._waits.run(
                self._run[name], [job_key(job_id)], [job_id, *given], waits=waits
            )
        raise_for(word)
        if not confirmed:
            raise DurabilityUnconfirmed(job_id=job_id)

    def unconfirmed_error(
        self, found: Job | None, keys: Sequence[str], job_id: str, sealed: bytes
    ) -> DurabilityUnconfirmed:
        """The error for a submission that replicas did not acknowledge.

        A new job is taken back, if no worker has started it. ``found`` is one that was there before.
        """
        if found:
            return DurabilityUnconfirmed(job_id=found.job_id)
        with redis_errors():
            word = self._run["withdraw"](keys, [job_id, sealed])[0]
        return DurabilityUnconfirmed(job_id=job_id, withdrawn=word == b"withdrawn")

    def confirm(self, job_id: str = "") -> None:
        """Return once Redis and its replicas have on disk what Redis held a moment ago.

        Raises DurabilityUnconfirmed, with the job that is asked about.
        """
        with redis_errors():
            confirmed = self._waits.confirm()
        if not confirmed:
            raise DurabilityUnconfirmed(job_id=job_id)

    def ping(self, *, write: bool = False) -> None:
        """Raise JobsUnavailable if Redis does not answer, RedisReadOnly if it takes no writes, RedisFull.

        It counts as full from ``FULL`` on. Without any memory left it refuses the script.
        """
        seconds, *found = self._call("probe", "", int(write), FULL, UNBOUNDED)
        if not found:
            raise RedisFull
        self._clock = (int(seconds) + int(found[0]) / 1e6, time.monotonic())
        self.has_room = bool(found[1])

    def condition(self) -> StoreCondition:
        """Return whether jobs can be submitted, as a write shows. Blocks until Redis has answered, or 5 s."""
        try:
            self.ping(write=True)
        except JobsUnavailable as exc:
            return _CONDITIONS.get(type(exc), "unavailable")
        return "available"

    def now(self) -> float:
        """Redis's clock, in seconds since the epoch: which all jobs go by; those of machines may be off."""
        at, read = self._clock
        elapsed = time.monotonic() - read
        return at + elapsed if elapsed < _CLOCK_KEPT_S else self.ask_clock()

    def ask_clock(self) -> float:
        """Ask Redis for its clock, in seconds since the epoch."""
        with redis_errors():
            seconds, micro = self.redis.time()
        self._clock = (seconds + micro / 1e6, time.monotonic())
        return self._clock[0]

    # -- wake-ups -------------------------------------------------------------------------------------

    def wake(self, queues: Sequence[str] = QUEUES) -> None:
        """Send a wake-up for each of the queues that has ready jobs, and for chores."""
        if self._has_any("chores", *map("active:{}".format, queues)):
            given = [part for queue in queues for part in (queue, *self.wake_up(queue))]
            for queue, count in zip(queues, self._call("wake", "", *given), strict=True):
                self.notify(queue, int(count))

    def wake_up(self, queue: str) -> tuple[str, bytes]:
        """The list for a wake-up, and the wake-up; both empty if the broker is elsewhere."""
        if self._notify is not None:
            return "", b""
        return list_key(queue), encode_message(queue)

    def notify(self, queue: str, count: int) -> None:
        """Send wake-ups where the broker is elsewhere. A lost one costs seconds: the reaper sends another."""
        try:
            for _ in range(count):
                if self._notify is not None:
                    self._notify(queue)
        except JobsUnavailable:
            metrics.JOB_RESUMES.labels("notify_failed").inc()

    # -- the reaper -----------------------------------------------------------------------------------

    def due(self, limit: int = 1000) -> list[str]:
        """Open jobs to look at: leases that ran out, delays that are over, queued jobs that expired."""
        return list(dict.fromkeys(name for key in DUE for name in self._first(f"{PREFIX}{key}", limit)))

    def reap_all(self, job_ids: Sequence[str]) -> list[str]:
        """Look after open jobs (``reap.lua``). Returns what was done with each, or its state.

        A record that no script can read is ``unreadable``, and leaves the sets.
        """
        found: list[bytes] = []
        with redis_errors():
            for start in range(0, len(job_ids), _AT_ONCE):
                pipeline = self.redis.pipeline(transaction=False)
                some = job_ids[start : start + _AT_ONCE]
                for job_id in some:
                    given = [job_id, self.large_job_bytes, self.rules.result_ttl_s]
                    self._run["reap"]([job_key(job_id)], given, client=pipeline)
                answers = zip(some, pipeline.execute(raise_on_error=False), strict=True)
                found += [self._reaped(job_id, answer) for job_id, answer in answers]
        return [word.decode(errors="replace") for word in found]

    def _reaped(self, job_id: str, answer: list[bytes] | Exception) -> bytes:
        if not isinstance(answer, Exception):
            return answer[0]
        if not is_unreadable(answer):
            raise answer
        for key in DUE:
            self.redis.zrem(f"{PREFIX}{key}", job_id)
        _log.warning("job.unreadable", job_id=job_id)
        return b"unreadable"

    def has_ready(self, *queues: str) -> bool:
        """True if one of the queues has jobs that may run: ready ones, of a tenant that is not at its cap."""
        return self._has_any(*map("active:{}".format, queues))

    def _has_any(self, *keys: str) -> bool:
        with redis_errors():
            return bool(self.redis.exists(*(f"{PREFIX}{key}" for key in keys)))

    def waiting(self) -> Mapping[QueuePriority, tuple[int, float]]:
        """The number of ready jobs, and since when the oldest waits."""
        lanes: list[QueuePriority] = [(queue, priority) for queue in QUEUES for priority in PRIORITIES]
        with redis_errors():
            pipeline = self.redis.pipeline(transaction=False)
            for queue, priority in lanes:
                pipeline.zcard(f"{PREFIX}waiting:{queue}:{priority}")
                pipeline.zrange(f"{PREFIX}waiting:{queue}:{priority}", 0, 0, withscores=True)
            found = pipeline.execute()
        counts, firsts = found[::2], found[1::2]
        return {
            lane: (int(count), first[0][1] if first else math.inf)
            for lane, count, first in zip(lanes, counts, firsts, strict=True)
        }

    def for_newer_workers(self) -> int:
        """The number of open jobs that wait for a worker of a newer version."""
        with redis_errors():
            return int(self.redis.zcard(f"{PREFIX}newer"))

    def expired(self, limit: int = 2000) -> list[str]:
        """Ended jobs whose results are to be deleted."""
        return self._first(f"{PREFIX}ended", limit)

    def _first(self, key: str, limit: int, ago_s: float = 0.0) -> list[str]:
        """Members of a sorted set whose time came ``ago_s`` ago."""
        with redis_errors():
            ids = self.redis.zrangebyscore(key, 0, self.now() - ago_s, start=0, num=limit)
        return [named(raw) for raw in cast("list[bytes]", ids)]

    def with_input(self, limit: int = 5000) -> list[str]:
        """Jobs that ended ``input_grace_s`` ago, and whose input is to be removed from the spool."""
        return self._first(f"{PREFIX}inputs", limit, self.rules.input_grace_s)

    def inputs_removed(self, job_ids: Sequence[str]) -> None:
        """Note that the inputs of these ended jobs are in the spool no more."""
        self._each("input_removed", job_ids)

    def small(self, job_ids: Sequence[str]) -> set[str]:
        """Return those of these jobs whose blobs are all in Redis."""
        with redis_errors():
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hexists(job_key(job_id), "small")
            return {job_id for job_id, is_so in zip(job_ids, pipeline.execute(), strict=True) if is_so}

    def purged(self, *job_ids: str) -> None:
        """Note that the results are gone, and remove small blobs; the records themselves expire later."""
        self._each("purged", job_ids)

    def _each(self, name: str, job_ids: Sequence[str]) -> None:
        """Run a script for each of these jobs, sent together."""
        with redis_errors():
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in job_ids:
                self._run[name]([job_key(job_id)], [job_id], client=pipeline)
            pipeline.execute()

    def tenants(self) -> list[str]:
        """The tenants that have jobs; names that none has are left out."""
        with redis_errors():
            return sorted(named(raw) for raw in cast("set[bytes]", self.redis.smembers(_TENANTS)))

    def forget(self, limit: int = 2000) -> None:
        """Take the ids of expired records out of the lists of jobs, which never expire.

        In steps of some hundred: a job is in up to 20 lists, and Redis does nothing else in a step.
        """
        for _ in range(0, limit, _AT_ONCE):
            if not self._first(f"{PREFIX}records", 1):
                return
            self._call("forget", "", _AT_ONCE)

    def idle_s(self, worker: str) -> float:
        """Seconds since this worker claimed or renewed anything; infinite if it never did."""
        with redis_errors():
            at = cast("bytes | None", self.redis.get(busy_key(worker)))
        return self.now() - float(at) if at else math.inf

    def exists(self, job_id: str) -> bool:
        with redis_errors():
            return bool(self.redis.exists(job_key(job_id)))

    def lock(self, name: str, owner: str, seconds: float) -> bool:
        """Take the lock that lets one reaper work at a time; its holder renews it by calling again."""
        with redis_errors():
            return bool(self._run["lock"]([f"{PREFIX}lock:{name}"], [owner, int(seconds * 1000)])[0])

    def once(self, name: str, owner: str, seconds: float) -> bool:
        """Return whether this was last done more than so many seconds ago, by any process."""
        with redis_errors():
            return bool(self.redis.set(f"{PREFIX}once:{name}", owner, nx=True, px=int(seconds * 1000)))

    def worker_seen(
        self, worker: str, processes: int, queues: Sequence[str], about: str = "", *, in_full: bool = True
    ) -> None:
        """Note that a worker lives, its processes, their queues, and its version and when it started.

        Workers that are gone are forgotten. If not ``in_full``, note only that it lives.
        """
        with redis_errors():
            given = [worker, processes, WORKER_SEEN_S, int(in_full), about, *queues]
            self._run["worker_seen"]([_WORKERS], given)

    def worker_left(self, worker: str) -> None:
        """Note that a worker takes no more jobs."""
        self.worker_seen(worker, 0, ())

    def stalled(self, claim: Attempt) -> list[str]:
        """Take the lease from an attempt that advances nothing; its worker no longer touches its roots.

        Returns the resources that it uses.
        """
        rules, owner = self.rules, (claim.attempt_id, claim.worker)
        given = (rules.stall_s, self.large_job_bytes, rules.result_ttl_s)
        found = self._call("stalled", claim.accepted.job_id, *owner, *given)
        return found[1].decode(errors="replace").split()

    def resources(self, job_id: str) -> list[str]:
        """Return the roots, buckets and backends that a job uses and that are watched or bounded."""
        with redis_errors():
            found = cast("bytes | None", self.redis.hget(job_key(job_id), "resources"))
        return (found or b"").decode(errors="replace").split()

    def stuck(self, worker: str, processes: int, seconds: float, resources: Sequence[str]) -> None:
        """Note the processes of a worker that hang, and keep it off these resources."""
        self._call("stuck", "", worker, processes, seconds, *resources)

    def process_ended(self, process: str, exit_code: int) -> None:
        """Note how a process (``host:id/pid``) ended: its exit status, or minus the number of a signal.

        Its attempt ends so once its lease runs out.
        """
        cause = f"status_{exit_code}" if exit_code > 0 else f"signal_{-exit_code}"
        with redis_errors():
            self.redis.set(f"{PREFIX}died:{process}", cause, ex=math.ceil(self.rules.lease_s) + _ENDED_KEPT_S)

    def workers(self) -> int:
        """The number of live workers; a killed one counts for ``WORKER_SEEN_S``."""
        with redis_errors():
            return int(self.redis.zcount(_WORKERS, self.now() - WORKER_SEEN_S, "+inf"))
