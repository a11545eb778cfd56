"""Errors that callers can receive, as one tree. HTTP statuses are in kms_api/problems.py.

KmsError
├── BadInput            the caller can correct the request
│   ├── InvalidRequest · InvalidContext · InvalidDeadline · ContextRequired · NotACiphertext · TooLarge
├── DecryptFailed       wrong key, wrong context, truncated, modified: one answer for each cause
├── Unauthenticated
├── Refused             Forbidden · PathRefused · ForeignRefused
├── Missing             UnknownKey · UnknownJob · ResultExpired (ResultReleased)
├── RecordRefused       the stored record of a job was not written by this service
├── Conflict            IdempotencyConflict · JobNotFinished · JobCommitting · JobNotDead · TargetExists
│                       · GroupComplete · RotationRefused (TooManyVersions)
├── DataKeysUnsupported
├── BodyTimeout         the sender was too slow
├── Unavailable         the only retryable errors: BackendUnavailable · AuditUnavailable · RateLimited
│                       (TenantShare) · SpoolUnavailable · SpoolFull (SpoolQuota) · DocumentOutdated
│                       · JobsUnavailable (RedisFull · RedisReadOnly · WrongInstall · DurabilityUnconfirmed)
├── JobCancelled · JobExpired (JobNotStarted) · ItemsFailed · AttemptsExhausted    ends of a job
└── ConfigurationError  raised at start only

``code`` is part of the API and never changes; the text may. ``exit_code`` is the exit code of the ``kms``
command (sysexits.h).
"""

from typing import ClassVar, Final

EXIT_OTHER: Final = 1
EXIT_USAGE: Final = 2
EXIT_BAD_DATA: Final = 65
EXIT_UNAVAILABLE: Final = 69
EXIT_EXISTS: Final = 73
EXIT_REFUSED: Final = 77
EXIT_CONFIGURATION: Final = 78


class KmsError(Exception):
    """An error with a stable ``code``. Its text never contains plaintext, keys, tokens or context values.

    ``hint`` says what to do, where the place that raises it knows more than the code says.
    """

    code: ClassVar[str] = "internal"
    summary: ClassVar[str] = "The service failed to handle the request"
    exit_code: ClassVar[int] = EXIT_OTHER
    hint: str = ""

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail or self.summary)
        self.detail = detail or self.summary


class BadInput(KmsError):
    """An invalid request. Sending it again without a change fails again."""

    code = "invalid_request"
    summary = "The request is not valid"
    exit_code = EXIT_BAD_DATA


class InvalidRequest(BadInput):
    """A body, header or parameter with the wrong shape."""


class InvalidContext(BadInput):
    """A context outside the grammar of docs/design.md (Contexts)."""

    code = "invalid_context"
    summary = "The context is not valid"


class InvalidDeadline(BadInput):
    """A deadline of a job that is over, too far away, or before another one."""

    code = "invalid_deadline"
    summary = "A deadline of the job is not valid"


class ContextRequired(BadInput):
    """``require_context`` is set and the request has no context."""

    code = "context_required"
    summary = "This service requires an encryption context"


class NotACiphertext(BadInput):
    """The bytes do not begin with an age header line."""

    code = "not_a_ciphertext"
    summary = "Not an age file: the first line is not age-encryption.org/v1"


class TooLarge(BadInput):
    """A body above the limit of a synchronous call. The job API accepts larger ones."""

    code = "too_large"
    summary = "The body is above the limit of this call"


class DecryptFailed(KmsError):
    """Wrong key, wrong or missing context, truncated or modified data, unknown wrap: one answer by design."""

    code = "decrypt_failed"
    summary = "Decryption failed: wrong key, wrong context, or a damaged ciphertext"
    exit_code = EXIT_BAD_DATA


