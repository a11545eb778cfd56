"""The JSON shapes of the REST API, shared by server, client and command; the only home of base64.

``bytes`` fields are standard base64, padded (RFC 4648 §4). ``null`` and absent are the same. Unknown
fields are refused. No shape shows its values in ``repr``, so a body cannot reach a log by accident.
"""

from datetime import datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

PREFIX: Final = "/api/v1/kms"
KEY_ID_PATTERN: Final = "^[A-Za-z0-9_.-]{1,80}(?!\\s)$"

KeyId = Annotated[str, Meta(pattern=KEY_ID_PATTERN)]
# A UUID (RFC 9562) in lower case, of any version but 5: those name the parts of a job.
JobId = Annotated[
    str,
    Meta(
        pattern="^[0-9a-f]{8}-[0-9a-f]{4}-[1-46-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$",
        max_length=36,  # $ alone would let a line end pass
    ),
]
EndpointName = Annotated[str, Meta(pattern=KEY_ID_PATTERN)]
ContextIn = str | dict[str, str] | None
KeySpec = Literal["AES_128", "AES_256"]
JobKind = Literal["encrypt", "decrypt", "rewrap", "reseal"]
JobState = Literal["queued", "running", "committing", "succeeded", "failed", "cancelled"]
Priority = Literal["high", "normal", "low"]
Outcome = Literal["changed", "newest", "foreign", "would_change"]
Origin = Literal["service", "foreign"]
PRIORITIES: Final[tuple[Priority, ...]] = ("high", "normal", "low")
STATES: Final[tuple[JobState, ...]] = ("queued", "running", "committing", "succeeded", "failed", "cancelled")
ENDED: Final = frozenset({"succeeded", "failed", "cancelled"})
KEY_SPEC_BYTES: Final[dict[str, int]] = {"AES_128": 16, "AES_256": 32}


class Shape(Struct, frozen=True, kw_only=True):
    """Base of every shape: immutable, and silent in ``repr``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # msgspec would otherwise list every field to rich
        return []


class Body(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body."""


class Answer(Shape, frozen=True, kw_only=True):
    """A response body. Fields that are UNSET do not appear."""


# -- single calls ------------------------------------------------------------------------------------


class EncryptIn(Body, frozen=True, kw_only=True):
    plaintext: bytes
    context: ContextIn = None
    key_id: KeyId | None = None


class EncryptOut(Answer, frozen=True, kw_only=True):
    ciphertext: bytes
    key_id: str
    key_version: str
    backend: str


class DecryptIn(Body, frozen=True, kw_only=True):
    ciphertext: bytes
    context: ContextIn = None
    key_id: KeyId | None = None


class DecryptOut(Answer, frozen=True, kw_only=True):
    plaintext: bytes
    key_id: str
    key_version: str
    backend: str
    origin: Origin


class GenerateKeyIn(Body, frozen=True, kw_only=True):
    """A data key: random bytes, sealed like any other plaintext."""

    key_spec: KeySpec | None = None
    number_of_bytes: Annotated[int, Meta(ge=1, le=1024)] | None = None
    context: ContextIn = None
    key_id: KeyId | None = None
    without_plaintext: bool | None = None


class GenerateKeyOut(Answer, frozen=True, kw_only=True):
    plaintext: bytes | UnsetType = UNSET
    ciphertext: bytes
    key_spec: str
    key_id: str
    key_version: str
    backend: str


class RewrapIn(Body, frozen=True, kw_only=True):
    """``new_context`` absent keeps the old one; ``key_id`` names the new key (default: the same id)."""

    ciphertext: bytes
    context: ContextIn = None
    new_context: ContextIn = None
    key_id: KeyId | None = None


# -- file keys ---------------------------------------------------------------------------------------


class WrapIn(Body, frozen=True, kw_only=True):
    """``file_key``: the 16 random bytes that an age tool has made for one file."""

    file_key: bytes
    context: ContextIn = None
    key_id: KeyId | None = None


class WrapOut(Answer, frozen=True, kw_only=True):
    """``stanza``: one, as the text that stands in a header, its last line ended."""

    stanza: bytes
    key_id: str
    key_version: str
    backend: str


class UnwrapIn(Body, frozen=True, kw_only=True):
    """``stanzas``: those of a file's header, as text. ``key_id``: refuse a file of another key."""

    stanzas: bytes
    context: ContextIn = None
    key_id: KeyId | None = None


class UnwrapOut(Answer, frozen=True, kw_only=True):
    """``origin`` is ``foreign`` where stanzas alone do not prove that this service wrapped the key."""

    file_key: bytes
    key_id: str
    key_version: str
    backend: str
    origin: Origin


# -- batch -------------------------------------------------------------------------------------------


