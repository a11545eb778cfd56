"""The job store: records in Redis, moved by compare-and-set scripts; knows no queue, disk or key backend."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import msgspec
import redis
import structlog

from kms_core.jobs.ends import SignedEnd, SignedSplit, Work, needs_proof, spec_digest
from kms_core.jobs.model import (
    DEAD,
    REFUSED,
    Attempt,
    Checkpoint,
    ClocksApart,
    Commit,
    Fields,
    Job,
    JobSpec,
    NotifyWorker,
    QueuePriority,
    StoreRules,
)
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.store import broker_messages
from kms_core.jobs.store.reader import JobReader
from kms_core.jobs.store.redis_keys import PREFIX, TALLY, busy_key, job_key, number, raise_for, redis_errors
from kms_core.observability import metrics
from kms_protocol.errors import (
    IdempotencyConflict,
    JobCommitting,
    JobExpired,
    JobNotDead,
    JobsUnavailable,
    RateLimited,
    UnknownJob,
)
from kms_protocol.wire import JobState

SHED_S: Final = 10.0
_MOST_DEFERRALS: Final = 10  # delays are longest by then; in Redis anything may stand
_NO_RECORD: Final = (
    "The job that this Idempotency-Key was used for is not there any more: look for its effect, "
    "then submit again with another key"
)
_log = structlog.get_logger(__name__)


class JobStore(JobReader):
    """Submit, claim, renew, commit, finish: one script each, all safe to repeat."""

    def __init__(
        self, client: redis.Redis, record_key: RecordKey, nudge: NotifyWorker | None, rules: StoreRules
    ) -> None:
        """Without a ``nudge`` the broker's lists lie in this Redis, and messages are put there right away."""
        super().__init__(client, record_key, rules)
        self._nudge = nudge

    # -- the submitter's side -------------------------------------------------------------------------

    def submit(self, accepted: JobSpec, *, idempotency: str = "") -> Job:
        """Store the job, then nudge a worker. With a key that was used before: that job, or a conflict.

        Raises IdempotencyConflict, RateLimited when too many jobs wait, JobsUnavailable. Once this returns,
        the job survives any process.
        """
        if idempotency:
            key = self.record_key.digest(idempotency.encode())
            accepted = msgspec.structs.replace(accepted, idempotency=key)
        sealed, plain = self.record_key.seal(accepted), accepted.plain
        fields: Fields = {**plain, "sealed": sealed, "work_bytes": accepted.work_bytes}
        keys = [job_key(accepted.job_id), f"{PREFIX}tenant:{accepted.tenant}"]
        if idempotency:
            keys.append(f"{PREFIX}idem:{accepted.idempotency.hex()}")
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
                    accepted.tenant,
                    self.rules.tenant_open.get(accepted.tenant, 0),
                    accepted.spooled_bytes,
                    self.rules.tenant_spool_bytes.get(accepted.tenant, 0),
                    *self._letter(accepted),
                    *flat,
                ],
            )
        if word == b"exists":
            return self._before(accepted, rest[0].decode(errors="replace").partition(" ")[0])
        if word == b"taken":  # said twice: by a client that did not hear the answer, or by a submitter
            return self.get(accepted.job_id, accepted.tenant)
        if word != b"queued":
            raise _turned_away(word, accepted.tenant)
        metrics.JOBS.labels(accepted.kind, "queued").inc()
        if self._nudge is not None:
            self.nudge(accepted.job_id, accepted.lane)
        return msgspec.convert({**plain, "job_id": accepted.job_id, "state": "queued"}, Job)

    def _before(self, accepted: JobSpec, job_id: str) -> Job:
        """The job that the entry of an Idempotency-Key names; its sealed record says whether it is that one.

        Raises IdempotencyConflict if it is not, or was not sealed by this service, or has expired.
        """
        try:
            before, job = self.accepted(job_id), self.get(job_id, accepted.tenant)
        except UnknownJob:
            raise IdempotencyConflict(_NO_RECORD) from None
        asked = (accepted.tenant, accepted.digest, accepted.idempotency)
        key = before.idempotency if before.signed_end else accepted.idempotency  # 0.1 does not tell
        if (before.tenant, before.digest, key) != asked:
            raise IdempotencyConflict
        if before.is_expired:
            raise IdempotencyConflict(_NO_RECORD)
        return job

    def spool_room(self, tenant: str) -> int | None:
        """Bytes that a tenant may still upload, None without a quota. ``submit`` has the last word."""
        most = self.rules.tenant_spool_bytes.get(tenant)
        if most is None:
            return None
        used: bytes | None = self.shared(self.redis.hget, f"{PREFIX}spooled:{tenant}", "sum")
        return max(0, most - int(number(used)))

    def _letter(self, accepted: JobSpec) -> tuple[str, bytes]:
        """Where the script that stores a job puts its message, and this; neither, if others send it."""
        if self._nudge is not None:
            return "", b""
        return broker_messages.where(accepted.lane), broker_messages.write(
            accepted.job_id, accepted.lane, self.now()
        )

    def nudge(self, job_id: str, lane: QueuePriority) -> None:
        """Tell a worker. Losing this costs seconds: the caretaker nudges again."""
        self._nudge_all([job_id], lane)

    def _nudge_all(self, job_ids: Sequence[str], lane: QueuePriority) -> None:
        try:
            if self._nudge is None:
                self.post(job_ids, lane)
                return
            for job_id in job_ids:
                self._nudge(job_id, *lane)
        except JobsUnavailable:
            metrics.JOB_RESUMES.labels("nudge_failed").inc()

    def cancel(self, job_id: str, tenant: str) -> Job:
        """Ends a queued job now, a running one at its next item or slab. Raises JobCommitting, UnknownJob."""
        job, sealed = self.seen(job_id, tenant)
        parts = self.parts_cut(job)
        with redis_errors():
            given = [job_id, sealed, self.rules.keep_record_s, *parts]
            word = self._run["CANCEL"]([job_key(job_id)], given)[0]
        if word == b"committing":
            raise JobCommitting
        job = self.get(job_id, tenant)
        if word == b"cancelled":
            metrics.JOBS.labels(job.kind, "cancelled").inc()
            if job.fence > 1:  # an attempt that died may have left half a target: a worker tidies
                self.nudge(job_id, (job.queue, job.priority))
        return job

    def retry(self, job_id: str, tenant: str, ttl_s: float) -> Job:
        """Give a dead letter all its attempts again, for ``ttl_s`` seconds: it is sealed anew.

        Raises JobNotDead for any other job, and if its record is not one that this service wrote; UnknownJob.
        """
        job, before = self.seen(job_id, tenant)
        seen = job.fence if job.error in DEAD else ""
        accepted = self._to_retry(job_id, before)
        until = self.now() + ttl_s
        sealed = self.record_key.seal(msgspec.structs.replace(accepted, expires_at=until, signed_end=True))
        with redis_errors():
            given = [job_id, before, until, sealed, seen, accepted.tenant]
            word = self._run["RETRY"]([job_key(job_id)], given)[0]
        if word != b"queued":
            self.get(job_id, tenant)  # UnknownJob, if the id is another tenant's by now
            raise JobNotDead
        job = self.get(job_id, tenant)
        self.nudge(job_id, job.lane)
        return job

    def _to_retry(self, job_id: str, sealed: bytes) -> JobSpec:
        try:
            accepted = self.record_key.open(job_id, sealed)
        except UnknownJob:
            raise JobNotDead(
                "The record of this job is not one that this service wrote: submit it again"
            ) from None
        if not self.is_kept(accepted):
            raise JobNotDead("This job expired too long ago: submit it again")
        return accepted

    # -- the worker's side ----------------------------------------------------------------------------

    def claim(self, job_id: str, worker: str) -> Attempt | None:
        """Take the job, raising its fence.

        None if it ended, is leased to a live worker, or is not due, and if it is large and the processes of
        this worker that it may have are taken: it then waits, which counts as no attempt.
        """
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
                    rules.large_job_bytes,
                    rules.large_leases if rules.has_several_tenants() else 0,
                ],
            )
        if word == b"closed":
            metrics.JOBS.labels("any", rest[0].decode()).inc()
        if word == b"waits" and int(rest[0]):
            _log.info("job.waits", job_id=job_id, reason="reserved_processes")
        if word != b"claimed":
            return None
        try:
            claim = self._claimed(job_id, worker, rest)
        except UnknownJob:
            self._close(job_id, int(rest[0]), REFUSED)
            return None
        return claim if claim.commit or self._is_in_time(claim) else None

    def _is_in_time(self, claim: Attempt) -> bool:
        """Whether a claimed job is in time; else close it, or leave it to a worker whose clock is right."""
        job_id = claim.accepted.job_id
        try:
            claim.accepted.check_expiry(self.now)
        except JobExpired as exc:
            self._close(job_id, claim.fence, exc.code)
        except ClocksApart as exc:
            _log.error("job.clocks_apart", job_id=job_id, ahead_s=round(time.time() - self.now()))
            self.defer(claim, exc.retry_after_s, counts=False, away=False)
        else:
            return True
        return False

    def _claimed(self, job_id: str, worker: str, answer: Sequence[bytes]) -> Attempt:
        fence, attempt, sealed, commit, waited, deferrals, log, is_large = answer
        key, spec = self.record_key, spec_digest(sealed or b"")
        claim = Attempt(
            accepted=key.open(job_id, sealed or b""),
            worker=worker,
            fence=int(fence),
            attempt=int(attempt),
            waited_s=float(waited),
            deferrals=int(min(max(number(deferrals), 0), _MOST_DEFERRALS)),
            is_large=bool(int(is_large)),
            spec=spec,
        )
        return replace(
            claim,
            commit=key.open_commit(job_id, commit, claim.bound) if commit else None,
            log=key.open_log(job_id, log, claim.bound) if log else Checkpoint(),
        )

    def _close(self, job_id: str, fence: int, code: str) -> None:
        """End a job that no attempt can do: its record is not as we wrote it, or has expired by our clock."""
        _log.error("job.closed", job_id=job_id, code=code)
        with redis_errors():
            self._run["FINISH"]([job_key(job_id)], [job_id, fence, "failed", code, self.rules.keep_record_s])
        metrics.JOBS.labels("any", "failed").inc()

    def renew(self, claim: Attempt, progress: Fields) -> None:
        """Extend the lease and tell progress. Raises LeaseLost when fenced off, JobCancelled if asked to."""
        flat = [part for pair in progress.items() for part in pair] or ["worker_seen", 1]
        with redis_errors():
            word = self._run["RENEW"](
                [job_key(claim.accepted.job_id), busy_key(claim.worker)],
                [claim.accepted.job_id, claim.fence, self.rules.lease_s, *flat],
            )[0]
        raise_for(word)

    def split(self, claim: Attempt, parts: Sequence[JobSpec]) -> None:
        """Turn the job into the whole of these parts, all at once, and nudge workers for each."""
        job_id, sealed = claim.accepted.job_id, [self.record_key.seal(part) for part in parts]
        split = SignedSplit(parts=len(parts), digest=spec_digest(*sealed))
        flat = [
            field
            for part, record in zip(parts, sealed, strict=True)
            for field in (part.job_id, record, part.items, part.size_bytes, part.work_bytes)
        ]
        given = [job_id, claim.fence, self.record_key.sign_split(job_id, split, claim.spec), *flat]
        with redis_errors():
            word = self._run["SPLIT"]([job_key(job_id)], given)[0]
        raise_for(word)
        self._nudge_all([part.job_id for part in parts], claim.accepted.lane)

    def end_parent(self, job: Job, end: SignedEnd, spec: bytes) -> None:
        """End a job all of whose parts have ended, as cancelled if its owner has asked for that.

        Doing it again, or in two workers, changes nothing.
        """
        fields: dict[str, int | bytes] = {"parts_left": 0}
        if needs_proof(end.state, end.error):
            fields |= {"items_done": end.items_done, "items_failed": end.items_failed}
            fields["bytes_done"] = end.bytes_done
            fields |= {f"{TALLY}{name}": number for name, number in end.tallies.items()}
            fields["end"] = self.record_key.sign_end(job.job_id, end, spec)
        flat = [part for pair in fields.items() for part in pair]
        given = [job.job_id, end.fence, end.state, end.error, self.rules.keep_record_s, *flat]
        with redis_errors():
            word = self._run["END_PARENT"]([job_key(job.job_id)], given)[0]
        if word in {b"finished", b"cancelled"}:
            state = end.state if word == b"finished" else "cancelled"
            metrics.JOBS.labels(job.kind, state).inc()

    def step(self, claim: Attempt, log: Checkpoint, counts: Fields) -> None:
        """Note how far a part has come. Raises LeaseLost when fenced off, JobCancelled if asked to stop."""
        job_id = claim.accepted.job_id
        flat = [part for pair in counts.items() for part in pair]
        with redis_errors():
            word = self._run["STEP"](
                [job_key(job_id)],
                [job_id, claim.fence, self.record_key.sign_log(job_id, log, claim.bound), *flat],
            )[0]
        raise_for(word)

    def pace(self, job: JobSpec, wanted: int) -> tuple[int, float]:
        """How many files may be begun now; if none, in how many seconds it may be ``wanted``."""
        with redis_errors():
            _, granted, wait_s = self._run["PACE"](
                [job_key(job.job_id), f"{PREFIX}pace:{job.owner}"], [job.job_id, wanted, job.rate_per_s]
            )
        return int(granted), float(wait_s)

    def committing(self, claim: Attempt, commit: Commit) -> None:
        """From here on any worker may finish the commit, and nobody may cancel. Raises JobExpired."""
        claim.accepted.check_expiry(self.now)
        with redis_errors():
            word = self._run["COMMITTING"](
                [job_key(claim.accepted.job_id)],
                [
                    claim.accepted.job_id,
                    claim.fence,
                    self.record_key.sign_commit(claim.accepted.job_id, commit, claim.bound),
                ],
            )[0]
        raise_for(word)

    def finish(self, claim: Attempt, state: JobState, code: str = "", work: Work | None = None) -> None:
        """End the job, signed where the end needs a proof.

        Only the holder of the newest fence can; raises LeaseLost otherwise.
        """
        job_id, keep_s = claim.accepted.job_id, self.rules.keep_record_s
        fields: dict[str, int | bytes] = {**work.progress} if work else {}
        if needs_proof(state, code):
            end = claim.end(state, code, work or Work(), keep_s)
            fields["end"] = self.record_key.sign_end(job_id, end, claim.spec)
        flat = [part for pair in fields.items() for part in pair]
        with redis_errors():
            given = [job_id, claim.fence, state, code, keep_s, *flat]
            word = self._run["FINISH"]([job_key(job_id)], given)[0]
        raise_for(word)
        if not claim.accepted.parent:
            metrics.JOBS.labels(claim.accepted.kind, state).inc()

    def defer(
        self,
        claim: Attempt,
        delay_s: float,
        *,
        counts: bool,
        away: bool = True,
        work_bytes: int | None = None,
    ) -> None:
        """Back to the queue, not before ``delay_s`` seconds; ``counts`` says whether the attempt counts.

        ``away``: something does not answer, and the next delay will be longer. ``work_bytes`` is what the
        job turned out to read, for the next claim.
        """
        job_id = claim.accepted.job_id
        found = "" if work_bytes is None else work_bytes
        given = [job_id, claim.fence, delay_s, int(not counts), int(away), found]
        with redis_errors():
            word = self._run["DEFER"]([job_key(job_id)], given)[0]
        raise_for(word)


def _turned_away(word: bytes, tenant: str) -> RateLimited:
    if word == b"full":
        return RateLimited("Too many jobs wait already; submit again later", retry_after_s=SHED_S)
    metrics.RATE_LIMITED.labels(tenant).inc()
    what = "as many open jobs" if word == b"quota" else "as much in the spool"
    return RateLimited(f"Your tenant has {what} as it may", retry_after_s=SHED_S)
