"""What a job is: the part that was accepted and never changes, and the part that moves. Knows no Redis."""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, Protocol

import msgspec
from msgspec import Meta

from kms_core.auth.policy import Grant, Principal
from kms_core.jobs.ends import CLOCK_LEEWAY_S, SignedEnd, Work
from kms_core.jobs.file_patterns import is_tree
from kms_protocol.context import Context
from kms_protocol.errors import JobExpired, KmsError, Unavailable
from kms_protocol.wire import ENDED, JobKind, JobState, Priority

BULK: Final = "kms.bulk"
FILES: Final = "kms.files"
MAINTENANCE: Final = "kms.maintenance"
QUEUES: Final = (BULK, FILES, MAINTENANCE)
"""Queues by what a job costs, so that a worker may serve some of them: items, payloads, headers."""
MOVING: Final[frozenset[JobKind]] = frozenset({"rewrap", "reseal"})
"""Kinds that make one ciphertext of another."""
EXHAUSTED: Final = "attempts_exhausted"
REFUSED: Final = "record_refused"
DEAD: Final = frozenset({EXHAUSTED, REFUSED})
"""How dead letters failed: their workers died, or their record is not as it was written."""

REDIS_STEPS: Final[Mapping[Priority, tuple[int, ...]]] = {"high": (0,), "normal": (3,), "low": (6, 9)}
"""What kombu calls a priority on Redis: it keeps a list for each step, and takes from the lowest first."""
AMQP_RANKS: Final[Mapping[Priority, int]] = {"high": 9, "normal": 4, "low": 1}
"""The same for RabbitMQ: the highest comes first. Quorum queues know two kinds, up to 4 and from 5 on."""

_PARTS: Final = uuid.UUID("6f1f3c4e-0d0a-5c0b-9a57-6b6d732d7061")  # a namespace of our own (RFC 9562 §5.5)

SWEPT: Final = 100
"""Attempts whose leftovers are looked for, of each file: those before the newest. In Redis any fence may
stand, and each attempt removes what those before it left."""

MOST: Final = 2**53
"""Above it a number of Redis's scripts is not exact."""
Count = Annotated[int, Meta(ge=0, le=MOST)]
Seconds = Annotated[float, Meta(ge=0, lt=1e11)]
"""Since the epoch; no NaN, and what a date can show."""
Code = Annotated[str, Meta(pattern=r"^[a-z0-9_]{0,64}\Z")]
QueuePriority = tuple[str, Priority]
"""Where a job waits: a queue, and the priority within it."""
Fields = Mapping[str, str | int | float | bytes]


class NotifyWorker(Protocol):
    """Tells some worker of the queue that a job waits. Raises JobsUnavailable."""

    def __call__(self, job_id: str, queue: str, priority: Priority, /) -> None: ...


class LeaseLost(KmsError):
    """Another attempt holds this job now: stop, and leave no effect."""

    code = "lease_lost"
    summary = "Another worker holds this job"


