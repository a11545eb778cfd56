"""The looking-after side of the job store: what is due, what has expired, who is alive; unseals nothing."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final, cast

import redis
import structlog

from kms_core.jobs.model import QUEUES, REDIS_STEPS, QueuePriority
from kms_core.jobs.store import broker_messages, claim_script, part_scripts, scripts
from kms_core.jobs.store.redis_keys import (
    PREFIX,
    answered,
    busy_key,
    is_of_the_record,
    job_key,
    number,
    redis_errors,
)
from kms_protocol.wire import PRIORITIES, Priority

WORKER_SEEN_S: Final = 5.0
"""So long a worker that says nothing counts as alive: five words of it, which it says once a second."""
_CLOCK_KEPT_S: Final = 10.0
_REAPED_AT_ONCE: Final = 200  # some milliseconds, in which Redis does nothing else
_TENANTS: Final = f"{PREFIX}tenants"
_WORKERS: Final = f"{PREFIX}workers"
_DEAD: Final = f"{PREFIX}dead"
_log = structlog.get_logger(__name__)
_NONE: Final[Mapping[QueuePriority, float]] = MappingProxyType({})
Script = Callable[..., list[bytes]]


class StoreMaintenance:
    """What the caretaker asks and tells; JobStore inherits it. Raises JobsUnavailable when Redis is gone."""

    def __init__(self, client: redis.Redis) -> None:
        self.redis = client
        self._clock = (0.0, -math.inf)  # what Redis's said, and when by ours
        self._run: dict[str, Script] = {
            name: client.register_script(getattr(module, name))
            for module in (scripts, claim_script, part_scripts)
            for name in module.NAMES
        }

    def ping(self) -> None:
        """Raise JobsUnavailable if Redis does not answer."""
        self._ask_clock()

    def now(self) -> float:
        """Redis's clock, in seconds since the epoch: which all jobs go by; those of machines may be off."""
        at, read = self._clock
        elapsed = time.monotonic() - read
        return at + elapsed if elapsed < _CLOCK_KEPT_S else self._ask_clock()

    def _ask_clock(self) -> float:
        with redis_errors():
            seconds, micro = self.redis.time()
        self._clock = (seconds + micro / 1e6, time.monotonic())
        return self._clock[0]

    def due(self, limit: int = 1000) -> list[str]:
        """Open jobs that should be looked at: leases run out, delays over, messages perhaps lost."""
        return self._first(f"{PREFIX}open", limit)

    def reap(self, job_id: str, next_look_s: float) -> str:
        """Requeue a job whose lease ran out.

        The answer is the state found, ``requeued``, ``due`` for a deferred job, which has no message, or
        ``lost`` for one whose message must have been.
        """
        return self.reap_all([job_id], next_look_s)[0][0]

    def reap_all(
        self, job_ids: Sequence[str], next_look_s: float, oldest: Mapping[QueuePriority, float] = _NONE
    ) -> list[tuple[str, QueuePriority]]:
        """The same for many, in few writes to Redis's disk; and where each waits.

        ``oldest`` says since when the oldest message of a lane waits, where that is known. A record that no
        script can read is answered as ``unreadable``, and looked at again as late as others.
        """
        found: list[list[bytes]] = []
        lanes = [word for lane, at in oldest.items() for word in (" ".join(lane), at)]
        with redis_errors():
            for start in range(0, len(job_ids), _REAPED_AT_ONCE):
                pipeline = self.redis.pipeline(transaction=False)
                some = job_ids[start : start + _REAPED_AT_ONCE]
                for job_id in some:
                    self._run["REAP"]([job_key(job_id)], [job_id, next_look_s, *lanes], client=pipeline)
                answers = zip(some, pipeline.execute(raise_on_error=False), strict=True)
                found += [self._reaped(job_id, answer, next_look_s) for job_id, answer in answers]
        return [(word.decode(errors="replace"), _lane(rest)) for word, *rest in found]

    def _reaped(self, job_id: str, answer: list[bytes] | Exception, next_look_s: float) -> list[bytes]:
        if not isinstance(answer, Exception):
            return answer
        if not is_of_the_record(answer):
            raise answer
        self.redis.zadd(f"{PREFIX}open", {job_id: self.now() + next_look_s}, xx=True)
        _log.warning("job.unreadable", job_id=job_id)
        return [b"unreadable"]

    def post(self, job_ids: Sequence[str], lane: QueuePriority) -> None:
        """Put messages into a list of the broker that is in this Redis."""
        now = self.now()
        messages = (broker_messages.write(job_id, lane, now) for job_id in job_ids)
        self.shared(self.redis.lpush, broker_messages.where(lane), *messages)

    def depths(self) -> dict[tuple[str, str], int]:
        """How many messages wait, by queue and priority, if the broker is in this Redis.

        A list of a wrong type has none, here and in ``oldest``: it may be that no worker serves its queue.
        """
        pipeline = self.redis.pipeline(transaction=False)
        for lane in broker_messages.LANES:
            for step in REDIS_STEPS[lane[1]]:
                pipeline.llen(broker_messages.where(lane, step))
        with redis_errors():
            found = iter(pipeline.execute(raise_on_error=False))
        return {
            lane: sum(answered(next(found)) or 0 for _ in REDIS_STEPS[lane[1]])
            for lane in broker_messages.LANES
        }

    def oldest(self) -> dict[QueuePriority, float]:
        """Since when the oldest message of each lane in this Redis waits; 0 for one that does not say."""
        with redis_errors():
            pipeline = self.redis.pipeline(transaction=False)
            for lane in broker_messages.LANES:
                pipeline.lrange(broker_messages.where(lane), -1, -1)
            found = zip(
                broker_messages.LANES, map(answered, pipeline.execute(raise_on_error=False)), strict=True
            )
            return {lane: broker_messages.written_at(last[0]) for lane, last in found if last}

    def expired(self, limit: int = 1000) -> list[str]:
        """Ended jobs whose results are to be deleted."""
        return self._first(f"{PREFIX}ended", limit)

    def _first(self, key: str, limit: int) -> list[str]:
        """Members of a sorted set whose time has come. Takes out what is no text: others put it there."""
        ids: list[bytes] = self.shared(self.redis.zrangebyscore, key, 0, self.now(), start=0, num=limit)
        junk = [raw for raw in ids if not raw.isascii()]
        if junk:
            with redis_errors():
                self.redis.zrem(key, *junk)
        return [raw.decode() for raw in ids if raw.isascii()]

    def purged(self, job_id: str) -> bool:
        """Note that the result is gone; the record itself expires later. Whether attempts may have died."""
        with redis_errors():
            try:
                fence = self._run["PURGED"]([job_key(job_id)], [job_id])[0]
            except redis.ResponseError as exc:
                if not is_of_the_record(exc):
                    raise
                self.redis.zrem(f"{PREFIX}ended", job_id)
                _log.warning("job.unreadable", job_id=job_id)
                return False
        return number(fence) > 1

    def lists(self) -> list[str]:
        """The keys of the lists of jobs, one for each tenant and one of dead letters: they never expire."""
        tenants: set[bytes] = self.shared(self.redis.smembers, _TENANTS)
        return [_DEAD, *sorted(f"{PREFIX}tenant:{raw.decode(errors='replace')}" for raw in tenants)]

    def trim(self, key: str, begin: int, count: int = 1000) -> int:
        """Drop the ids of expired records among ``count`` of a list; where to go on, 0 once at its end.

        What is no list is deleted: nobody here made it, and nothing can be added to it.
        """
        owner = key.removeprefix(f"{PREFIX}tenant:")
        with redis_errors():
            if self.drop_wrong(self.redis.zcard, key):
                return 0
            return int(self._run["TRIM"]([key, _TENANTS], [begin, count, owner])[0])

    def shared(self, ask: Callable[..., Any], key: str, *given: object, **named: object) -> Any:  # noqa: ANN401 -- each command has its own
        """What Redis answers about a key that many jobs share; ``drop_wrong`` goes first where it must."""
        with redis_errors():
            asked = partial(ask, key, *given, **named)
            try:
                return asked()
            except redis.ResponseError:
                if not self.drop_wrong(lambda _: asked(), key):
                    raise
                return asked()

    def drop_wrong(self, read: Callable[[str], object], key: str) -> bool:
        """Delete a key that ``read`` finds to be of a wrong type, which others wrote; whether it was."""
        try:
            read(key)
        except redis.ResponseError as exc:
            if not is_of_the_record(exc):
                raise
            self.redis.delete(key)
            _log.warning("redis.wrong_type_deleted", key=key)
            return True
        return False

    def lane_of(self, job_id: str) -> QueuePriority:
        """Where a job waits; what is not one of ours counts as the first queue, and normal."""
        with redis_errors():
            found = cast("list[bytes | None]", self.redis.hmget(job_key(job_id), "queue", "priority"))
        return _lane(found)

    def idle_s(self, worker: str) -> float:
        """Seconds since this worker claimed or renewed anything; infinite if it never did."""
        with redis_errors():
            at = cast("bytes | None", self.redis.get(busy_key(worker)))
        return self.now() - number(at) if at else math.inf

    def exists(self, job_id: str) -> bool:
        with redis_errors():
            return bool(self.redis.exists(job_key(job_id)))

    def lock(self, name: str, owner: str, seconds: float) -> bool:
        """A short lock for one caretaker at a time; its holder renews it by calling again."""
        with redis_errors():
            key, milliseconds = f"{PREFIX}lock:{name}", int(seconds * 1000)
            if self._is_first(key, owner, milliseconds):
                return True
            if self.redis.get(key) == owner.encode():
                self.redis.pexpire(key, milliseconds)
                return True
        return False

    def once(self, name: str, owner: str, seconds: float) -> bool:
        """Whether nobody has done this within so many seconds."""
        with redis_errors():
            return self._is_first(f"{PREFIX}once:{name}", owner, int(seconds * 1000))

    def _is_first(self, key: str, owner: str, milliseconds: int) -> bool:
        """Whether the key was free: then it is the owner's for so long."""
        if self.redis.set(key, owner, nx=True, px=milliseconds):
            return True
        left = self.redis.pttl(key)
        if left == -1 or left > milliseconds:  # nobody here holds it so long
            self.redis.pexpire(key, milliseconds)
        return False

    def worker_seen(self, worker: str) -> None:
        """It lives, and so it will for some seconds."""
        now = self.now()
        self.shared(self.redis.zadd, _WORKERS, {worker: now})
        with redis_errors():
            self.redis.zremrangebyscore(_WORKERS, 0, now - 10 * WORKER_SEEN_S)

    def worker_left(self, worker: str) -> None:
        """It takes no more jobs."""
        with redis_errors():
            self.redis.zrem(_WORKERS, worker)

    def workers(self) -> int:
        """How many live; one that was killed counts for ``WORKER_SEEN_S``."""
        return int(self.shared(self.redis.zcount, _WORKERS, self.now() - WORKER_SEEN_S, "+inf"))


def _lane(found: Sequence[bytes | None]) -> QueuePriority:
    """Queue and priority as a record has them; what is not one of ours counts as the first, and normal."""
    queue, priority = ([(raw or b"").decode(errors="replace") for raw in found] + ["", ""])[:2]
    known: Priority = next((name for name in PRIORITIES if name == priority), "normal")
    return (queue if queue in QUEUES else QUEUES[0]), known
