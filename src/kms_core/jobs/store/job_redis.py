"""The Redis of the jobs: its scripts, its clock and condition, locks, and wake-ups for workers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import redis

from kms_core.jobs.model import NotifyWorker, RecordKey
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.condition import StoreCondition
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.keys import PREFIX, job_key
from kms_core.jobs.store.replicas import ReplicaWait
from kms_core.jobs.store.scripts import SCRIPTS, raise_for
from kms_core.jobs.store.wake_ups import encode_message, list_key
from kms_core.observability import metrics
from kms_core.settings.model import KmsSection
from kms_protocol.errors import DurabilityUnconfirmed, JobsUnavailable, RedisFull, RedisReadOnly
from kms_protocol.units import GiB, MiB

ANY_KEY: Final = f"{PREFIX}open"
"""The key of scripts that are about no job: all keys are in one slot."""
FULL: Final = 0.95
"""The used part of Redis's memory from which on no job is accepted: accepted ones can run and end."""
UNBOUNDED: Final = 2 * GiB
"""Bytes of memory to go by where Redis has no maxmemory: small blobs rest in it up to half of that."""
_CONDITIONS: Final[Mapping[type, StoreCondition]] = {RedisFull: "full", RedisReadOnly: "read_only"}
_CLOCK_KEPT_S: Final = 10.0
Script = Callable[..., list[bytes]]


class JobRedis:
    """Runs the scripts of jobs, and sends wake-ups. JobStore inherits it.

    All methods raise JobsUnavailable without Redis.
    """

    large_job_bytes = 64 * MiB
    """A job that reads as much is large; large jobs leave room for others, see ``[kms.jobs]``."""

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
        """Return whether less than half of the memory was used at the last ``ping``, submission or claim."""
        self._clock = (0.0, -math.inf)  # the time of Redis, and when that was read by ours
        self._waits = ReplicaWait(client, section.redis)
        self.scripts: dict[str, Script] = {
            name: client.register_script(text) for name, text in SCRIPTS.items()
        }

    def call(self, name: str, job_id: str, *given: Any) -> list[bytes]:  # noqa: ANN401 -- as redis-py
        """The answer of a script about a job, or about none, whose id is empty."""
        with redis_errors():
            return self.scripts[name]([job_key(job_id) if job_id else ANY_KEY], [job_id, *given])

    def call_each(self, name: str, job_ids: Sequence[str]) -> None:
        """Run a script for each of these jobs, sent together."""
        with redis_errors():
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in job_ids:
                self.scripts[name]([job_key(job_id)], [job_id], client=pipeline)
            pipeline.execute()

    def run_confirmed(self, name: str, job_id: str, given: Sequence[Any], *, waits: bool = True) -> None:
        """Run a script of one job. Raises LeaseLost, JobCancelled, DurabilityUnconfirmed."""
        with redis_errors():
            (word, *_), confirmed = self._waits.run(
                self.scripts[name], [job_key(job_id)], [job_id, *given], waits=waits
            )
        raise_for(word)
        if not confirmed:
            raise DurabilityUnconfirmed(job_id=job_id)

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
        found = self.call("probe", "", FULL, UNBOUNDED, int(write))
        if found == [b"memory"]:
            raise RedisFull
        self.read_probe(*found)

    def read_probe(self, seconds: bytes, micro: bytes, has_room: bytes) -> None:
        """Take over the clock of Redis and its room for small blobs, as ``probe.lua`` answers them."""
        self._clock = (int(seconds) + int(micro) / 1e6, time.monotonic())
        self.has_room = bool(has_room)

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

    def wake(self, queues: Sequence[str] = QUEUES) -> None:
        """Send a wake-up for each of the queues that has ready jobs, and for chores."""
        if self._has_any("chores", *map("active:{}".format, queues)):
            given = [part for queue in queues for part in (queue, *self.wake_up(queue))]
            for queue, count in zip(queues, self.call("wake", "", *given), strict=True):
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

    def has_ready(self, *queues: str) -> bool:
        """True if one of the queues has jobs that may run: ready ones, of a tenant that is not at its cap."""
        return self._has_any(*map("active:{}".format, queues))

    def _has_any(self, *keys: str) -> bool:
        with redis_errors():
            return bool(self.redis.exists(*(f"{PREFIX}{key}" for key in keys)))

    def lock(self, name: str, owner: str, seconds: float) -> bool:
        """Take the lock that lets one reaper work at a time; its holder renews it by calling again."""
        with redis_errors():
            return bool(self.scripts["lock"]([f"{PREFIX}lock:{name}"], [owner, int(seconds * 1000)])[0])

    def once(self, name: str, owner: str, seconds: float) -> bool:
        """Return whether this was last done more than so many seconds ago, by any process."""
        with redis_errors():
            return bool(self.redis.set(f"{PREFIX}once:{name}", owner, nx=True, px=int(seconds * 1000)))
