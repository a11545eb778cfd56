"""What a job is: the part that was accepted and never changes, and the part that moves. Knows no Redis."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from kms_core.context import Context
from kms_core.errors import KmsError
from kms_core.policy import Principal
from kms_core.wire import ENDED, JobKind, JobState

BULK: Final = "kms.bulk"
FILES: Final = "kms.files"
MAINTENANCE: Final = "kms.maintenance"
QUEUES: Final = (BULK, FILES, MAINTENANCE)
"""Queues by what a job costs, so that a worker may serve some of them: items, payloads, headers."""


Nudge = Callable[[str, str], None]
"""``nudge(job_id, queue)``: tell some worker of the queue. Raises JobsUnavailable."""
Fields = Mapping[str, str | int | float | bytes]


class LeaseLost(KmsError):
    """Another attempt holds this job now: stop, and leave no effect."""

    code = "lease_lost"
    summary = "Another worker holds this job"


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """What the service promised to do. Rests in Redis sealed as one blob; workers act on this alone.

    ``source`` is ``upload``, ``items`` (both in the spool) or a ``file://`` URL; ``target`` is empty or a
    ``file://`` URL. ``starts`` says where in the items each part of some hundred begins; a job that is such a
    part names its ``parent`` and its number. ``callback`` names a webhook endpoint of the settings. Times are
    seconds since the epoch.
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
    callback: str = ""
    request_id: str = ""
    digest: bytes = b""
    created_at: float
    expires_at: float

    def __repr__(self) -> str:
        return f"Accepted({self.job_id}, {self.kind})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("job_id", self.job_id)]

    @property
    def owner(self) -> str:
        """The job that the submitter knows: itself, or the whole that it is a part of."""
        return self.parent or self.job_id

    @property
    def queue(self) -> str:
        if self.kind == "rewrap":
            return MAINTENANCE
        return BULK if self.items else FILES

    @property
    def who(self) -> Principal:
        return Principal(self.principal, self.tenant, self.credential)

    @property
    def bound_context(self) -> Context:
        return Context(self.context)

    @property
    def new_bound_context(self) -> Context | None:
        return None if self.new_context is None else Context(self.new_context)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What moves: one reading of the plain fields. Nothing in it says what to do, or for whom."""

    job_id: str
    tenant: str
    kind: JobKind
    state: JobState
    queue: str = FILES
    attempt: int = 0
    fence: int = 0
    items: int = 0
    items_done: int = 0
    items_failed: int = 0
    bytes: int = 0
    bytes_done: int = 0
    created_at: float = 0.0
    expires_at: float = 0.0
    not_before: float = 0.0
    cancel: int = 0
    error: str = ""
    result: str = ""
    purged: int = 0
    parts: int = 0
    parent: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """A target about to appear: with the accepted part, enough for any worker to finish it after a crash."""

    fence: int
    inode: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Rules:
    """Seconds and counts of the job layer, from settings.

    ``open_jobs`` may wait or run before submissions are turned away; ``tenant_leases`` of one tenant may
    run at a time.
    """

    lease_s: float = 30.0
    attempts: int = 5
    keep_record_s: float = 24 * 3600.0
    open_jobs: int = 100_000
    tenant_leases: int = 1_000


@dataclass(frozen=True, slots=True)
class Claim:
    """One attempt at a job: the accepted part, unsealed, and the fence that makes its effects count."""

    accepted: Accepted
    worker: str
    fence: int
    attempt: int
    waited_s: float
    deferrals: int
    commit: Commit | None = field(default=None)
