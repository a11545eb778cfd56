"""The model of a job: its state, its attempts, how they end, and its sealed record. Does not use Redis."""

import base64
import hmac
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from msgspec import Meta

from kms_core.age.header import hkdf
from kms_core.jobs.spec import (
    FILES,
    AnyJob,
    JobSpec,
    PlacedTarget,
    RecordTooNew,
    Seconds,
    SignedEnd,
    SignedSplit,
    WorkResult,
    WorkSummary,
    check_needs,
    unreadable_error,
)
from kms_protocol.errors import KmsError, PathRefused, UnknownJob
from kms_protocol.wire import ENDED, JobKind, JobProgress, JobState, Priority

EXHAUSTED: Final = "attempts_exhausted"
REFUSED: Final = "record_refused"
DEAD: Final = frozenset({EXHAUSTED, REFUSED})
"""Errors of dead jobs: their workers died, or their record was changed."""

_PARTS: Final = uuid.UUID("6f1f3c4e-0d0a-5c0b-9a57-6b6d732d7061")  # a namespace of our own (RFC 9562 §5.5)

MOST: Final = 2**53
"""Above it a number of Redis's scripts is not exact."""
Count = Annotated[int, Meta(ge=0, le=MOST)]
Feature = Annotated[str, Meta(max_length=80)]
"""A feature that a job needs, and that newer workers have."""
Code = Annotated[str, Meta(pattern=r"^[a-z0-9_]{0,64}\Z")]
QueuePriority = tuple[str, Priority]
"""A queue, and the priority within it."""


NotifyWorker = Callable[[str], None]
"""Wakes a worker for a queue that has work. Raises JobsUnavailable."""


class LeaseLost(KmsError):
    """Another attempt holds this job now: stop, and leave no effect."""

    code = "lease_lost"
    summary = "Another worker holds this job"


class CommitGone(PathRefused):
    """A result that was ready has gone: it was in place and others removed it, or it never was."""

    def __init__(self) -> None:
        super().__init__("The result was removed or replaced before it was in place: run the job again")


class PastAttempt(msgspec.Struct, frozen=True, array_like=True):
    """Attempts that ended before the job did, as the scripts note them in its record.

    ``how``: ``lease_lost``, ``deferred``, ``stalled``, or ``retried`` for the end that a retry undid.
    ``cause`` is a code, or how a process ended (``signal_9``, ``status_1``, ``worker_gone``), or empty. So
    many ``times`` in a row, the first from ``began_at`` on, the last until ``ended_at`` (in seconds since the
    epoch). ``is_part`` is 1 for attempts at a part of the job.
    """

    number: Count
    how: Code
    cause: Code
    times: Count
    began_at: Seconds
    ended_at: Seconds
    worker: str
    is_part: Count


