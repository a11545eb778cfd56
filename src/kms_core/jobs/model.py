"""The model of a job: its state, its attempts and how they end. Does not use Redis."""

import base64
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from kms_core.jobs.ends import SignedEnd, Work
from kms_core.jobs.spec import FILES, AnyJob, Seconds
from kms_protocol.errors import KmsError, PathRefused
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
"""Tells some worker that a queue has work. Raises JobsUnavailable."""


class LeaseLost(KmsError):
    """Another attempt holds this job now: stop, and leave no effect."""

    code = "lease_lost"
    summary = "Another worker holds this job"


class CommitGone(PathRefused):
    """A result that was ready has gone: it was in place and others removed it, or it never was."""

    def __init__(self) -> None:
        super().__init__("The result was removed or replaced before it was in place: run the job again")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The visible state of a job: plain fields of its record; those of ``JobSpec.plain`` as sealed.

    Others may have written plain fields, so each has bounds. Nothing in a Job says what to do.

    ``end`` is the verified end of a job that succeeded, or failed with ``items_failed``; its counts are those
    told here. None before the end, and for other ends.
    ``accepted`` is the opened record; None if this service did not seal it. ``released`` is the time from
    which on the result is gone because its reader released it, 0 for never. ``is_replayed``: it answers a
    submission with an Idempotency-Key that was used before.
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
    def progress(self) -> JobProgress:
        """Its counts, as they are told."""
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


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """A target about to appear: with the accepted part, enough for any worker to finish it after a crash.

    ``replaces`` is inode, size in bytes and mtime in ns of the file whose place it takes, where that was the
    job's source: if the name means another file by then, it is left alone.

    Of an object, ``upload`` is the multipart upload, empty where a single write makes it, ``parts`` a digest
    of the parts, and ``over`` the object that may be replaced: none, any (``*``), or the one with this ETag.
    ``mark`` is the object's metadata, by which it is recognised. ``attempt_id`` is the last part of the name
    of its temporary file, or of the note of its upload. ``file_id`` is as in ``SignedEnd``.
    """

    attempt_id: str
    size_bytes: int
    inode: int = 0
    mtime_ns: int = 0
    replaces: tuple[int, int, int] | None = None
    upload: str = ""
    parts: str = ""
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
    record, which binds its commit and checkpoint. ``following``: what its process takes next.
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
    following: "Following | None" = field(default=None, compare=False)

    def end(self, state: JobState, error: str, work: Work, kept_until: float) -> SignedEnd:
        """The outcome of this attempt, to be signed; its record is kept until ``kept_until``."""
        job = self.accepted
        return SignedEnd(
            fence=self.fence,
            attempt=self.attempt,
            attempt_id=self.attempt_id,
            state=state,
            error=error,
            items=job.items,
            items_done=work.items_done,
            items_failed=work.items_failed,
            size_bytes=job.size_bytes,
            bytes_done=work.bytes_done,
            tallies=dict(work.tallies),
            failures=tuple(work.failures),
            target=work.target,
            result_digest=work.result_digest,
            file_id=work.file_id,
            kept_until=kept_until,
        )


@dataclass
class Following:
    """The job that a process takes after another: claimed as that ends, if ``is_wanted`` says so then.

    ``queues``: the first comes first. ``claimed``: what the store answered, or nothing yet.
    """

    worker: str
    queues: Sequence[str]
    is_wanted: Callable[[], bool]
    claimed: "list[Attempt | str | None]" = field(default_factory=list)