class ClocksApart(Unavailable):
    """By this machine's clock the job has expired, by Redis's it has not: leave it to another worker."""

    code = "clocks_apart"
    summary = "The clocks of this machine and of Redis differ"


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the service promised to do. Rests in Redis sealed as one blob; workers act on this alone.

    ``source`` is ``upload``, ``items`` (both in the spool) or a URL, which may name many files (``trees``);
    ``target`` is empty or a URL. ``starts`` says where in the items each part of some hundred begins; a job
    that is such a part names its ``parent`` and its number. A part of a job over many files has those lines
    of the listing ``manifest`` (the fence of the attempt that made it) that lie between its two ``starts``,
    from the ``first`` on. ``input_ref`` names the blob that it reads, be it upload, items or listing, as it
    was written (``BlobWriter.ref``). ``callback`` names a webhook endpoint of the settings. ``signed_end``
    says that it ends with a ``SignedEnd``. Records of 0.1 lack both. ``idempotency`` is the keyed digest (32
    bytes) of the Idempotency-Key's scope that it was submitted with; empty without a key, and in records of
    earlier versions. Times are seconds since the epoch.
    """

    job_id: str
    tenant: str
    principal: str
    credential: str
    kind: JobKind
    source: str
    target: str = ""
    overwrite: bool = False
    key_id: str | None = None
    context: tuple[tuple[str, str], ...] = ()
    new_context: tuple[tuple[str, str], ...] | None = None
    items: int = 0
    size_bytes: int = 0
    starts: tuple[int, ...] = ()
    parent: str = ""
    part: int = 0
    first: int = 0
    manifest: int = 0
    input_ref: bytes = b""
    dry_run: bool = False
    rate_per_s: float = 0.0
    priority: Priority = "normal"
    callback: str = ""
    scopes: tuple[str, ...] = ()
    authorized_until: float = 0.0
    request_id: str = ""
    traceparent: str = ""
    digest: bytes = b""
    idempotency: bytes = b""
    signed_end: bool = False
    created_at: float
    expires_at: float

    @property
    def is_expired(self) -> bool:
        """Whether it has expired by the clock of this machine, with some leeway."""
        return time.time() > self.expires_at + CLOCK_LEEWAY_S

    def check_expiry(self, redis_now: Callable[[], float]) -> None:
        """Raise JobExpired if nothing may be put in place for it any more.

        ClocksApart if only this machine's clock says so: a job is not lost because of a clock that is wrong.
        """
        if self.is_expired:
            raise JobExpired if redis_now() > self.expires_at else ClocksApart

    def __repr__(self) -> str:
        return f"Accepted({self.job_id}, {self.kind})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("job_id", self.job_id)]

    @property
    def owner(self) -> str:
        """The job that the submitter knows: itself, or the whole that it is a part of."""
        return self.parent or self.job_id

    @property
    def is_tree(self) -> bool:
        """Whether the source names many files; so it does in the parts of such a job."""
        return is_tree(self.source)

    @property
    def is_campaign(self) -> bool:
        """Whether it moves many files to the newest version of their key, and reports on that."""
        return self.is_tree and self.kind in MOVING

    @property
    def in_place(self) -> bool:
        """Whether the result takes the place of its source."""
        return self.target == self.source

    @property
    def queue(self) -> str:
        if self.kind == "rewrap":
            return MAINTENANCE
        return BULK if self.items and not self.is_tree else FILES

    @property
    def lane(self) -> QueuePriority:
        return self.queue, self.priority

    @property
    def who(self) -> Principal:
        """The submitter. Scopes rest here for a JWT alone, which nobody could look up when the job runs."""
        grant = Grant(self.scopes, self.authorized_until) if self.authorized_until else None
        files = (self.source, self.target) if "://" in self.source else ("", "")
        return Principal(self.principal, self.tenant, self.credential, grant, *files)

    @property
    def spooled_bytes(self) -> int:
        """What it was accepted with, unless that is elsewhere; results are about as large again."""
        return 0 if "://" in self.source else self.size_bytes

    @property
    def work_bytes(self) -> int:
        """Bytes that a worker reads for it; 0 where it reads headers only, or cuts the job into parts."""
        uploaded_header = self.source == "upload" and self.kind != "decrypt"
        will_be_cut = not self.parent and (self.is_tree or len(self.starts) > 1)
        return 0 if self.dry_run or uploaded_header or will_be_cut else self.size_bytes

    @property
    def plain(self) -> Fields:
        """What Redis is told of it in the clear, under the names of ``Job``."""
        found: Fields = {
            "tenant": self.tenant,
            "kind": self.kind,
            "queue": self.queue,
            "priority": self.priority,
            "items": self.items,
            "bytes": self.size_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
        }
        return {**found, "campaign": "dry" if self.dry_run else "wet"} if self.is_campaign else found

    @property
    def bound_context(self) -> Context:
        return Context(self.context)

    @property
    def new_bound_context(self) -> Context | None:
        return None if self.new_context is None else Context(self.new_context)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of a job: the plain fields of its record, but those of ``JobSpec.plain`` as sealed.

    Others may have written plain fields, so each has bounds. Nothing in a Job says what to do.

    ``end`` is the verified end of a job that succeeded, or failed with ``items_failed``; its counts are those
    told here. None before the end, for other ends, and for a record of 0.1, whose ends were not signed.
    """

    job_id: str
    tenant: str
    kind: JobKind
    state: JobState
    queue: str = FILES
    priority: Priority = "normal"
    attempt: Count = 0
    fence: Count = 0
    items: Count = 0
    items_done: Count = 0
    items_failed: Count = 0
    bytes: Count = 0
    bytes_done: Count = 0
    created_at: Seconds = 0.0
    expires_at: Seconds = 0.0
    not_before: Seconds = 0.0
    cancel: Count = 0
    error: Code = ""
    result: str = ""
    purged: Count = 0
    parts: Count = 0
    parts_left: Count = 0
    parent: str = ""
    campaign: Literal["", "dry", "wet"] = ""
    tallies: dict[str, Count] = {}
    end: SignedEnd | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def parts_ended(self) -> bool:
        """Whether all its parts have ended, and it is to be ended by a worker."""
        return not self.ended and self.parts > 0 and self.parts_left <= 0

    @property
    def lane(self) -> QueuePriority:
        return self.queue, self.priority


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """A target about to appear: with the accepted part, enough for any worker to finish it after a crash.

    ``replaces`` is inode, size in bytes and mtime in ns of the file whose place it takes, where that was the
    job's source: if the name means another file by then, it is left alone.

    Of an object, ``upload`` is the multipart upload, empty where a single write makes it, ``parts`` a digest
    of what was sent, and ``over`` what may be replaced: nothing, ``*``, or the object with this ETag.
    ``mark`` is the object's metadata, by which it is recognised; a commit of 0.1 has none, and its object has
    the id of the job there.
    """

    fence: int
    size_bytes: int
    inode: int = 0
    mtime_ns: int = 0
    replaces: tuple[int, int, int] | None = None
    upload: str = ""
    parts: str = ""
    over: str = ""
    mark: str | msgspec.UnsetType = msgspec.UNSET


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """How far a part of a job over many files has come: enough for any worker to go on after a crash.

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


def part_id(job_id: str, number: int) -> str:
    """The id of a part: whoever splits the job, and however often, it is the same."""
    return str(uuid.uuid5(_PARTS, f"{job_id}/{number}"))


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class StoreRules:
    """Seconds and counts of the job layer, from settings.

    ``open_jobs`` may wait or run before submissions are turned away; ``tenant_leases`` of one tenant may
    run at a time. Jobs that read ``large_job_bytes`` or more are large: of one worker they hold at most
    ``large_leases`` processes at a time, while ``has_several_tenants``. ``tenant_open`` (jobs) and
    ``tenant_spool_bytes`` are of those tenants that have a quota.
    """

    lease_s: float = 30.0
    attempts: int = 5
    keep_record_s: float = 24 * 3600.0
    open_jobs: int = 100_000
    tenant_leases: int = 1_000
    large_job_bytes: int = 64 * 1024**2
    large_leases: int = 1
    has_several_tenants: Callable[[], bool] = _never
    tenant_open: Mapping[str, int] = field(default_factory=dict)
    tenant_spool_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a job: the accepted part, unsealed, and the fence that makes its effects count.

    ``is_large``: it was claimed as a large job, see ``StoreRules``. ``spec`` is the digest of the sealed
    record.
    """

    accepted: JobSpec
    worker: str
    fence: int
    attempt: int
    waited_s: float
    deferrals: int
    is_large: bool = False
    commit: Commit | None = field(default=None)
    log: Checkpoint = field(default_factory=Checkpoint)
    spec: bytes = b""

    @property
    def bound(self) -> bytes:
        """What its commit and log are bound to: the sealed record, unless that is of 0.1."""
        return self.spec if self.accepted.signed_end else b""

    def end(self, state: JobState, error: str, work: Work, keep_record_s: float) -> SignedEnd:
        """What this attempt came to, to be signed; ``keep_record_s`` is how long expired records are kept."""
        job = self.accepted
        return SignedEnd(
            fence=self.fence,
            attempt=self.attempt,
            state=state,
            error=error,
            items=job.items,
            items_done=work.items_done,
            items_failed=work.items_failed,
            size_bytes=job.size_bytes,
            bytes_done=work.bytes_done,
            tallies=dict(work.tallies),
            target=work.target,
            result_digest=work.result_digest,
            kept_until=job.expires_at + keep_record_s,
        )
