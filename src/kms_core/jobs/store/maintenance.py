"""Store operations of the reaper and of workers' threads: due jobs, expired ones, wake-ups, heartbeats.

Nothing here opens a sealed record. ``ReplicaWait`` waits until replicas have what was written.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, cast
from urllib.parse import quote

import redis
import structlog

from kms_core.jobs.model import Attempt, Job, NotifyWorker, QueuePriority, RecordKey
from kms_core.jobs.spec import QUEUES
from kms_core.jobs.store.errors import is_unreadable, redis_errors
from kms_core.jobs.store.keys import PREFIX, busy_key, job_key
from kms_core.jobs.store.records import named
from kms_core.jobs.store.scripts import SCRIPTS, raise_for
from kms_core.jobs.store.wake_ups import encode_message, list_key
from kms_core.observability import metrics
from kms_core.redis_client import connect, connect_to
from kms_core.settings.model import KmsSection, RedisSection
from kms_core.settings.redis_urls import CLUSTERS
from kms_protocol.errors import (
    ConfigurationError,
    DurabilityUnconfirmed,
    JobsUnavailable,
    RedisFull,
    RedisReadOnly,
)
from kms_protocol.units import GiB, MiB
from kms_protocol.wire import PRIORITIES

# Waits until a write is on the disks of Redis and of its replicas (WAITAOF, Redis 7.2, Valkey).
#
# Redis acknowledges writes that a fail-over may lose. Where ``[kms.redis] wait_replicas`` is set, the
# scripts that accept a job, record a commit and end a job are followed by WAITAOF on their connection: it
# answers with the number of servers whose append-only file has all that the connection wrote before. In
# MULTI and in Lua it does not wait, so all are commands of a plain pipeline.
#
# A replica that is asked before its file is synced answers once more a second later (Redis 7.2 to Valkey
# 9.1). So WAIT comes first: when it ends, the replica has the write, and WAITAOF asks it for the file.

_WAITED: Final = f"{PREFIX}waited"
_TRIAL_MS: Final = 3000
_NO_COMMAND: Final = (
    "[kms.redis] wait_replicas needs a server with the command WAITAOF (Redis 7.2 or Valkey), appendonly "
    "yes, and a user who may call it: this one answers {!r}. Change the server or write wait_replicas = 0"
)
_NO_FILE: Final = (
    "[kms.redis] wait_replicas: the replica {} keeps no append-only file: set appendonly yes there, or "
    "write wait_replicas = 0"
)
_LIES: Final = (
    "[kms.redis] wait_replicas: Redis says that {} replicas have a write, and that {} follow it: name the "
    "server itself in [kms.redis] url and no proxy that answers for it, or write wait_replicas = 0"
)
_NO_CLUSTER: Final = (
    "[kms.redis] wait_replicas: a Redis Cluster cannot be waited for: use Sentinel, or write 0"
)
Call = tuple[Any, Sequence[Any], Sequence[Any]]
"""A script of redis-py, its keys and its arguments."""
_log = structlog.get_logger(__name__)


class ReplicaWait:
    """Runs scripts, and tells whether what they wrote was acknowledged. Does not wait for 0 replicas."""

    def __init__(self, client: redis.Redis, section: RedisSection) -> None:
        self._redis = client
        self._section = section

    def run(
        self,
        script: Any,  # noqa: ANN401 -- redis-py has no public type
        keys: Sequence[Any],
        args: Sequence[Any],
        *,
        waits: bool = True,
    ) -> tuple[list[bytes], bool]:
        """The answer of a script, and whether its writes were acknowledged. Raises redis.RedisError.

        Of a script that wrote nothing the second part means nothing: then ask ``confirm``.
        """
        if not waits or not self._section.wait_replicas:
            return script(keys, args), True
        (answer,), confirmed = self.run_together((script, keys, args))
        if isinstance(answer, Exception):
            raise answer
        return answer, confirmed

    def run_together(self, *calls: Call) -> tuple[list[list[bytes] | Exception], bool]:
        """The answers of scripts that are sent together, and whether their writes were acknowledged.

        Redis syncs its file once for all. An error is returned in place of an answer: the others were run.
        """
        *answers, waited = self._followed(*map(_command, calls))
        for at, call in enumerate(calls):
            if isinstance(answers[at], redis.exceptions.NoScriptError):
                call[0].sha = self._redis.script_load(call[0].script)
                answers[at], waited = self._followed(_command(call))
        return answers, self._is_acknowledged(waited)

    def confirm(self) -> bool:
        """Return whether all that Redis held a moment ago was acknowledged. Raises redis.RedisError.

        WAITAOF asks for the writes of its own connection, so something is written first: what came before
        that is acknowledged with it.
        """
        if not self._section.wait_replicas:
            return True
        answer, waited = self._followed(("SET", _WAITED, 1))
        if isinstance(answer, Exception):
            raise answer
        return self._is_acknowledged(waited)

    def _followed(self, *commands: tuple[Any, ...]) -> list[Any]:
        """The answers of the commands, and of WAITAOF; 0 instead of that where nothing is waited for."""
        replicas, wait_ms = self._section.wait_replicas, self._section.wait_ms
        if not replicas:
            return [*_pipelined(self._redis, *commands), 0]
        first_ms = max(1, wait_ms // 4)  # if it is over, the second wait goes on
        wait = ("WAIT", replicas, first_ms), ("WAITAOF", 1, replicas, max(1, wait_ms - first_ms))
        *answers, _, waited = _pipelined(self._redis, *commands, *wait)
        return [*answers, waited]

    def _is_acknowledged(self, waited: object) -> bool:
        if not self._section.wait_replicas:
            return True
        local, replicas = _numbers(waited)
        if local and replicas >= self._section.wait_replicas:
            return True
        _log.warning("redis.unconfirmed", replicas=replicas, wanted=self._section.wait_replicas)
        metrics.REDIS_UNCONFIRMED.inc()
        return False


def verify_replicas(section: RedisSection) -> None:
    """Raise ConfigurationError if this Redis can never acknowledge a write as ``section`` wants it.

    A Redis or a replica that is away is no reason: it may come back. Raises redis.RedisError.
    """
    if not section.wait_replicas:
        return
    if section.url.partition("://")[0] in CLUSTERS:
        raise ConfigurationError(_NO_CLUSTER)
    with connect(section) as client:
        check_answers(client, section.wait_replicas)
        for host, port in _following(client):
            with suppress(redis.RedisError), connect_to(section, host, port) as replica:
                if not replica.info("persistence").get("aof_enabled", 1):
                    raise ConfigurationError(_NO_FILE.format(f"{host}:{port}"))


def check_answers(client: redis.Redis, wanted: int) -> None:
    """Raise ConfigurationError for a server without WAITAOF or its file, or that counts too many replicas."""
    before = len(_following(client))
    written, own, waited = _pipelined(
        client, ("SET", _WAITED, 1), ("WAITAOF", 1, 0, _TRIAL_MS), ("WAITAOF", 1, wanted, 1)
    )
    if isinstance(written, Exception):
        raise written
    if not _numbers(own)[0]:
        raise ConfigurationError(_NO_COMMAND.format(str(own)))
    following = max(before, len(_following(client)))
    if _numbers(waited)[1] > following:
        raise ConfigurationError(_LIES.format(_numbers(waited)[1], following))


def _following(client: redis.Redis) -> list[tuple[str, int]]:
    """Host and port of each replica, as the server knows them."""
    found = client.info("replication")
    rows = [found.get(f"slave{number}", {}) for number in range(int(found.get("connected_slaves", 0)))]
    return [(str(row.get("ip", "")), int(row.get("port", 0))) for row in rows]


def _pipelined(client: redis.Redis, *commands: tuple[Any, ...]) -> list[Any]:
    """Answers or errors of commands that are sent together on one connection."""
    pipe: Any = client.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)
    return list(pipe.execute(raise_on_error=False))


def _command(call: Call) -> tuple[Any, ...]:
    script, keys, args = call
    return ("EVALSHA", script.sha, len(keys), *keys, *args)


def _numbers(waited: object) -> tuple[int, int]:
    """Local files and replicas of an answer of WAITAOF; zeros for any other answer."""
    if isinstance(waited, list) and len(waited) == 2 and all(type(each) is int for each in waited):  # noqa: PLR2004
        return waited[0], waited[1]
    return 0, 0


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
