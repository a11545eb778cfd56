"""The job store: jobs are submitted, cancelled and retried by compare-and-set scripts in Redis."""

from collections.abc import Sequence
from typing import Final

import msgspec

from kms_core.jobs.model import DEAD, Job
from kms_core.jobs.spec import JobSpec, SmallBlob
from kms_core.jobs.store.attempts import SHARE_S, AttemptStore
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.job_redis import FULL, UNBOUNDED
from kms_core.jobs.store.keys import PREFIX, job_key
from kms_core.jobs.store.scripts import flat
from kms_core.jobs.store.small_blobs import blob_arguments
from kms_core.observability import metrics
from kms_core.settings.model import TenantSection
from kms_protocol.errors import (
    DurabilityUnconfirmed,
    GroupComplete,
    IdempotencyConflict,
    JobCommitting,
    JobNotDead,
    RateLimited,
    RedisFull,
    SpoolQuota,
    TenantShare,
    UnknownJob,
)

SHED_S: Final = 10.0
_NO_RECORD: Final = (
    "The job that this Idempotency-Key was used for is not there any more: look for its effect, "
    "then submit again with another key"
)


class JobStore(AttemptStore):
    """Submit, claim, renew, commit, finish: one script each, all safe to repeat."""

    retry_within_s = 86_400.0

    def submit(
        self,
        accepted: JobSpec,
        idempotency: str = "",
        resources: Sequence[str] = (),
        blob: SmallBlob | None = None,
    ) -> Job:
        """Store the job, then notify a worker. With a key that was used before: that job, or a conflict.

        ``blob`` is its input, where that is small. ``resources`` are those that it uses, as in ``[kms.jobs]
        resource_leases``.
        Raises IdempotencyConflict, RateLimited when too many jobs wait, TenantShare if others are to have
        room, RedisFull, JobsUnavailable. Once this returns, the job survives any process.
        DurabilityUnconfirmed: replicas did not acknowledge it, so it was taken back unless it had begun.
        """
        if idempotency:
            key = self.record_key.digest(idempotency.encode())
            accepted = msgspec.structs.replace(accepted, idempotency=key)
        sealed, plain = self.record_key.seal(accepted), accepted.plain
        fields = dict(plain, sealed=sealed, work_bytes=accepted.work_bytes)
        fields |= self.index_fields(accepted, resources) | ({"small": 1} if blob else {})
        keys = [job_key(accepted.job_id), f"{PREFIX}tenant:{accepted.tenant}"]
        if idempotency:
            keys.append(f"{PREFIX}idem:{accepted.idempotency.hex()}")
        value = f"{accepted.job_id} {accepted.digest.hex()}"
        rules, tenant = self.rules, accepted.tenant
        given = [accepted.job_id, rules.open_jobs, value, accepted.expires_at, accepted.created_at, tenant]
        most = self.section.tenants.get(tenant, TenantSection()).open_jobs or 0
        given += [most, accepted.spooled_bytes, self.spool_quota(tenant)]
        given += [self.large_job_bytes, *self.wake_up(accepted.queue), int(self.has_several_tenants())]
        given += [FULL, UNBOUNDED, *blob_arguments(blob)]
        with redis_errors():
            (word, *rest), confirmed = self._waits.run(self.scripts["submit"], keys, [*given, *flat(fields)])
        found = None if word == b"queued" else self._found(word, rest, accepted)
        if not confirmed:
            raise self.unconfirmed_error(found, keys, accepted.job_id, sealed)
        if found:
            return found
        metrics.JOBS.labels(accepted.kind, "queued").inc()
        wake_ups, *probe = rest
        self.read_probe(*probe)
        self.notify(accepted.queue, int(wake_ups))
        job = msgspec.convert({**plain, "job_id": accepted.job_id, "state": "queued"}, Job)
        return msgspec.structs.replace(job, accepted=accepted)

    def unconfirmed_error(
        self, found: Job | None, keys: Sequence[str], job_id: str, sealed: bytes
    ) -> DurabilityUnconfirmed:
        """The error for a submission that replicas did not acknowledge.

        A new job is taken back, if no worker has started it. ``found`` is one that was there before.
        """
        if found:
            return DurabilityUnconfirmed(job_id=found.job_id)
        with redis_errors():
            word = self.scripts["withdraw"](keys, [job_id, sealed])[0]
        return DurabilityUnconfirmed(job_id=job_id, withdrawn=word == b"withdrawn")

    def _found(self, word: bytes, rest: Sequence[bytes], accepted: JobSpec) -> Job:
        if word == b"exists":
            return self._before(accepted, rest[0].decode(errors="replace").partition(" ")[0])
        if word == b"taken":  # sent twice: by a client that got no answer, or by a submitter
            return self.get(accepted.job_id, accepted.tenant)
        if word == b"memory":
            raise RedisFull
        raise self._turned_away_error(word, accepted.tenant)

    def _before(self, accepted: JobSpec, job_id: str) -> Job:
        """The job that the entry of an Idempotency-Key names; its sealed record says whether it is that one.

        Raises IdempotencyConflict if it is not, or was not sealed by this service, or has expired.
        """
        try:
            job = self.get(job_id, accepted.tenant)
        except UnknownJob:
            raise IdempotencyConflict(_NO_RECORD) from None
        before = job.accepted
        if before and (before.digest, before.idempotency) != (accepted.digest, accepted.idempotency):
            raise IdempotencyConflict
        if not before or before.is_forgotten:
            raise IdempotencyConflict(_NO_RECORD)
        return job

    def _turned_away_error(self, word: bytes, tenant: str) -> RateLimited | SpoolQuota | GroupComplete:
        if word == b"group":
            return GroupComplete()
        if word == b"full":
            return RateLimited("Too many jobs wait already; submit again later", retry_after_s=SHED_S)
        if word == b"quota":
            return RateLimited("Your tenant has as many open jobs as it may", retry_after_s=SHED_S)
        if word == b"share":
            return TenantShare(retry_after_s=SHARE_S)
        return self.quota_error(tenant)

    def cancel(self, job_id: str, tenant: str) -> Job:
        """Ends a queued job now, a running one at its next item or slab. Raises JobCommitting, UnknownJob."""
        job, sealed = self.seen(job_id, tenant)
        parts = self.parts_cut(job)
        given = [sealed, self.rules.result_ttl_s, self.large_job_bytes, *parts]
        (word,) = self.call("cancel", job_id, *given)
        if word == b"committing":
            raise JobCommitting
        self.confirm(job_id)
        job = self.get(job_id, tenant)
        if word == b"cancelled":
            metrics.JOBS.labels(job.kind, "cancelled").inc()
        return job

    def retry(self, job_id: str, tenant: str) -> Job:
        """Give a dead job all its attempts again, for ``retry_within_s``. Its specification is sealed again.

        Raises JobNotDead for any other job, and if its record is not one that this service wrote; UnknownJob.
        """
        job, before = self.seen(job_id, tenant)
        accepted = job.accepted
        if not accepted:
            raise JobNotDead("The record of this job is not one that this service wrote: submit it again")
        if not self.is_kept(accepted):
            raise JobNotDead("This job expired too long ago: submit it again")
        seen = job.attempt_id if job.error in DEAD else "-"
        run_by = self.now() + self.retry_within_s
        times = {"start_by": run_by, "run_by": run_by, "expires_at": run_by + accepted.keep_for_s}
        changed = {**times, "generation": accepted.generation + 1}
        sealed = self.record_key.seal(msgspec.structs.replace(accepted, **changed))
        given = [before, sealed, seen, accepted.tenant, self.large_job_bytes, *flat(changed)]
        (word,) = self.call("retry", job_id, *given)
        if word != b"queued":
            self.get(job_id, tenant)  # UnknownJob, if the id is another tenant's by now
            raise JobNotDead
        self.wake()
        self.confirm(job_id)
        return self.get(job_id, tenant)