class BatchItem(Body, frozen=True, kw_only=True):
    """One call of a batch: ``plaintext`` for encrypt, ``ciphertext`` for every other."""

    plaintext: bytes | None = None
    ciphertext: bytes | None = None
    context: ContextIn = None
    key_id: KeyId | None = None
    reference: Annotated[str, Meta(max_length=256)] | None = None


class BatchIn(Body, frozen=True, kw_only=True):
    operation: JobKind
    items: Annotated[list[BatchItem], Meta(min_length=1, max_length=1000)]


class ErrorCode(Answer, frozen=True, kw_only=True):
    code: str


class BatchResult(Answer, frozen=True, kw_only=True):
    index: int
    reference: str | UnsetType = UNSET
    ciphertext: bytes | UnsetType = UNSET
    plaintext: bytes | UnsetType = UNSET
    key_id: str | UnsetType = UNSET
    key_version: str | UnsetType = UNSET
    backend: str | UnsetType = UNSET
    origin: Origin | UnsetType = UNSET
    error: ErrorCode | UnsetType = UNSET


class BatchOut(Answer, frozen=True, kw_only=True):
    results: list[BatchResult]
    failed: int


# -- Temporal ----------------------------------------------------------------------------------------


class Payload(Body, frozen=True, kw_only=True):
    """Temporal's own shape of a value (temporal.api.common.v1.Payload, as JSON)."""

    metadata: dict[str, bytes] = {}
    data: bytes = b""


class CodecIn(Body, frozen=True, kw_only=True):
    payloads: Annotated[list[Payload], Meta(max_length=1000)] = []


class CodecOut(Answer, frozen=True, kw_only=True):
    payloads: list[Payload]


# -- health and status -------------------------------------------------------------------------------


class HealthOut(Answer, frozen=True, kw_only=True):
    status: Literal["healthy", "unhealthy"]
    backend: str
    checked_at: str


class ReadyOut(Answer, frozen=True, kw_only=True):
    status: Literal["ready", "not ready"]
    jobs: Literal["available", "unavailable"]
    audit: Literal["available", "unavailable"]


class KeyVersionOut(Answer, frozen=True, kw_only=True):
    """``operations`` and ``bytes`` count what this version has sealed, where that is known."""

    version: str
    created_at: str | None = None
    operations: int | None = None
    bytes: int | None = None


class KeyOut(Answer, frozen=True, kw_only=True):
    """``current_version`` is null and ``versions`` are empty while the backend does not answer.

    ``others`` are further backends that wrap every new file of this key. ``rotate_at`` is when a new version
    is due; ``budget`` is what the version in use has sealed, of what it may: 1.0 is all of it.
    """

    id: str
    backend: str
    current_version: str | None
    versions: list[KeyVersionOut]
    default: bool
    others: list[str] = []
    rotate_at: str | None = None
    budget: float | None = None


class RotateOut(Answer, frozen=True, kw_only=True):
    key_id: str
    key_version: str
    backend: str


class KeysOut(Answer, frozen=True, kw_only=True):
    keys: list[KeyOut]


class OperationCount(Answer, frozen=True, kw_only=True):
    ok: int
    failed: int


class Operations(Answer, frozen=True, kw_only=True):
    total: int
    by: dict[str, OperationCount]


class StatusOut(Answer, frozen=True, kw_only=True):
    backend: str
    environment: str
    version: str
    uptime_s: float
    operations: Operations
    jobs: dict[str, int] | None
    queue_depth: int | None
    workers: int | None
    degraded: list[str]


# -- jobs --------------------------------------------------------------------------------------------


class JobItem(Body, frozen=True, kw_only=True):
    plaintext: bytes | None = None
    ciphertext: bytes | None = None
    context: ContextIn = None


class JobIn(Body, frozen=True, kw_only=True):
    """Bulk ``items``, or a ``source`` and a ``target``.

    These are ``file:///…`` under an allowed root, or ``s3://bucket/key`` in a bucket of the settings.

    A ``source`` with ``*`` names many files: ``*`` is any run of characters of a name, ``**`` any number of
    directories. The ``target`` is then a directory, ending in ``/``; paths below it stay, encrypt appends
    ``.age``, decrypt takes it away. To rewrap or reseal in place leave ``target`` out and say ``overwrite``.
    Rewrap and reseal of many files leave those alone that are on the newest key version; ``dry_run`` only
    counts, ``rate_per_s`` limits files a second, and the job's ``report`` tells what came of it.

    ``priority`` is ``normal`` if absent: while a ``high`` job waits no other is begun, and a ``low`` one only
    if no other waits. ``callback`` names an endpoint of the service's settings, to be told how the job ends.
    """

    kind: JobKind
    items: list[JobItem] | None = None
    source: str | None = None
    target: str | None = None
    overwrite: bool | None = None
    key_id: KeyId | None = None
    context: ContextIn = None
    new_context: ContextIn = None
    ttl_s: Annotated[int, Meta(ge=60, le=30 * 24 * 3600)] | None = None
    dry_run: bool | None = None
    rate_per_s: Annotated[float, Meta(gt=0, le=10_000)] | None = None
    priority: Priority | None = None
    callback: EndpointName | None = None


