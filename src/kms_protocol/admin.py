"""JSON shapes of the REST API for operators: health, status, keys, undelivered webhooks and the audit log."""

from typing import Literal

from msgspec import UNSET, UnsetType, field

from kms_protocol.wire import Answer, JobState, UsedKey


class HealthOut(Answer, frozen=True, kw_only=True):
    """Result of a wrap and an unwrap with the default key, at most some seconds old."""

    status: Literal["healthy", "unhealthy"]
    backend: str
    checked_at: str


class ReadyOut(Answer, frozen=True, kw_only=True):
    """Readiness, and whether jobs can be submitted, audit records written and all local keys used.

    ``jobs`` is ``full`` while Redis has no memory left, ``read_only`` while it takes no writes. ``spool`` is
    ``nearly_full`` from 90 % on, ``unavailable`` while its disk or bucket is away or refuses calls, and
    ``not_shared`` while another host has another spool.
    """

    status: Literal["ready", "not ready"]
    jobs: Literal["available", "unavailable", "full", "read_only"]
    audit: Literal["available", "unavailable"]
    keys: Literal["available", "unavailable"]
    spool: Literal["available", "nearly_full", "full", "unavailable", "not_shared"]


# -- keys --------------------------------------------------------------------------------------------


class KeyVersionOut(Answer, frozen=True, kw_only=True):
    """A key version. ``operations`` and ``bytes`` count its encryptions; null if unknown."""

    version: str
    created_at: str | None = None
    operations: int | None = None
    bytes: int | None = None


class KeyOut(Answer, frozen=True, kw_only=True):
    """A key. While its backend does not answer, ``current_version`` is null and ``versions`` is empty.

    ``others`` are further backends that wrap each new file of this key. ``rotate_at`` is the due time of the
    next version. ``budget`` is the used part of the encryptions allowed for the current version: 1.0 is all.
    """

    id: str
    backend: str
    current_version: str | None
    versions: list[KeyVersionOut]
    default: bool
    others: list[str] = field(default_factory=list)
    rotate_at: str | None = None
    budget: float | None = None


class RotateOut(UsedKey, frozen=True, kw_only=True):
    """The new version of a key."""


class KeysOut(Answer, frozen=True, kw_only=True):
    """The keys that the caller may use."""

    keys: list[KeyOut]


# -- status ------------------------------------------------------------------------------------------


class OperationCount(Answer, frozen=True, kw_only=True):
    """Numbers of successful and of failed calls."""

    ok: int
    failed: int


class Operations(Answer, frozen=True, kw_only=True):
    """Numbers of calls, in total and by operation."""

    total: int
    by: dict[str, OperationCount]


class SpoolOut(Answer, frozen=True, kw_only=True):
    """The use of the spool: ``full`` is the used part of all of it, 1.0 at its end.

    The bytes are those of the caller's tenant, with its quota (null for none), or of all for callers that may
    read the metrics.
    """

    full: float
    used_bytes: int | None
    limit_bytes: int | None


class BackendDown(Answer, frozen=True, kw_only=True):
    """A backend of a key that did not wrap and unwrap since that time, or of which nothing is known since.

    ``root``: the key seals key files. Roots are shown to callers that may read the metrics.
    """

    key_id: str
    backend: str
    root: bool
    since: str


class StatusOut(Answer, frozen=True, kw_only=True):
    """Status of the service. ``jobs`` counts by state; it is null, as is all else unknown, without Redis.

    ``version`` is that of the process that answers; ``api_versions`` and ``worker_versions`` count live
    processes of the API, and workers, by theirs.
    ``degraded`` names the parts that do not work as they should, ``backend`` for the default key;
    ``backends_down`` has each backend, asked every 30 seconds.
    ``install`` is the id of the install, for callers that may read the metrics.
    """

    backend: str
    environment: str
    version: str
    uptime_s: float
    operations: Operations
    jobs: dict[str, int] | None
    queue_depth: int | None
    workers: int | None
    worker_versions: dict[str, int] | None = None
    api_versions: dict[str, int] | None = None
    spool: SpoolOut | None = None
    install: str | None = None
    degraded: list[str]
    backends_down: list[BackendDown] = field(default_factory=list)


# -- webhooks ----------------------------------------------------------------------------------------


class DeliveryOut(Answer, frozen=True, kw_only=True):
    """A webhook delivery that failed for good."""

    delivery_id: str
    job_id: str
    endpoint: str
    state: JobState
    attempts: int
    created_at: str


class DeliveryList(Answer, frozen=True, kw_only=True):
    """Webhook deliveries that failed for good, newest first."""

    deliveries: list[DeliveryOut]


# -- audit log ---------------------------------------------------------------------------------------


class AuditEvent(Answer, frozen=True, kw_only=True):
    """A recorded operation (docs/audit.md). Context values are keyed hashes. The event has a receipt.

    ``count`` is the number of failed items of a batch that the event stands for, or of the records read by an
    ``audit.read`` with this ``filter``. ``host`` is there if the service reads the logs of several hosts.
    """

    id: str
    host: str | UnsetType = UNSET
    time: str
    operation: str
    stage: str | UnsetType = UNSET
    effect: str | UnsetType = UNSET
    route: str | UnsetType = UNSET
    filter: str | UnsetType = UNSET
    source: str | UnsetType = UNSET
    principal: str
    credential: str
    request_id: str | UnsetType = UNSET
    job_id: str | UnsetType = UNSET
    key_id: str | UnsetType = UNSET
    key_version: str | UnsetType = UNSET
    backend: str | UnsetType = UNSET
    origin: str | UnsetType = UNSET
    wrap_key: str | UnsetType = UNSET
    file_id: str | UnsetType = UNSET
    new_file_id: str | UnsetType = UNSET
    stanzas: str | UnsetType = UNSET
    context: dict[str, str] = field(default_factory=dict)
    new_context: dict[str, str] | UnsetType = UNSET
    bytes_in: int
    bytes_out: int
    result: str | UnsetType = UNSET
    duration_us: int
    count: int | UnsetType = UNSET


class AuditOut(Answer, frozen=True, kw_only=True):
    """A page of the audit log, oldest first. ``next`` is always set; later events continue from it.

    ``more`` is true if further events exist now. A page can be short or empty although ``more`` is true.
    ``unread`` has the hosts whose logs could not be read, each with the reason.
    """

    events: list[AuditEvent]
    next: str
    more: bool
    unread: dict[str, str] | UnsetType = UNSET
