"""The accepted specification of a job, which never changes: a struct for each kind. Does not use Redis.

A worker signs how the work ended (``SignedEnd``), since Redis could claim any end.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Final, Literal, get_args

import msgspec
from msgspec import Meta

from kms_core.auth.policy import Grant, Principal
from kms_protocol.context import Context
from kms_protocol.errors import JobExpired, Unavailable, UnknownJob
from kms_protocol.wire import JobKind, JobState, Priority, Release

# Signed ends of jobs. Others can write any state into a record in Redis. The ends that clients act on,
# ``succeeded`` and ``failed`` with ``items_failed``, therefore count only with the MAC of a worker
# (``RecordKey.sign``).

MOST_FAILURES: Final = 10
ITEMS_FAILED: Final = "items_failed"
CLOCK_LEEWAY_S: Final = 60.0
"""So far the clocks of machines may be apart where a worker or the API goes by its own."""
Failure = tuple[int, str]
"""The index of an item or file that failed, and its error code."""
SmallBlob = tuple[str, bytes]
"""A sealed blob that rests in Redis: its name, and the bytes that its file in the spool would have."""
BULK: Final = "kms.bulk"
FILES: Final = "kms.files"
MAINTENANCE: Final = "kms.maintenance"
QUEUES: Final = (BULK, FILES, MAINTENANCE)
"""Queues by what a job costs, so that a worker may serve some of them: items, payloads, headers."""
MOVING: Final[frozenset[JobKind]] = frozenset({"rewrap", "reseal"})
"""Kinds that make one ciphertext of another."""
INPUT_BY_REF: Final = "input-by-ref"
"""The file of its items has a name of this one writing (``ItemsJob.is_input_by_ref``)."""
FEATURES: Final = frozenset({INPUT_BY_REF})
"""Names of what a job may need that this version knows and earlier ones did not (``JobSpec.needs``)."""
Seconds = Annotated[float, Meta(ge=0, lt=1e11)]
"""Since the epoch; no NaN, and what a date can show."""
NOT_OF_PARTS: Final[Mapping[str, object]] = {
    "digest": b"",
    "labels": {},
    "metadata": {},
    "release": "",
    "group": "",
}
"""Fields of a job's specification that its parts lack."""
Fields = Mapping[str, str | int | float | bytes]
FORMS: Final = frozenset({"upload", "items", "file", "tree", "tree_part"})


class PlacedTarget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The target that a job wrote: ``inode`` and ``mtime_ns`` of a file, ``parts`` of an object.

    Its URL stands in the sealed record, which the end is bound to: names of files are not shown to Redis.
    ``parts`` is a digest of the parts of a multipart upload, empty for an object of a single write.
    """

    size_bytes: int
    inode: int = 0
    mtime_ns: int = 0
    parts: str = ""


class FirstFailures(list[Failure]):
    """The first ``MOST_FAILURES`` failures of a job."""

    def add(self, index: int, code: str) -> None:
        """Add a failure, unless there are enough."""
        if len(self) < MOST_FAILURES:
            self.append((index, code))


class WorkSummary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The work of an attempt, in items and bytes, as its signed end has it.

    ``result_digest`` is the random id of the writing of the result (``BlobWriter.ref``), or SHA-256 over the
    ends of its parts. ``failures`` are the first items or files that failed. ``file_id``
    (``binding.file_id``) is that of the one file of the job, which it made, moved or opened.
    """

    items_done: int = 0
    items_failed: int = 0
    bytes_done: int = 0
    tallies: dict[str, int] = {}
    failures: tuple[Failure, ...] = ()
    target: PlacedTarget | None = None
    result_digest: bytes = b""
    file_id: str = ""

    @property
    def progress(self) -> dict[str, int]:
        """The fields of the job's record that have its counts."""
        return {
            "bytes_done": self.bytes_done,
            "items_done": self.items_done,
            "items_failed": self.items_failed,
        }


class WorkResult(WorkSummary, frozen=True, kw_only=True):
    """The work of an attempt, with the result itself as a ``blob``, where that is small."""

    blob: SmallBlob | None = None


class SignedEnd(WorkSummary, frozen=True, kw_only=True, omit_defaults=True):
    """The outcome of one attempt at a job.

    Its MAC is also over the digest of the sealed record, so it counts for no other record of the same id.
    ``kept_until`` (seconds since the epoch) is when the record has left Redis by itself: from then on it
    proves nothing.
    """

    fence: int
    attempt: int
    attempt_id: str = ""
    state: JobState
    error: str = ""
    items: int = 0
    size_bytes: int = 0
    parts: int = 0
    kept_until: float