class Submission(Body, frozen=True, kw_only=True):
    """What a ``kms.submit`` message seals (docs/celery.md): a job, its submitter's id for it, and a term.

    The id makes replays harmless. ``token`` is an API token or a JWT; null where nobody is asked.
    """

    version: Literal[1]
    token: Annotated[str, Meta(max_length=4096)] | None = None
    job_id: JobId
    expires_at: Annotated[datetime, Meta(tz=True)]
    job: JobIn


class IntakeOut(Answer, frozen=True, kw_only=True):
    """Whom to seal a ``kms.submit`` message to, and the version of the message that is taken."""

    recipient: str
    key_version: str
    version: int


class JobLinks(Answer, frozen=True, kw_only=True, rename={"self_": "self"}):
    self_: str
    result: str
    events: str


class JobAccepted(Answer, frozen=True, kw_only=True):
    job_id: str
    state: JobState
    links: JobLinks


class JobProgress(Answer, frozen=True, kw_only=True):
    items: int
    items_done: int
    items_failed: int
    bytes: int
    bytes_done: int


class OlderVersion(Answer, frozen=True, kw_only=True):
    """A key version that is not the newest: how many files were found on it, and how many still are."""

    key_id: str
    key_version: str
    found: int
    left: int


class Report(Answer, frozen=True, kw_only=True):
    """What a rewrap or reseal of many files has come to, so far or in the end, in files.

    With ``dry_run`` nothing was touched, and ``changed`` says how many would be. ``newest`` and ``foreign``
    ones are left as they are.
    """

    dry_run: bool
    changed: int
    newest: int
    foreign: int
    failed: int
    older: list[OlderVersion]


class JobOut(Answer, frozen=True, kw_only=True):
    job_id: str
    kind: JobKind
    state: JobState
    priority: Priority = "normal"
    attempt: int
    progress: JobProgress
    created_at: str
    expires_at: str
    not_before: str | UnsetType = UNSET
    error: ErrorCode | None = None
    report: Report | UnsetType = UNSET
    links: JobLinks


class JobList(Answer, frozen=True, kw_only=True):
    jobs: list[JobOut]
    next: str | None = None


class ItemResult(Answer, frozen=True, kw_only=True):
    """One line of a result in NDJSON: an item of a bulk job, or a file of a job over many.

    ``outcome`` is that of a rewrap or reseal; a file that was refused has an ``error`` instead.
    """

    index: int
    source: str | UnsetType = UNSET
    target: str | UnsetType = UNSET
    outcome: Outcome | UnsetType = UNSET
    ciphertext: bytes | UnsetType = UNSET
    plaintext: bytes | UnsetType = UNSET
    error: ErrorCode | UnsetType = UNSET


class DeliveryOut(Answer, frozen=True, kw_only=True):
    """A webhook that was given up."""

    delivery_id: str
    job_id: str
    endpoint: str
    state: JobState
    attempts: int
    created_at: str


class DeliveryList(Answer, frozen=True, kw_only=True):
    deliveries: list[DeliveryOut]


# -- audit -------------------------------------------------------------------------------------------


class AuditEvent(Answer, frozen=True, kw_only=True):
    """One operation, on record (docs/audit.md). Values of contexts are keyed hashes; it has a receipt.

    ``count`` is set where it stands for several denied items of a batch, and for ``audit.read``: so many
    records were read, by this ``filter``.
    """

    id: str
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
    context: dict[str, str] = {}
    new_context: dict[str, str] | UnsetType = UNSET
    bytes_in: int
    bytes_out: int
    result: str | UnsetType = UNSET
    duration_us: int
    count: int | UnsetType = UNSET


class AuditOut(Answer, frozen=True, kw_only=True):
    """Oldest first. ``next`` is always there: it also asks for what is recorded later.

    ``more`` says whether it leads on at once; a page may be short, or empty, and lead on.
    """

    events: list[AuditEvent]
    next: str
    more: bool


# -- problems ----------------------------------------------------------------------------------------


class Problem(Answer, frozen=True, kw_only=True):
    """RFC 9457 ``application/problem+json``; ``code`` is stable, ``detail`` is for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    links: dict[str, str] | UnsetType = UNSET


encode: Final = msgspec.json.encode
NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are no JSON of a shape; some are no text, or nested without end."""
