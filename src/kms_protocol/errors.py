"""Every error a caller can meet, as one tree; knows no HTTP (see kms_api/errors/problems.py for statuses).

KmsError
├── BadInput            the caller can mend the request
│   ├── InvalidRequest · InvalidContext · ContextRequired · NotACiphertext · TooLarge
├── DecryptFailed       wrong key, wrong context, cut, tampered: one answer for every cause
├── Unauthenticated
├── Refused             Forbidden · PathRefused · ForeignRefused
├── Missing             UnknownKey · UnknownJob · ResultExpired
├── RecordRefused       what is stored for a job is not what this service wrote
├── Conflict            IdempotencyConflict · JobNotFinished · JobCommitting · JobNotDead · TargetExists
├── DataKeysUnsupported
├── BodyTimeout         the sender was too slow
├── Unavailable         the only retryable kind: BackendUnavailable · JobsUnavailable · AuditUnavailable
│                       · RateLimited
├── SpoolFull
├── JobCancelled · JobExpired    ends of a job that are nobody's fault
└── ConfigurationError  at start only

``code`` is API and never changes; the text is for people and may. ``exit_code`` is what the ``kms``
command returns (sysexits.h).
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
    """An error with a stable ``code``. Its text never holds plaintext, keys, tokens or context values."""

    code: ClassVar[str] = "internal"
    summary: ClassVar[str] = "Something went wrong in the service"
    exit_code: ClassVar[int] = EXIT_OTHER

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail or self.summary)
        self.detail = detail or self.summary


class BadInput(KmsError):
    """The request itself is wrong; sending it again unchanged fails again."""

    code = "invalid_request"
    summary = "The request is not valid"
    exit_code = EXIT_BAD_DATA


class InvalidRequest(BadInput):
    """A body, header or parameter of the wrong shape."""


class InvalidContext(BadInput):
    """A context that DESIGN §4's grammar does not allow."""

    code = "invalid_context"
    summary = "The context is not valid"


class ContextRequired(BadInput):
    """``require_context`` is on and none was given."""

    code = "context_required"
    summary = "This service requires an encryption context"


class NotACiphertext(BadInput):
    """The bytes do not begin with an age header line."""

    code = "not_a_ciphertext"
    summary = "Not an age file: the first line is not age-encryption.org/v1"


class TooLarge(BadInput):
    """Above a limit of the synchronous path; the job API takes more."""

    code = "too_large"
    summary = "The body is above the limit of this call"


class DecryptFailed(KmsError):
    """Wrong key, wrong or missing context, cut, tampered or unknown wrap: deliberately one answer."""

    code = "decrypt_failed"
    summary = "Decryption failed: wrong key, wrong context, or a damaged ciphertext"
    exit_code = EXIT_BAD_DATA


class Unauthenticated(KmsError):
    """No credential, or one that is not known. ``reason`` is for metrics and logs, not for the caller.

    ``ends_connection``: the credential is that of the connection, and no request on it can succeed.
    """

    code = "unauthenticated"
    summary = "A valid credential is required"
    exit_code = EXIT_REFUSED

    def __init__(self, detail: str = "", *, reason: str = "unknown", ends_connection: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.ends_connection = ends_connection


class Refused(KmsError):
    """Understood, and not allowed."""

    code = "forbidden"
    summary = "Not allowed"
    exit_code = EXIT_REFUSED


class Forbidden(Refused):
    """Policy does not allow this principal to do this."""


class PathRefused(Refused):
    """A path outside the allowed roots, or not a plain file with one link."""

    code = "path_refused"
    summary = "The path is not a plain file under an allowed root"


class ForeignRefused(Refused):
    """A file without our context stanza, where the key does not accept such files."""

    code = "foreign_refused"
    summary = "The file was not made by this service, and this key does not accept foreign files"


class Missing(KmsError):
    """What was named is not there, or is not for this caller."""

    code = "unknown"
    summary = "Not found"


class UnknownKey(Missing):
    """No such key id, or not for this caller: one answer."""

    code = "unknown_key"
    summary = "Unknown key id"


class UnknownJob(Missing):
    """No such job, or not this caller's: one answer."""

    code = "unknown_job"
    summary = "Unknown job"


class ResultExpired(Missing):
    """The result was deleted at its expiry."""

    code = "result_expired"
    summary = "The result of this job has expired"


class RecordRefused(KmsError):
    """What is stored for a job, in Redis or in the spool, does not carry this service's MAC."""

    code = "record_refused"
    summary = (
        "What is stored for this job is not what the service wrote: submit it again, and tell the operator"
    )
    exit_code = EXIT_BAD_DATA


class Conflict(KmsError):
    """The state of things does not allow this now."""

    code = "conflict"
    summary = "Conflict"
    exit_code = EXIT_EXISTS


class IdempotencyConflict(Conflict):
    """The key was used with another body."""

    code = "idempotency_conflict"
    summary = "This Idempotency-Key was used with a different request"


class JobNotFinished(Conflict):
    """The result is not there yet."""

    code = "job_not_finished"
    summary = "The job has not finished"


class JobCommitting(Conflict):
    """Too late to cancel: the result is being put in place."""

    code = "job_committing"
    summary = "The job is committing its result and can no longer be cancelled"


class JobNotDead(Conflict):
    """Only a dead letter (``attempts_exhausted``, ``record_refused``) can be retried."""

    code = "job_not_dead"
    summary = "Only a dead letter can be retried: a job that ended with attempts_exhausted or record_refused"


class TargetExists(Conflict):
    """The target is there and overwriting was not asked for."""

    code = "target_exists"
    summary = "The target exists; ask for overwriting, or name another"


class DataKeysUnsupported(KmsError):
    """The backend hands out no data keys, unless its settings say so."""

    code = "data_keys_unsupported"
    summary = "This backend hands out no data keys; set data_keys = true in its section to allow them"


class Unavailable(KmsError):
    """Something we need does not answer. The only retryable kind."""

    code = "unavailable"
    summary = "Not available now; try again later"
    exit_code = EXIT_UNAVAILABLE

    def __init__(self, detail: str = "", *, retry_after_s: float = 5.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class BackendUnavailable(Unavailable):
    """The key backend does not answer, or its keys cannot be read."""

    code = "backend_unavailable"
    summary = "The key backend is not available"


class JobsUnavailable(Unavailable):
    """Redis or the broker does not answer."""

    code = "jobs_unavailable"
    summary = "Jobs are not available: Redis does not answer"


class AuditUnavailable(Unavailable):
    """The audit record could not be written, so the result is withheld."""

    code = "audit_unavailable"
    summary = "The audit trail cannot be written, so nothing is answered"


class RateLimited(Unavailable):
    """Too many calls for now."""

    code = "rate_limited"
    summary = "Too many requests"


class BodyTimeout(KmsError):
    """The body of a request did not arrive within its time, or stopped arriving."""

    code = "body_timeout"
    summary = "The body of the request did not arrive in time"
    exit_code = EXIT_UNAVAILABLE


class SpoolFull(KmsError):
    """The disk or quota of the spool is used up."""

    code = "spool_full"
    summary = "The spool has no room for this"
    exit_code = EXIT_UNAVAILABLE


class JobCancelled(KmsError):
    """The job was cancelled by its owner."""

    code = "cancelled"
    summary = "The job was cancelled"


class JobExpired(KmsError):
    """The job's time ran out before it ended."""

    code = "expired"
    summary = "The job expired before it could finish"


class ConfigurationError(KmsError):
    """Wrong settings: the process refuses to start."""

    code = "configuration"
    summary = "The configuration is not valid"
    exit_code = EXIT_CONFIGURATION
