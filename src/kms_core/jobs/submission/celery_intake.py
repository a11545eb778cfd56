"""The intake: sealed messages of workflows that have no HTTP become jobs (docs/celery.md).

A message is an age file to the intake recipient, made by any age tool. The recipient is public, so a message
proves nothing about who sent it: the token in it does. Where callers are not authenticated, write access
to the broker may submit, as principal ``celery``.
"""

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from kms_core import audit
from kms_core.age import header, stream
from kms_core.age.header import SYNC_LIMITS
from kms_core.age.recipients import Recipient, key_lines, parse_identity
from kms_core.auth.authenticator import Authenticator
from kms_core.auth.policy import Principal
from kms_core.backends.age import AgeBackend
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.jobs.submission.submitter import JSON_BYTES, JobSubmitter, SubmissionOptions
from kms_core.observability import metrics
from kms_protocol import small_files, wire
from kms_protocol.errors import (
    BackendUnavailable,
    DecryptFailed,
    IdempotencyConflict,
    InvalidRequest,
    JobExpired,
    JobsUnavailable,
    TooLarge,
    Unauthenticated,
    UnknownKey,
)

VERSION: Final = 1
LONGEST_S: Final = 24 * 3600
_WHO: Final = Principal("celery")
_LOCK_S: Final = 120.0  # far above the time that the largest message takes to reach the spool
_SKEW_S: Final = 60
_DIGEST_LABEL: Final = b"kms.submit"
_encode: Final = msgspec.json.Encoder(order="sorted").encode
# A UUID (RFC 9562) in lower case. Version 5 is reserved for the parts of a job.
JobId = Annotated[
    str,
    msgspec.Meta(
        pattern="^[0-9a-f]{8}-[0-9a-f]{4}-[1-46-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$",
        max_length=36,  # without it, $ accepts a line feed at the end
    ),
]


class Submission(wire.Body, frozen=True, kw_only=True):
    """Content of a ``kms.submit`` message (docs/celery.md): a job, its id and an expiry time.

    The submitter chooses the id; a replayed message starts no second job. ``token`` is an API token or a JWT.
    It is null if requests are not authenticated.
    """

    version: Literal[1]
    token: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    job_id: JobId
    expires_at: wire.Moment
    job: wire.JobIn


_decode: Final = msgspec.json.Decoder(Submission).decode


