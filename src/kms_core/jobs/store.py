"""The job store: records in Redis, moved by compare-and-set scripts; knows no queue, disk or key backend."""

import time
from collections.abc import Callable, Sequence
from typing import Final, cast

import redis

from kms_core import metrics
from kms_core.errors import (
    IdempotencyConflict,
    JobCommitting,
    JobNotDead,
    JobsUnavailable,
    RateLimited,
    UnknownJob,
)
from kms_core.jobs import scripts
from kms_core.jobs.link import PREFIX, busy_key, job_key, raise_for, reading, redis_errors
from kms_core.jobs.model import QUEUES, Accepted, Claim, Commit, Fields, Job, Nudge, Rules
from kms_core.jobs.records import RecordKey

_WORKER_SEEN_S: Final = 15.0
_SHED_S: Final = 10.0
_DEAD_SCAN: Final = 10_000


class JobStore:
    """Submit, claim, renew, commit, finish: one script each, all safe to repeat."""

    def __init__(self, client: redis.Redis, record_key: RecordKey, nudge: Nudge, rules: Rules) -> None:
        self.redis = client
        self.rules = rules
        self.record_key = record_key
        self._nudge = nudge
        self._run: dict[str, Callable[..., list[bytes]]] = {
            name: client.register_script(getattr(scripts, name))
            for name in (
                "SUBMIT",
                "CLAIM",
                "RENEW",
                "COMMITTING",
                "FINISH",
                "DEFER",
                "CANCEL",
                "RETRY",
                "REAP",
                "SPLIT",
            )
        }

    def ping(self) -> None:
        """Raise JobsUnavailable if Redis does not answer."""
        with redis_errors():
            self.redis.ping()

    # -- the submitter's side -------------------------------------------------------------------------

    def submit(self, accepted: Accepted, *, idempotency: str = "") -> Job:
        """Store the job, then nudge a worker. With a key that was used before: that job, or a conflict.

        Raises IdempotencyConflict, RateLimited when too many jobs wait, JobsUnavailable. Once this returns,
        the job survives any process.
        """
        fields: Fields = {
            "sealed": self.record_key.seal(accepted),
            "tenant": accepted.tenant,
            "kind": accepted.kind,
            "queue": accepted.queue,
            "items": accepted.items,
            "bytes": accepted.size_bytes,
            "created_at": accepted.created_at,
            "expires_at": accepted.expires_at,
        }
        keys = [job_key(accepted.job_id), f"{PREFIX}tenant:{accepted.tenant}"]
        if idempotency:
            keys.append(f"{PREFIX}idem:{self.record_key.digest(idempotency.encode()).hex()}")
        value = f"{accepted.job_id} {accepted.digest.hex()}"
        flat = [part for pair in fields.items() for part in pair]
        with redis_errors():
            word, *rest = self._run["SUBMIT"](
                keys,
                [
                    accepted.job_id,
                    self.rules.open_jobs,
                    value,
                    accepted.expires_at,
                    accepted.created_at,
                    *flat,
                ],
            )
        if word == b"exists":
            before, _, digest = rest[0].decode().partition(" ")
            if digest != accepted.digest.hex():
                raise IdempotencyConflict
            return self.get(before, accepted.tenant)
        if word == b"taken":  # said twice: by a client that did not hear the answer, or by a submitter
            return self.get(accepted.job_id, accepted.tenant)
        if word == b"full":
            raise RateLimited("Too many jobs wait already; submit again later", retry_after_s=_SHED_S)
        metrics.JOBS.labels(accepted.kind, "queued").inc()
        self.nudge(accepted.job_id, accepted.queue)
        return self.get(accepted.job_id, accepted.tenant)

    def nudge(self, job_id: str, queue: str) -> None:
        """Tell a worker. Losing this costs seconds: the caretaker nudges again."""
        try:
            self._nudge(job_id, queue)
        except JobsUnavailable:
            metrics.JOB_RESUMES.labels("nudge_failed").inc()

    def get(self, job_id: str, tenant: str) -> Job:
        """One job of this tenant; UnknownJob for another's too."""
        with redis_errors():
            raw = cast("dict[bytes, bytes]", self.redis.hgetall(job_key(job_id)))
        if not raw or raw.get(b"tenant") != tenant.encode() or b"parent" in raw:
            raise UnknownJob
        return reading(job_id, raw)

    def part(self, job_id: str) -> Job:
        """A part of a job, for the service's own eyes: nobody may look at, cancel or retry it by itself."""
        with redis_errors():
            raw = cast("dict[bytes, bytes]", self.redis.hgetall(job_key(job_id)))
        if not raw:
            raise UnknownJob
        return reading(job_id, raw)

    def accepted(self, job_id: str) -> Accepted:
        """The sealed part of a job, opened. UnknownJob if it is not there or was not sealed by us."""
        with redis_errors():
            sealed = cast("bytes | None", self.redis.hget(job_key(job_id), "sealed"))
        if sealed is None:
            raise UnknownJob
        return self.record_key.open(job_id, sealed)

    def page(
        self, tenant: str, *, state: str | None, limit: int, before: str | None
    ) -> tuple[list[Job], str | None]:
        """Newest first. The cursor is the rank behind the last one seen."""
        start = int(before) if before else 0
        found: list[Job] = []
        with redis_errors():
            while len(found) < limit:
                ids = cast(
                    "list[bytes]", self.redis.zrevrange(f"{PREFIX}tenant:{tenant}", start, start + limit - 1)
                )
                for raw_id in ids:
                    start += 1
                    job = self._listed(raw_id.decode(), tenant)
                    if job and state in {None, job.state}:
                        found.append(job)
                    if len(found) == limit:
                        break
                if len(ids) < limit and len(found) < limit:
                    return found, None
        return found, str(start)

    def _listed(self, job_id: str, tenant: str) -> Job | None:
        try:
            return self.get(job_id, tenant)
        except UnknownJob:  # its record has expired
            self.redis.zrem(f"{PREFIX}tenant:{tenant}", job_id)
            return None

    def cancel(self, job_id: str, tenant: str) -> Job:
        """Ends a queued job now, a running one at its next item or slab. Raises JobCommitting, UnknownJob."""
        self.get(job_id, tenant)
        with redis_errors():
            word = self._run["CANCEL"]([job_key(job_id)], [job_id, self.rules.keep_record_s])[0]
        if word == b"committing":
            raise JobCommitting
        job = self.get(job_id, tenant)
        if word == b"cancelled":
            metrics.JOBS.labels(job.kind, "cancelled").inc()
        return job

    def retry(self, job_id: str, tenant: str, ttl_s: float) -> Job:
        """Give a dead letter all its attempts again. Raises JobNotDead for any other job, UnknownJob."""
        self.get(job_id, tenant)
        with redis_errors():
            word = self._run["RETRY"]([job_key(job_id)], [job_id, time.time() + ttl_s])[0]
        if word != b"queued":
            raise JobNotDead
        job = self.get(job_id, tenant)
        self.nudge(job_id, job.queue)
        return job

    def dead(self, tenant: str, limit: int) -> list[Job]:
        """Dead letters of this tenant, newest first."""
        with redis_errors():
            ids = cast("list[bytes]", self.redis.zrevrange(f"{PREFIX}dead", 0, _DEAD_SCAN - 1))
            found = (self._listed(raw.decode(), tenant) for raw in ids)
            return [job for job in found if job is not None][:limit]

    # -- the worker's side ----------------------------------------------------------------------------

    def claim(self, job_id: str, worker: str) -> Claim | None:
        """Take the job, raising its fence; None if it ended, is leased to a live worker, or is not due."""
        rules = self.rules
        with redis_errors():
            word, *rest = self._run["CLAIM"](
                [job_key(job_id), busy_key(worker)],
                [
                    job_id,
                    worker,
                    rules.lease_s,
                    rules.attempts,
                    rules.keep_record_s,
                    rules.tenant_leases,
                ],
            )
        if word == b"closed":
            metrics.JOBS.labels("any", rest[0].decode()).inc()
        if word != b"claimed":
            return None
        fence, attempt, sealed, commit, waited, deferrals = rest
        return Claim(
            accepted=self.record_key.open(job_id, sealed),
            worker=worker,
            fence=int(fence),
            attempt=int(attempt),
            waited_s=float(waited),
            deferrals=int(deferrals),
            commit=self.record_key.open_commit(job_id, commit) if commit else None,
        )

    def renew(self, claim: Claim, progress: Fields) -> None:
        """Extend the lease and tell progress. Raises LeaseLost when fenced off, JobCancelled if asked to."""
        flat = [part for pair in progress.items() for part in pair] or ["worker_seen", 1]
        with redis_errors():
            word = self._run["RENEW"](
                [job_key(claim.accepted.job_id), busy_key(claim.worker)],
                [claim.accepted.job_id, claim.fence, self.rules.lease_s, *flat],
            )[0]
        raise_for(word)

    def split(self, claim: Claim, parts: Sequence[Accepted]) -> None:
        """Turn the job into the whole of these parts, all at once, and nudge workers for each."""
        flat = [
            field
            for part in parts
            for field in (part.job_id, self.record_key.seal(part), part.items, part.size_bytes)
        ]
        with redis_errors():
            word = self._run["SPLIT"](
                [job_key(claim.accepted.job_id)], [claim.accepted.job_id, claim.fence, *flat]
            )[0]
        raise_for(word)
        for part in parts:
            self.nudge(part.job_id, claim.accepted.queue)

    def committing(self, claim: Claim, commit: Commit) -> None:
        """From here on any worker may finish the commit, and nobody may cancel."""
        with redis_errors():
            word = self._run["COMMITTING"](
                [job_key(claim.accepted.job_id)],
                [
                    claim.accepted.job_id,
                    claim.fence,
                    self.record_key.sign_commit(claim.accepted.job_id, commit),
                ],
            )[0]
        raise_for(word)

    def finish(self, claim: Claim, state: str, code: str = "", fields: Fields | None = None) -> None:
        """End the job. Only the holder of the newest fence can; raises LeaseLost otherwise."""
        flat = [part for pair in (fields or {}).items() for part in pair]
        job_id = claim.accepted.job_id
        with redis_errors():
            word = self._run["FINISH"](
                [job_key(job_id)], [job_id, claim.fence, state, code, self.rules.keep_record_s, *flat]
            )[0]
        raise_for(word)
        if not claim.accepted.parent:
            metrics.JOBS.labels(claim.accepted.kind, state).inc()

    def defer(self, claim: Claim, delay_s: float, *, counts: bool) -> None:
        """Back to the queue, not before ``delay_s`` seconds; ``counts`` says whether the attempt counts."""
        job_id = claim.accepted.job_id
        with redis_errors():
            word = self._run["DEFER"]([job_key(job_id)], [job_id, claim.fence, delay_s, int(not counts)])[0]
        raise_for(word)

    # -- looking after ---------------------------------------------------------------------------------

    def due(self, limit: int = 1000) -> list[str]:
        """Open jobs that should be looked at: leases run out, delays over, messages perhaps lost."""
        with redis_errors():
            seconds, micro = self.redis.time()
            ids = cast(
                "list[bytes]",
                self.redis.zrangebyscore(f"{PREFIX}open", 0, seconds + micro / 1e6, start=0, num=limit),
            )
        return [raw.decode() for raw in ids]

    def reap(self, job_id: str, next_look_s: float) -> str:
        """Requeue a job whose lease ran out; the answer is the state found, or ``requeued``."""
        with redis_errors():
            word = self._run["REAP"]([job_key(job_id)], [job_id, next_look_s])[0]
        return word.decode()

    def expired(self, limit: int = 1000) -> list[str]:
        """Ended jobs whose results are to be deleted."""
        with redis_errors():
            ids = cast(
                "list[bytes]", self.redis.zrangebyscore(f"{PREFIX}ended", 0, time.time(), start=0, num=limit)
            )
        return [raw.decode() for raw in ids]

    def purged(self, job_id: str) -> None:
        """Note that the result is gone; the record itself expires later."""
        with redis_errors():
            if self.redis.exists(job_key(job_id)):
                self.redis.hset(job_key(job_id), "purged", 1)
            self.redis.zrem(f"{PREFIX}ended", job_id)

    def queue_of(self, job_id: str) -> str:
        with redis_errors():
            queue = cast("bytes | None", self.redis.hget(job_key(job_id), "queue"))
        return queue.decode() if queue and queue.decode() in QUEUES else QUEUES[0]

    def idle_s(self, worker: str) -> float:
        """Seconds since this worker claimed or renewed anything; infinite if it never did."""
        with redis_errors():
            at = cast("bytes | None", self.redis.get(busy_key(worker)))
        return time.time() - float(at) if at else float("inf")

    def exists(self, job_id: str) -> bool:
        with redis_errors():
            return bool(self.redis.exists(job_key(job_id)))

    def lock(self, name: str, owner: str, seconds: float) -> bool:
        """A short lock for one caretaker at a time; its holder renews it by calling again."""
        with redis_errors():
            key = f"{PREFIX}lock:{name}"
            if self.redis.set(key, owner, nx=True, px=int(seconds * 1000)):
                return True
            if self.redis.get(key) == owner.encode():
                self.redis.pexpire(key, int(seconds * 1000))
                return True
        return False

    def worker_seen(self, worker: str) -> None:
        with redis_errors():
            self.redis.zadd(f"{PREFIX}workers", {worker: time.time()})
            self.redis.zremrangebyscore(f"{PREFIX}workers", 0, time.time() - 10 * _WORKER_SEEN_S)

    def workers(self) -> int:
        with redis_errors():
            return int(self.redis.zcount(f"{PREFIX}workers", time.time() - _WORKER_SEEN_S, "+inf"))

    def open_counts(self, limit: int = 10_000) -> dict[str, int]:
        """Open jobs by state (over at most ``limit`` of them)."""
        counts = {"queued": 0, "running": 0, "committing": 0}
        with redis_errors():
            ids = cast("list[bytes]", self.redis.zrange(f"{PREFIX}open", 0, limit - 1))
            pipeline = self.redis.pipeline(transaction=False)
            for raw in ids:
                pipeline.hget(job_key(raw.decode()), "state")
            for state in pipeline.execute():
                if state and state.decode() in counts:
                    counts[state.decode()] += 1
        return counts