_decode_past: Final = msgspec.json.Decoder(PastAttempt).decode_lines
_MOST_PAST_BYTES: Final = 3200  # as the scripts write at most


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The visible state of a job: plain fields of its record; those of ``JobSpec.plain`` as sealed.

    Others may have written plain fields, so each has bounds. Nothing in a Job says what to do.

    ``end`` is the verified end of a job that succeeded, or failed with ``items_failed``; its counts are those
    of this Job. None before the end, and for other ends.
    ``accepted`` is the opened record; None if this service did not seal it. ``released`` is the time from
    which on the result is gone because its reader released it, 0 for never. ``worker`` made the last attempt:
    ``host:id/pid``. That began at ``began_at``, or at ``started_at`` if this is 0, and its ``attempt_id`` is
    empty once it has ended without the job; ``history`` has a line for each before it (``past``).
    ``is_replayed``: it answers a submission with an Idempotency-Key that was used before.
    """

    job_id: str
    tenant: str
    kind: JobKind
    state: JobState
    queue: str = FILES
    priority: Priority = "normal"
    attempt: Count = 0
    attempt_id: Code = ""
    fence: Count = 0
    generation: Count = 0
    items: Count = 0
    items_done: Count = 0
    items_failed: Count = 0
    bytes: Count = 0
    bytes_done: Count = 0
    created_at: Seconds = 0.0
    expires_at: Seconds = 0.0
    start_by: Seconds = 0.0
    run_by: Seconds = 0.0
    not_before: Seconds = 0.0
    started_at: Seconds = 0.0
    ended_at: Seconds = 0.0
    released: Seconds = 0.0
    cancel: Count = 0
    error: Code = ""
    waits_for: Feature = ""
    worker: Annotated[str, Meta(max_length=600)] = ""
    began_at: Seconds = 0.0
    history: Annotated[str, Meta(max_length=_MOST_PAST_BYTES)] = ""
    purged: Count = 0
    parts: Count = 0
    parts_left: Count = 0
    parent: str = ""
    campaign: Literal["", "dry", "wet"] = ""
    tallies: dict[str, Count] = {}
    end: SignedEnd | None = None
    accepted: AnyJob | None = None
    is_replayed: bool = False

    @property
    def past(self) -> list[PastAttempt]:
        """Earlier attempts, oldest first; none where others wrote what is no history."""
        with suppress(msgspec.DecodeError):
            return _decode_past(self.history)
        return []

    @property
    def progress(self) -> JobProgress:
        """Its counts, as reported to clients."""
        return JobProgress(
            items=self.items,
            items_done=self.items_done,
            items_failed=self.items_failed,
            bytes=self.bytes,
            bytes_done=self.bytes_done,
        )

    @property
    def labels(self) -> Mapping[str, str]:
        """Labels of the submitter; none of a record that this service did not seal."""
        return self.accepted.labels if self.accepted else {}

    @property
    def result_attempt(self) -> str:
        """The last part of the names of its result in the spool."""
        return self.end.attempt_id if self.end else ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def parts_ended(self) -> bool:
        """Return whether all its parts have ended, and it is to be ended by a worker."""
        return not self.ended and self.parts > 0 and self.parts_left <= 0


class Commit(PlacedTarget, frozen=True, kw_only=True, omit_defaults=False):
    """A target about to appear: with the accepted part, enough for any worker to finish it after a crash.

    ``replaces`` is inode, size in bytes and mtime in ns of the file whose place it takes, where that was the
    job's source: if the name means another file by then, it is left alone.

    Of an object, ``upload`` is the multipart upload, empty where a single write makes it, ``parts`` a digest
    of the parts, and ``over`` the object that may be replaced: none, any (``*``), or the one with this ETag.
    ``mark`` is the object's metadata, by which it is recognised. ``attempt_id`` is the last part of the name
    of its temporary file, or of the note of its upload. ``file_id`` is as in ``SignedEnd``.
    """

    attempt_id: str
    replaces: tuple[int, int, int] | None = None
    upload: str = ""
    over: str = ""
    mark: str = ""
    file_id: str = ""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a part of a job over many files: enough for any worker to continue after a crash.

    ``outcomes`` are indices into ``words``, one for each file that is settled, in order. ``pending`` is the
    commit of the file after those, which ends as ``effect`` once it is in place.
    """

    words: tuple[str, ...] = ()
    outcomes: tuple[int, ...] = ()
    pending: Commit | None = None
    effect: str = ""

    @property
    def settled(self) -> list[str]:
        return [self.words[at] for at in self.outcomes]

    def adding(self, word: str) -> "Checkpoint":
        """The log with one more file settled, and nothing pending."""
        words = self.words if word in self.words else (*self.words, word)
        return Checkpoint(words=words, outcomes=(*self.outcomes, words.index(word)))


def new_attempt_id() -> str:
    """Return 128 random bits as 26 letters and digits (RFC 4648 base32, lower case)."""
    return base64.b32encode(os.urandom(16)).decode().rstrip("=").lower()