class SignedSplit(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a job: ``digest`` is SHA-256 over their sealed records, in order."""

    parts: int
    digest: bytes


def needs_proof(state: str, error: str) -> bool:
    """True if an end counts only if it is signed: callers read the result, or delete the source, after it."""
    return state == "succeeded" or (state == "failed" and error == ITEMS_FAILED)


def spec_digest(*sealed: bytes) -> bytes:
    """SHA-256 of sealed records, which binds an end to the work that was done."""
    return hashlib.sha256(b"".join(sealed)).digest()


class ClocksApart(Unavailable):
    """The job has expired by this machine's clock only, not by that of Redis: another worker may run it."""

    code = "clocks_apart"
    summary = "The clocks of this machine and of Redis differ"


class RecordTooNew(UnknownJob):
    """The record is of a newer version, or needs a feature that this one does not know."""

    def __init__(self, feature: str) -> None:
        super().__init__(f"A newer version of the service wrote this job (`{feature}`): ask that version")
        self.feature = feature


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="form"):
    """Fields that every kind of job has. Stored in Redis sealed as one blob; workers act only on it.

    ``size_bytes`` is the size of its input; 0 of a tree until it is listed. ``callback`` names a webhook
    endpoint of the settings. ``generation`` counts how often it was retried after it was dead.
    ``idempotency`` is the keyed digest (32 bytes) of the Idempotency-Key's scope that it was submitted with;
    empty without a key. ``release`` says when the result is deleted
    before it expires. Parts have neither that nor labels, metadata and group. ``needs`` names features
    that a worker must know, or leave the job to a newer one. Times are seconds since the epoch.

    ``start_by`` and ``run_by`` are the latest times at which it may start and put something in place. Its
    result is kept for ``keep_for_s`` seconds after the end, or until ``expires_at`` where that is 0.
    ``expires_at`` is never before the result is deleted.
    """

    is_spooled: ClassVar[bool] = False
    """True if its input is in the spool, until some time after its end."""
    job_id: str
    tenant: str
    principal: str
    credential: str
    kind: JobKind
    key_id: str | None = None
    context: tuple[tuple[str, str], ...] = ()
    new_context: tuple[tuple[str, str], ...] | None = None
    size_bytes: int = 0
    priority: Priority = "normal"
    callback: str = ""
    scopes: tuple[str, ...] = ()
    authorized_until: Seconds = 0.0
    request_id: str = ""
    traceparent: str = ""
    digest: bytes = b""
    idempotency: bytes = b""
    needs: tuple[str, ...] = ()
    release: Release | Literal[""] = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    group: str = ""
    group_jobs: int = 0
    group_callback: str = ""
    generation: int = 0
    created_at: Seconds
    expires_at: Seconds
    start_by: Seconds
    run_by: Seconds
    keep_for_s: Seconds = 0.0

    @property
    def is_forgotten(self) -> bool:
        """Return whether its result is to be deleted by the clock of this machine, with some leeway."""
        return time.time() > self.expires_at + CLOCK_LEEWAY_S

    def result_until(self, ended_at: float) -> float:
        """The time at which its result is deleted if it ended at ``ended_at``."""
        return min(self.expires_at, ended_at + self.keep_for_s) if self.keep_for_s else self.expires_at

    def check_expiry(self, redis_now: Callable[[], float]) -> None:
        """Raise JobExpired if nothing may be put in place for it any more.

        ClocksApart if only this machine's clock says so: a job is not lost because of a clock that is wrong.
        """
        if time.time() > self.run_by + CLOCK_LEEWAY_S:
            raise JobExpired if redis_now() > self.run_by else ClocksApart

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.job_id}, {self.kind})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("job_id", self.job_id)]

    @property
    def parent(self) -> str:
        """The job that this is a part of; empty for a job of its own."""
        return ""

    @property
    def items(self) -> int:
        """The items, or files, that it works through one by one."""
        return 0

    @property
    def owner(self) -> str:
        """The job that the submitter knows: itself, or the whole that it is a part of."""
        return self.parent or self.job_id

    @property
    def queue(self) -> str:
        return MAINTENANCE if self.kind == "rewrap" else FILES

    @property
    def who(self) -> Principal:
        """The submitter. Scopes are stored only for a JWT, which cannot be looked up when the job runs."""
        grant = Grant(self.scopes, self.authorized_until) if self.authorized_until else None
        return Principal(self.principal, self.tenant, self.credential, grant)

    @property
    def spooled_bytes(self) -> int:
        """Size of its input in the spool, in bytes; 0 if it is elsewhere. The result is about as large."""
        return self.size_bytes if self.is_spooled else 0

    @property
    def work_bytes(self) -> int:
        """Bytes that a worker reads for it; 0 where it reads headers only, or cuts the job into parts."""
        return self.size_bytes

    @property
    def campaign(self) -> Literal["", "dry", "wet"]:
        """Return whether it moves many files to the newest version of their key, and reports on that."""
        return ""

    @property
    def plain(self) -> Fields:
        """The fields that Redis holds in the clear, under the names of ``Job``."""
        found: Fields = {
            "tenant": self.tenant,
            "kind": self.kind,
            "queue": self.queue,
            "priority": self.priority,
            "items": self.items,
            "bytes": self.size_bytes,
            "generation": self.generation,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "start_by": self.start_by,
            "run_by": self.run_by,
            "keep_for": self.keep_for_s,
        }
        more: Fields = {
            "campaign": self.campaign,
            "needs": " ".join(self.needs),
            "spooled": int(self.is_spooled),
        }
        return {**found, **{name: value for name, value in more.items() if value}}

    @property
    def bound_context(self) -> Context:
        return Context(self.context)

    @property
    def new_bound_context(self) -> Context | None:
        return None if self.new_context is None else Context(self.new_context)