class Intake:
    """Opens messages with the intake identity and submits their jobs."""

    def __init__(
        self, key: AgeBackend, submitter: JobSubmitter, authenticator: Authenticator | None = None
    ) -> None:
        """``authenticator`` None: callers are not authenticated, and a token is not looked at."""
        self._key = key
        self._submitter = submitter
        self._authenticator = authenticator

    @property
    def text_length(self) -> int:
        """The most characters that a message has."""
        longest = SYNC_LIMITS.header_bytes + header.NONCE_BYTES + stream.sealed_size(JSON_BYTES)
        return (longest + 2) // 3 * 4

    def accept(self, message: object, worker: str) -> str:
        """Take the job in a message; the answer is its id, which its submitter chose.

        Taking it again changes nothing, and is on record. Raises Unavailable where trying again may help;
        any other KmsError is final: DecryptFailed, NotACiphertext, TooLarge, InvalidRequest, JobExpired,
        Unauthenticated, IdempotencyConflict for another job of this id, and the errors of the submitter.
        """
        asked = self._read(message)
        store = self._submitter.store
        digest = store.record_key.digest(_DIGEST_LABEL, _encode(_given(asked.job)))
        with audit.identified(asked.job_id):
            who = self._who(asked)
            if self._is_taken(asked.job_id, digest, who):
                return asked.job_id
            if not store.lock(f"submit:{asked.job_id}", worker, _LOCK_S):
                raise JobsUnavailable("Another worker has this message in hand", retry_after_s=1.0)
            if not self._is_taken(asked.job_id, digest, who):  # under the lock, or two would write the spool
                self._submitter.submit(self._options(asked, digest, who))
        return asked.job_id

    def _who(self, asked: Submission) -> Principal:
        if self._authenticator is None:
            return _WHO
        try:
            who = self._authenticator.principal(asked.token or "")
        except Unauthenticated as exc:
            metrics.AUTH_FAILURES.labels(exc.reason).inc()
            raise
        self._submitter.require(who, "jobs:write")
        return who

    def _read(self, message: object) -> Submission:
        """Open, decode and judge a message by itself; its values are in no error's text."""
        if not isinstance(message, str):
            raise InvalidRequest("The one argument of kms.submit is the base64 text of an age file")
        if len(message) > self.text_length:
            raise TooLarge(f"The message is above {self.text_length} characters")
        try:
            asked = _decode(self._open(msgspec.convert(message, bytes)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise InvalidRequest("The message is not base64, or holds no kms.submit of version 1") from None
        left_s = _left_s(asked)
        if left_s <= 0:
            raise JobExpired("The message expired before a worker took it")
        if left_s > LONGEST_S:
            raise InvalidRequest("expires_at is more than 24 hours ahead")
        return asked

    def _open(self, sealed: bytes) -> bytes:
        """The JSON in a foreign age file; the identities are tried from the current one on."""
        head = header.parse(sealed, SYNC_LIMITS)
        if binding.read(head.stanzas) is not None:  # a ciphertext of this service is no message
            raise DecryptFailed
        if stream.plaintext_size(len(sealed) - head.payload_offset) > JSON_BYTES:
            raise TooLarge(f"The message is above {JSON_BYTES} bytes of JSON")
        versions = reversed(self._key.versions())
        keys = [KeyRef(_WHO.tenant, "intake", version.version, self._key.name) for version in versions]
        file_key, _ = sealing.foreign_file_key(head, self._key, keys)
        return sealing.open_(sealed, head, file_key)

    def _is_taken(self, job_id: str, digest: bytes, who: Principal) -> bool:
        store = self._submitter.store
        if not store.exists(job_id):
            return False
        before = store.accepted(job_id)
        if (before.tenant, before.digest) != (who.tenant, digest):
            raise IdempotencyConflict("A different job has this job_id: choose a new one for each job")
        self._submitter.record_replay(who, job_id)  # who stored the job may have died before its record
        return True

    def _options(self, asked: Submission, digest: bytes, who: Principal) -> SubmissionOptions:
        """The options of a message's job, whose record is kept until the message has expired.

        ``keep_for`` or ``ttl_s`` is raised as needed: without the record, a replay would run the job again.
        """
        job, result_ttl_s = asked.job, self._submitter.store.rules.result_ttl_s
        needed_s = math.ceil(_left_s(asked)) + _SKEW_S - result_ttl_s
        kept = {"keep_for": max(job.keep_for or result_ttl_s, needed_s)}
        if job.ttl_s:
            kept = {"ttl_s": max(job.ttl_s, needed_s)}
        options = SubmissionOptions.of(who, msgspec.structs.replace(job, **kept))
        return replace(options, job_id=asked.job_id, digest=digest)


def recipient(path: Path) -> Recipient:
    """The recipient to seal messages to: that of the last identity in the file, which is not kept in memory.

    Raises UnknownKey if there is no file, BackendUnavailable if it cannot be read or holds no identity.
    """
    try:
        _, last = key_lines(small_files.text(path))[-1]
        return parse_identity(last).recipient
    except FileNotFoundError:
        raise UnknownKey("This service has no intake key, so it takes no kms.submit messages") from None
    except (OSError, ValueError, IndexError) as exc:
        raise BackendUnavailable("The intake key cannot be read") from exc


def _given(job: wire.JobIn) -> dict[str, object]:
    """The fields that a job sets. Missing fields and those of later versions do not count."""
    return {name: value for name, value in msgspec.structs.asdict(job).items() if value is not None}


def _left_s(asked: Submission) -> float:
    return (asked.expires_at - datetime.now(UTC)).total_seconds()
