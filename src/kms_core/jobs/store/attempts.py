"""Attempts at jobs, as the worker has them: one script each, all safe to repeat."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
import structlog

from kms_core.jobs.model import REFUSED, Attempt, Checkpoint, Commit, Following, Job, new_attempt_id
from kms_core.jobs.spec import (
    ClocksApart,
    Fields,
    JobSpec,
    RecordTooNew,
    SignedEnd,
    SignedSplit,
    WorkResult,
    needs_proof,
    spec_digest,
)
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.job_redis import ANY_KEY
from kms_core.jobs.store.keys import PREFIX, busy_key, job_key
from kms_core.jobs.store.reader import JobReader
from kms_core.jobs.store.records import TALLY
from kms_core.jobs.store.scripts import flat, raise_for
from kms_core.jobs.store.small_blobs import blob_arguments
from kms_core.observability import metrics
from kms_protocol.errors import JobExpired, JobsUnavailable, TenantShare, Unavailable, UnknownJob
from kms_protocol.wire import JobState

SHARE_S: Final = 60.0
"""Seconds to wait for room: records are forgotten hours after their jobs ended."""
_OPEN_SHARE: Final = 0.95
_log = structlog.get_logger(__name__)
Asked = tuple[list[str], list[Any]]
"""Keys and arguments of a script."""


class AttemptStore(JobReader):
    """The worker's side of ``JobStore``: one script each, all safe to repeat."""

    def claim(self, job_id: str, worker: str) -> Attempt | None:
        """Take this job.

        None if it ended, is leased to a live worker, is not due, or is capped: that costs no attempt.
        """
        found = self._claim(job_id, worker, ())
        return found if isinstance(found, Attempt) else None

    def next(self, worker: str, queues: Sequence[str], *, woken: bool) -> Attempt | str | None:
        """Take the next job for a process of a worker; jobs of the first of the queues come first.

        The id of a job where that wants a hand only: to be tidied, or to be ended after its parts. None if no
        job is ready in these queues. ``woken``: a wake-up brought the process here. If it finds work
        then, another process is woken for what is left: so all are at work soon, however few were woken.
        """
        found = self._claim("", worker, queues)
        if woken and found:
            with suppress(JobsUnavailable):  # the attempt goes on
                self.wake(queues)
        return found

    def _claim(self, job_id: str, worker: str, queues: Sequence[str]) -> Attempt | str | None:
        attempt_id = new_attempt_id()
        with redis_errors():
            answer = self.scripts["claim"](*self._asked(job_id, worker, attempt_id, queues))
        return self.found_by(worker, attempt_id, answer)

    def _asked(self, job_id: str, worker: str, attempt_id: str, queues: Sequence[str]) -> Asked:
        rules = self.rules
        given = [job_id, worker, rules.lease_s, rules.attempts, rules.result_ttl_s, rules.tenant_leases]
        given += [self.large_job_bytes, self.large_leases(), msgspec.json.encode(self.resource_leases)]
        given += [attempt_id, *queues]
        return [job_key(job_id) if job_id else ANY_KEY, busy_key(worker)], given

    def large_leases(self) -> int:
        """Large jobs that may run on a worker at a time; 0 for any number."""
        rules = self.rules
        shares = rules.reserved_processes and self.has_several_tenants()
        return max(1, rules.concurrency - rules.reserved_processes) if shares else 0

    def found_by(self, worker: str, attempt_id: str, answer: Sequence[bytes]) -> Attempt | str | None:
        """Decode the answer of a claim; as ``next``. If this fails, the lease of the claim runs out.

        Raises JobsUnavailable, LeaseLost.
        """
        word, *rest = answer
        name = rest[0].decode(errors="replace") if rest else ""
        if word == b"closed":
            metrics.JOBS.labels("any", rest[1].decode()).inc()
        if word != b"claimed":
            return name or None
        try:
            claim = self._claimed(name, worker, attempt_id, rest[1:])
        except RecordTooNew as exc:  # its plain fields did not say so
            self.call("put_aside", name, attempt_id, exc.feature)
            return name
        except UnknownJob:
            self._close(name, attempt_id, REFUSED)
            return name
        return claim if claim.commit or self._is_in_time(claim) else name

    def _is_in_time(self, claim: Attempt) -> bool:
        """True if a claimed job is in time; else close it, or leave it to a worker whose clock is right."""
        job_id = claim.accepted.job_id
        try:
            claim.accepted.check_expiry(self.now)
        except JobExpired as exc:
            self._close(job_id, claim.attempt_id, exc.code)
        except ClocksApart as exc:
            _log.error("job.clocks_apart", job_id=job_id, ahead_s=round(time.time() - self.now()))
            self.defer(claim, exc.retry_after_s, exc.code, away=False)
        else:
            return True
        return False

    def _claimed(self, job_id: str, worker: str, attempt_id: str, answer: Sequence[bytes]) -> Attempt:
        fence, attempt, sealed, commit, waited, deferrals, log, is_large, has_room, small_input = answer
        self.has_room = bool(int(has_room))
        key, spec = self.record_key, spec_digest(sealed or b"")
        return Attempt(
            accepted=key.open(job_id, sealed or b""),
            worker=worker,
            attempt_id=attempt_id,
            fence=int(fence),
            attempt=int(attempt),
            waited_s=float(waited),
            deferrals=int(deferrals),
            is_large=bool(int(is_large)),
            spec=spec,
            commit=key.verified(Commit, job_id, commit, spec) if commit else None,
            log=key.verified(Checkpoint, job_id, log, spec) if log else Checkpoint(),
            small_input=small_input or None,
        )

    def _close(self, job_id: str, attempt_id: str, code: str) -> None:
        """End a job that no attempt can do: its record is not as we wrote it, or has expired by our clock."""
        _log.error("job.closed", job_id=job_id, code=code)
        self.call("finish", job_id, attempt_id, "failed", code, self.rules.result_ttl_s, job_id, 0)
        metrics.JOBS.labels("any", "failed").inc()

    def renew(self, claim: Attempt, progress: Fields) -> None:
        """Extend the lease and report progress.

        Raises LeaseLost if another attempt holds the job, JobCancelled if it is to stop.
        """
        with redis_errors():
            word = self.scripts["renew"](
                [job_key(claim.accepted.job_id), busy_key(claim.worker)],
                [claim.accepted.job_id, claim.attempt_id, self.rules.lease_s, *flat(progress)],
            )[0]
        raise_for(word)

    def require_share(self, tenant: str) -> None:
        """Raise TenantShare where a job is not to be split now, for other tenants to have room.

        The jobs of its tenant then take twice as much memory as is free, or no more than a twentieth of
        ``open_jobs`` is left. Raises JobsUnavailable.
        """
        if not self.has_several_tenants():
            return
        with redis_errors():
            pipeline = self.redis.pipeline(transaction=False)
            pipeline.hget(f"{PREFIX}held:{tenant}", "sum")
            pipeline.get(f"{PREFIX}room")
            pipeline.zcard(f"{PREFIX}open")
            held, room, open_jobs = pipeline.execute()
            is_spent = bool(room) and int(held or 0) > 2 * int(room)
        if is_spent or open_jobs > self.rules.open_jobs * _OPEN_SHARE:
            raise TenantShare(retry_after_s=SHARE_S)

    def split(self, claim: Attempt, parts: Sequence[JobSpec]) -> None:
        """Turn the job into the parent of these parts in one step, and notify workers for each."""
        job_id = claim.accepted.job_id
        sealed = [self.record_key.seal(part) for part in parts]
        split = SignedSplit(parts=len(parts), digest=spec_digest(*sealed))
        listed = [
            field
            for part, record in zip(parts, sealed, strict=True)
            for field in (part.job_id, record, part.items, part.size_bytes, part.work_bytes)
        ]
        queue, signed = claim.accepted.queue, self.record_key.sign(job_id, split, claim.spec)
        given = [claim.attempt_id, signed, self.large_job_bytes, *self.wake_up(queue), *listed]
        word, *count = self.call("split", job_id, *given)
        raise_for(word)
        self.notify(queue, int(count[0]))

    def end_parent(self, job: Job, end: SignedEnd, spec: bytes) -> None:
        """End a job all of whose parts have ended, as cancelled if its owner has asked for that.

        Doing it again, or in two workers, changes nothing.
        """
        fields: dict[str, int | bytes] = {"parts_left": 0}
        if needs_proof(end.state, end.error):
            fields |= end.progress
            fields |= {f"{TALLY}{name}": number for name, number in end.tallies.items()}
            fields["end"] = self.record_key.sign(job.job_id, end, spec)
        given = [job.job_id, job.attempt_id, end.state, end.error, self.rules.result_ttl_s, *flat(fields)]
        with redis_errors():
            (word, *_), _ = self._waits.run(self.scripts["end_parent"], [job_key(job.job_id)], given)
        if word in {b"finished", b"cancelled"}:
            state = end.state if word == b"finished" else "cancelled"
            metrics.JOBS.labels(job.kind, state).inc()

    def step(self, claim: Attempt, log: Checkpoint, counts: Fields) -> None:
        """Note how far a part has come.

        Raises LeaseLost if another attempt holds the job, JobCancelled if it is to stop, and
        DurabilityUnconfirmed for a commit that replicas did not acknowledge.
        """
        job_id = claim.accepted.job_id
        given = [claim.attempt_id, self.record_key.sign(job_id, log, claim.spec), *flat(counts)]
        self.run_confirmed("step", job_id, given, waits=log.pending is not None)

    def committing(self, claim: Attempt, commit: Commit | None) -> None:
        """Record the commit: any worker may finish it now, and the job cannot be cancelled.

        None takes back a commit that could put nothing in place: the job is running again. Raises LeaseLost,
        JobCancelled, JobExpired, DurabilityUnconfirmed if replicas did not acknowledge it.
        """
        job_id, signed = claim.accepted.job_id, b""
        if commit:
            claim.accepted.check_expiry(self.now)
            signed = self.record_key.sign(job_id, commit, claim.spec)
        self.run_confirmed("committing", job_id, [claim.attempt_id, signed])

    def finish(
        self, claim: Attempt, state: JobState, code: str = "", result: WorkResult | None = None
    ) -> None:
        """End the job, signed where the end needs a proof.

        Only the attempt that holds the job can; raises LeaseLost otherwise. An end that replicas do not
        acknowledge stands, and its events wait (``events/outbox.py``).
        """
        job_id, keep_s = claim.accepted.job_id, self.rules.result_ttl_s
        fields: dict[str, int | bytes] = {**result.progress} if result else {}
        if needs_proof(state, code):
            kept_until = claim.accepted.result_until(self.now()) + keep_s
            end = claim.end(state, code, result or WorkResult(), kept_until)
            fields["end"] = self.record_key.sign(job_id, end, claim.spec)
        with redis_errors():
            given: list[Any] = [job_id, claim.attempt_id, state, code, keep_s, claim.accepted.owner]
            given += [*blob_arguments(result.blob if result else None), *flat(fields)]
            word = self._finish([job_key(job_id)], given, claim.following)
        raise_for(word)
        if not claim.accepted.parent:
            metrics.JOBS.labels(claim.accepted.kind, state).inc()

    def _finish(self, keys: Sequence[str], given: Sequence[Any], following: Following | None) -> bytes:
        if following is None or not following.is_wanted():
            return self._waits.run(self.scripts["finish"], keys, given)[0][0]
        attempt_id = new_attempt_id()
        asked = self._asked("", following.worker, attempt_id, following.queues)
        first, second = (self.scripts["finish"], keys, given), (self.scripts["claim"], *asked)
        answer, claimed = self._waits.run_together(first, second)[0]
        if not isinstance(claimed, Exception):
            following.claimed.append((attempt_id, claimed))  # an error in it is not one of the ended job
        if isinstance(answer, Exception):
            raise answer
        return answer[0]

    def defer(
        self,
        claim: Attempt,
        delay_s: float,
        code: str = Unavailable.code,
        *,
        away: bool = True,
        work_bytes: int | None = None,
    ) -> None:
        """Back to the queue because of ``code``, not before ``delay_s`` seconds. The attempt does not count.

        A job that is committing keeps its commit, which the next attempt finishes. Raises LeaseLost.

        ``away``: something does not answer, and the next delay will be longer. ``work_bytes`` is what the
        job turned out to read, for the next claim.
        """
        found = "" if work_bytes is None else work_bytes
        given = (claim.attempt_id, delay_s, int(away), found, self.large_job_bytes, code)
        raise_for(self.call("defer", claim.accepted.job_id, *given)[0])

    def stalled(self, claim: Attempt) -> list[str]:
        """Take the lease from an attempt that advances nothing; its worker no longer touches its roots.

        Returns the resources that it uses.
        """
        rules, owner = self.rules, (claim.attempt_id, claim.worker)
        given = (rules.stall_s, self.large_job_bytes, rules.result_ttl_s)
        found = self.call("stalled", claim.accepted.job_id, *owner, *given)
        return found[1].decode(errors="replace").split()