class Unauthenticated(KmsError):
    """A missing or unknown credential. ``reason`` is for metrics and logs, not for the caller.

    ``ends_connection``: the credential belongs to the connection, so no request on it can succeed.
    """

    code = "unauthenticated"
    summary = "A valid credential is required"
    exit_code = EXIT_REFUSED

    def __init__(self, detail: str = "", *, reason: str = "unknown", ends_connection: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.ends_connection = ends_connection


class Refused(KmsError):
    """A request that is valid but not allowed."""

    code = "forbidden"
    summary = "Not allowed"
    exit_code = EXIT_REFUSED


class Forbidden(Refused):
    """An operation that the policy does not allow to this principal."""


class PathRefused(Refused):
    """A path outside the allowed roots, or one that is not a regular file with one link."""

    code = "path_refused"
    summary = "The path is not a plain file under an allowed root"


class ForeignRefused(Refused):
    """A file without the context stanza, for a key that does not accept such files."""

    code = "foreign_refused"
    summary = "The file was not made by this service, and this key does not accept foreign files"


class Missing(KmsError):
    """Something that does not exist, or that this caller may not know of."""

    code = "unknown"
    summary = "Not found"


class UnknownKey(Missing):
    """An unknown key id, or one that this caller may not use: one answer."""

    code = "unknown_key"
    summary = "Unknown key id"


class UnknownJob(Missing):
    """An unknown job, or one of another caller: one answer."""

    code = "unknown_job"
    summary = "Unknown job"


class ResultExpired(Missing):
    """A result that was deleted when it expired."""

    code = "result_expired"
    summary = "The result of this job has expired"


class ResultReleased(ResultExpired):
    """A result that was deleted because its reader released it."""

    code = "result_released"
    summary = "The result of this job was released, and is deleted"


class RecordRefused(KmsError):
    """A stored job, in Redis or in the spool, without the MAC of this service."""

    code = "record_refused"
    summary = (
        "What is stored for this job is not what the service wrote: submit it again, and tell the operator"
    )
    exit_code = EXIT_BAD_DATA


class Conflict(KmsError):
    """A request that the current state does not allow."""

    code = "conflict"
    summary = "Conflict"
    exit_code = EXIT_EXISTS


class IdempotencyConflict(Conflict):
    """An Idempotency-Key that was used with another body."""

    code = "idempotency_conflict"
    summary = "This Idempotency-Key was used with a different request"


class JobNotFinished(Conflict):
    """A job without a result yet."""

    code = "job_not_finished"
    summary = "The job has not finished"


class JobCommitting(Conflict):
    """A cancellation that comes too late: the result is being committed."""

    code = "job_committing"
    summary = "The job is committing its result and can no longer be cancelled"


class JobNotDead(Conflict):
    """A retry of a job that did not end with ``attempts_exhausted`` or ``record_refused``."""

    code = "job_not_dead"
    summary = "Only a job that ended with attempts_exhausted or record_refused can be retried"


class GroupComplete(Conflict):
    """A job for a group that has all its jobs already."""

    code = "group_complete"
    summary = "This group has all its jobs: choose another name, or a larger number from its first job on"


class TargetExists(Conflict):
    """A target that exists, without the request to overwrite it."""

    code = "target_exists"
    summary = "The target exists; set overwrite, or name another"


class RotationRefused(Conflict):
    """A rotation that only one of several hosts would know of."""

    code = "rotation_refused"
    summary = "Several hosts have files of their own for this key: give all the new identity by hand"


class TooManyVersions(RotationRefused):
    """A rotation of a key that has as many versions as can be read with certainty."""

    code = "too_many_versions"
    summary = "This key has as many versions as it may: remove those that no file needs, or use another key"


class DataKeysUnsupported(KmsError):
    """A backend that generates no data keys, unless its settings allow it."""

    code = "data_keys_unsupported"
    summary = "This backend gives no data keys; set `data_keys = true` in its table of kms.toml"


class Unavailable(KmsError):
    """A dependency that does not answer, or has no room. Only errors of this kind are retryable."""

    code = "unavailable"
    summary = "Not available now; try again later"
    exit_code = EXIT_UNAVAILABLE

    def __init__(self, detail: str = "", *, retry_after_s: float = 5.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class BackendUnavailable(Unavailable):
    """A key backend that does not answer, or whose keys cannot be read."""

    code = "backend_unavailable"
    summary = "The key backend is not available"


class JobsUnavailable(Unavailable):
    """Redis or a broker that does not answer."""

    code = "jobs_unavailable"
    summary = "Jobs are not available: Redis does not answer"


class RedisFull(JobsUnavailable):
    """Redis has reached ``maxmemory``: jobs run and end, and none is accepted. Nothing was changed."""

    code = "redis_full"
    summary = "Redis has no memory left: no job is accepted until others expire, or maxmemory is raised"


class RedisReadOnly(JobsUnavailable):
    """Redis takes no writes: it is a replica, has too few replicas, or cannot save. Nothing was changed."""

    code = "redis_read_only"
    summary = "Redis takes no writes: it is a replica, has too few replicas, or cannot save to its disk"


class WrongInstall(JobsUnavailable):
    """A Redis with jobs of another install, or a spool that is not that of its jobs. Nothing was changed."""

    code = "install_mismatch"
    summary = "Redis and the spool belong to different installs"


class DurabilityUnconfirmed(JobsUnavailable):
    """A change of a job that Redis has made, and its replicas did not acknowledge in time.

    It may be lost if Redis fails over now. ``job_id`` is empty for an error that is not about a single job.
    """

    code = "durability_unconfirmed"
    summary = "Replicas of Redis did not acknowledge this in time"

    def __init__(self, detail: str = "", *, job_id: str = "", withdrawn: bool = False) -> None:
        what = "The job was taken back and may still run after a fail-over" if withdrawn else "It may be lost"
        advice = f"{self.summary}. {what}: ask again with the same Idempotency-Key or job id"
        super().__init__(detail or (advice if job_id else ""))
        self.job_id = job_id


class AuditUnavailable(Unavailable):
    """An audit record that could not be written. The result is withheld."""

    code = "audit_unavailable"
    summary = "The audit log cannot be written, so no result is returned"


class SpoolUnavailable(Unavailable):
    """A disk of the spool that failed, or a bucket that does not answer, or refuses.

    Also raised where something else is in the place of a file.
    """

    code = "spool_unavailable"
    summary = "Uploads and results cannot be stored or read now"


class DocumentOutdated(Unavailable):
    """A signed document that is older than one that was seen before, or may be."""

    code = "document_outdated"
    summary = "A signed document is older than one that was seen before"


class RateLimited(Unavailable):
    """Too many requests of the caller."""

    code = "rate_limited"
    summary = "Too many requests"


class TenantShare(RateLimited):
    """A tenant that holds as much of the store of jobs as is left for the others."""

    code = "tenant_share"
    summary = (
        "Your tenant's jobs use as much of the store of jobs as is free for others: wait until records "
        "expire, or release results"
    )


class BodyTimeout(KmsError):
    """A request body that did not arrive in time."""

    code = "body_timeout"
    summary = "The body of the request did not arrive in time"
    exit_code = EXIT_UNAVAILABLE


class SpoolFull(Unavailable):
    """A spool or a target whose disk or quota is full. A job that was accepted waits for room."""

    code = "spool_full"
    summary = "There is no space left for uploads and results"


class SpoolQuota(SpoolFull):
    """A tenant that uses as much of the spool as it may."""

    code = "spool_quota"
    summary = "Your tenant uses as much of the spool as it may: release results, or wait until they expire"


class JobCancelled(KmsError):
    """A job that its owner cancelled."""

    code = "cancelled"
    summary = "The job was cancelled"


class JobExpired(KmsError):
    """A job that had not ended by its ``run_by``."""

    code = "expired"
    summary = "The job expired before it could finish"


class JobNotStarted(JobExpired):
    """A job that no worker had begun by its ``start_by``."""

    code = "not_started"
    summary = "No worker began the job in time, so it did nothing"


class ItemsFailed(KmsError):
    """A job some of whose items or files were refused."""

    code = "items_failed"
    summary = "Items of the job failed"


class AttemptsExhausted(KmsError):
    """A job whose workers died in every attempt."""

    code = "attempts_exhausted"
    summary = "The job used up its attempts"


class ConfigurationError(KmsError):
    """Invalid settings. The process does not start."""

    code = "configuration"
    summary = "The configuration is not valid"
    exit_code = EXIT_CONFIGURATION