def part_id(job_id: str, number: int) -> str:
    """The id of a part: the same for every process that splits the job."""
    return str(uuid.uuid5(_PARTS, f"{job_id}/{number}"))


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a job: the accepted part, unsealed, and the random id that makes its effects count.

    Two attempts never have the same ``attempt_id``, also after Redis has gone back in time. ``fence`` is the
    number of claims so far. ``is_large``: it was claimed as a large job. ``spec`` is the digest of the sealed
    record, which binds its commit and checkpoint. ``small_input``: its sealed input, if that rests in Redis.
    ``following``: what its process takes next.
    """

    accepted: AnyJob
    worker: str
    attempt_id: str
    fence: int
    attempt: int
    waited_s: float
    deferrals: int
    is_large: bool = False
    commit: Commit | None = field(default=None)
    log: Checkpoint = field(default_factory=Checkpoint)
    spec: bytes = b""
    small_input: bytes | None = field(default=None, repr=False)
    following: "Following | None" = field(default=None, compare=False)

    def end(self, state: JobState, error: str, result: WorkResult, kept_until: float) -> SignedEnd:
        """The outcome of this attempt, to be signed; its record is kept until ``kept_until``."""
        return SignedEnd(
            fence=self.fence,
            attempt=self.attempt,
            attempt_id=self.attempt_id,
            state=state,
            error=error,
            items=self.accepted.items,
            size_bytes=self.accepted.size_bytes,
            kept_until=kept_until,
            **{name: getattr(result, name) for name in WorkSummary.__struct_fields__},
        )


@dataclass
class Following:
    """The job that a process takes after another: claimed as that ends, if ``is_wanted`` says so then.

    ``queues``: the first comes first. ``claimed``: the attempt id of the claim and the answer of the store,
    for ``AttemptStore.found_by``, or nothing yet.
    """

    worker: str
    queues: Sequence[str]
    is_wanted: Callable[[], bool]
    claimed: list[tuple[str, Sequence[bytes]]] = field(default_factory=list)


_decode: Final[Callable[[bytes], AnyJob]] = msgspec.msgpack.Decoder(AnyJob).decode
_VERSION: Final = b"\x01"
_VERSIONS: Final = 16  # as in the scripts: other bytes are no version
Bound = Commit | Checkpoint | SignedEnd | SignedSplit
"""Structs that rest in Redis behind a MAC, beside the sealed record that they belong to."""
_Bound = TypeVar("_Bound", bound=Bound)
_LABELS: Final[dict[type, bytes]] = {
    Commit: b"commit",
    Checkpoint: b"log",
    SignedEnd: b"end",
    SignedSplit: b"split",
}
_TAG_BYTES: Final = 32
_SALT_BYTES: Final = 32
_ZERO_NONCE: Final = bytes(12)
_RECORD_INFO: Final = b"kms-service/job-record/1"
_DIGEST_INFO: Final = b"kms-service/job-digest/1"


class RecordKey:
    """AEAD under keys that Redis never holds: one fresh key per record, derived by a random 32-byte salt."""

    def __init__(self, secrets: tuple[bytes, ...]) -> None:
        """``secrets`` are 32 bytes each, newest last: the newest seals, all open."""
        self._secrets = secrets
        self._digest_key = hkdf(secrets[0], salt=b"", info=_DIGEST_INFO)

    def seal(self, accepted: JobSpec) -> bytes:
        return self.seal_as(_RECORD_INFO, accepted.job_id.encode(), msgspec.msgpack.encode(accepted))

    def open(self, job_id: str, sealed: bytes) -> AnyJob:
        """The record. UnknownJob if it was not sealed here for this job id, RecordTooNew if a newer one."""
        if sealed[:1] > _VERSION and sealed[0] < _VERSIONS:
            raise RecordTooNew(f"record-{sealed[0]}")
        plain = self.open_as(_RECORD_INFO, job_id.encode(), sealed)
        if plain is None:
            raise UnknownJob("The record of this job was not written by this service")
        try:
            return check_needs(_decode(plain))
        except msgspec.ValidationError as exc:
            raise unreadable_error(msgspec.msgpack.decode(plain)) from exc

    def seal_as(self, info: bytes, name: bytes, plain: bytes) -> bytes:
        """Seal a record of another kind, which ``info`` names, to be opened under this name only."""
        salt = os.urandom(_SALT_BYTES)
        cipher = ChaCha20Poly1305(hkdf(self._secrets[-1], salt=salt, info=info))
        return _VERSION + salt + cipher.encrypt(_ZERO_NONCE, plain, name)

    def open_as(self, info: bytes, name: bytes, sealed: bytes) -> bytes | None:
        """The content of a record; None if it was not sealed here as one of this kind and name."""
        salt, body = sealed[1 : 1 + _SALT_BYTES], sealed[1 + _SALT_BYTES :]
        for secret in reversed(self._secrets):
            with suppress(InvalidTag, ValueError):
                return ChaCha20Poly1305(hkdf(secret, salt=salt, info=info)).decrypt(_ZERO_NONCE, body, name)
        return None

    def derived(self, info: bytes) -> bytes:
        """A key for another use, of the oldest secret: hosts that have not got a new one yet have it too."""
        return hkdf(self._secrets[0], salt=b"", info=info)

    def sign(self, job_id: str, bound: Bound, spec: bytes) -> bytes:
        """A MAC and the struct as it rests in Redis: write access to Redis cannot forge one.

        ``spec`` is the digest of the sealed record, so that it counts for no other record of this id.
        """
        body = msgspec.msgpack.encode(bound)
        return self._tag(type(bound), job_id, spec, body) + body

    def verified(self, kind: type[_Bound], job_id: str, signed: bytes, spec: bytes) -> _Bound:
        """A struct that was signed. UnknownJob if not as this kind, for this job id and sealed record."""
        tag, body = signed[:_TAG_BYTES], signed[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(kind, job_id, spec, body)):
            raise UnknownJob("A record of this job was not written by this service")
        return msgspec.msgpack.decode(body, type=kind)

    def _tag(self, kind: type, job_id: str, spec: bytes, body: bytes) -> bytes:
        return self.digest(_LABELS[kind], job_id.encode(), spec, body)

    def digest(self, *parts: bytes) -> bytes:
        """A keyed digest of 32 bytes: a plain one of a short secret could be guessed."""
        return self.hasher(*parts).digest()

    def hasher(self, *parts: bytes) -> "hmac.HMAC":
        """A digest of a body that arrives in pieces."""
        hasher = hmac.new(self._digest_key, digestmod="sha256")
        for part in parts:
            hasher.update(len(part).to_bytes(8, "big") + part)
        return hasher