class UploadJob(JobSpec, frozen=True, kw_only=True, tag="upload"):
    """A job over an uploaded file; ``input_ref`` names its blob as it was written (``BlobWriter.ref``)."""

    is_spooled: ClassVar[bool] = True
    input_ref: bytes = b""

    @property
    def work_bytes(self) -> int:
        return self.size_bytes if self.kind == "decrypt" else 0


class ItemsJob(JobSpec, frozen=True, kw_only=True, tag="items"):
    """A bulk job over items in the spool, or one of its parts, which has a ``parent`` and a number.

    ``starts`` says where in the blob ``input_ref`` each run of some hundred items begins. A job with a single
    run is not split. ``first`` is the number of the first item of a part. ``is_input_by_ref``: the blob
    is a file whose name has ``input_ref``, since another process may write items for a job of this id, too.
    """

    is_spooled: ClassVar[bool] = True
    items: int
    starts: tuple[int, ...]
    parent: str = ""
    part: int = 0
    first: int = 0
    input_ref: bytes = b""
    is_input_by_ref: bool = False

    @property
    def queue(self) -> str:
        return MAINTENANCE if self.kind == "rewrap" else BULK

    @property
    def work_bytes(self) -> int:
        return self.size_bytes if self.parent or len(self.starts) <= 1 else 0

    @property
    def plain(self) -> Fields:
        """As of each job. A worker must know the name of the input; who only reads the record need not."""
        needs: Fields = {"needs": INPUT_BY_REF} if self.is_input_by_ref else {}
        return {**super().plain, **needs}


class FilesJob(JobSpec, frozen=True, kw_only=True):
    """Fields of jobs from URL to URL."""

    source: str
    target: str
    overwrite: bool = False

    @property
    def in_place(self) -> bool:
        """Return whether the result takes the place of its source."""
        return self.target == self.source

    @property
    def who(self) -> Principal:
        found = super().who
        return Principal(found.name, found.tenant, found.credential, found.grant, self.source, self.target)


class FileJob(FilesJob, frozen=True, kw_only=True, tag="file"):
    """A job over one file or object."""


class TreeJob(FilesJob, frozen=True, kw_only=True, tag="tree"):
    """A job over all files that a pattern names (``file_patterns.Tree``); a worker lists them."""

    dry_run: bool = False

    @property
    def work_bytes(self) -> int:
        return 0

    @property
    def campaign(self) -> Literal["", "dry", "wet"]:
        if self.kind not in MOVING:
            return ""
        return "dry" if self.dry_run else "wet"


class TreePart(TreeJob, frozen=True, kw_only=True, tag="tree_part"):
    """A part of a job over many files.

    It has those lines of the listing ``manifest`` (a number of its own; ``input_ref`` names its blob) that
    lie between its two ``starts``, from file ``first`` on. ``parent_spec`` is the digest of the sealed record
    of its parent.
    """

    parent: str
    part: int = 0
    first: int = 0
    items: int
    starts: tuple[int, ...]
    manifest: int = 0
    parent_spec: bytes = b""
    input_ref: bytes = b""

    @property
    def work_bytes(self) -> int:
        return 0 if self.dry_run else self.size_bytes


AnyJob = UploadJob | ItemsJob | FileJob | TreeJob | TreePart


def check_needs(job: AnyJob) -> AnyJob:
    """Raise RecordTooNew for a job that needs what this version does not know."""
    for name in job.needs:
        if name not in FEATURES:
            raise RecordTooNew(name)
    return job


def unreadable_error(fields: object) -> UnknownJob:
    """The error for fields of a record that this version does not write: RecordTooNew if a newer one did."""
    if not isinstance(fields, dict):
        return UnknownJob("The record of this job is not one")
    for name in fields.get("needs") or ():
        if name not in FEATURES:
            return RecordTooNew(str(name)[:64])
    for key, known in (("form", FORMS), ("kind", get_args(JobKind))):
        if isinstance(found := fields.get(key), str) and found not in known:
            return RecordTooNew(f"{key}-{found[:64]}")
    return UnknownJob("The record of this job has values that no version writes")
