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
JobKind = Literal["encrypt", "decrypt", "rewrap"]
JobState = Literal["queued", "running", "committing", "succeeded", "failed", "cancelled"]
Origin = Literal["service", "foreign"]
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


# -- batch -------------------------------------------------------------------------------------------


class BatchItem(Body, frozen=True, kw_only=True):
    """One call of a batch: ``plaintext`` for encrypt, ``ciphertext`` for decrypt and rewrap."""

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


# -- health and status -------------------------------------------------------------------------------


class HealthOut(Answer, frozen=True, kw_only=True):
    status: Literal["healthy", "unhealthy"]
    backend: str
    checked_at: str


class ReadyOut(Answer, frozen=True, kw_only=True):
    status: Literal["ready", "not ready"]
    jobs: Literal["available", "unavailable"]


class KeyVersionOut(Answer, frozen=True, kw_only=True):
    """``operations`` and ``bytes`` count what this version has sealed, where that is known."""

    version: str
    created_at: str | None = None
    operations: int | None = None
    bytes: int | None = None


class KeyOut(Answer, frozen=True, kw_only=True):
    id: str
    backend: str
    current_version: str
    versions: list[KeyVersionOut]
    default: bool


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
    """Bulk ``items``, or a ``source`` and a ``target`` (``file:///…`` under an allowed root).

    ``callback`` names an endpoint of the service's settings, which is told how the job ends.
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
    callback: EndpointName | None = None


class Submission(Body, frozen=True, kw_only=True):
    """What a ``kms.submit`` message seals (docs/celery.md): a job, its submitter's id for it, and a term.

    The id makes replays harmless. No ``token`` but null is valid until callers are authenticated.
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


class JobOut(Answer, frozen=True, kw_only=True):
    job_id: str
    kind: JobKind
    state: JobState
    attempt: int
    progress: JobProgress
    created_at: str
    expires_at: str
    not_before: str | UnsetType = UNSET
    error: ErrorCode | None = None
    links: JobLinks


class JobList(Answer, frozen=True, kw_only=True):
    jobs: list[JobOut]
    next: str | None = None


class ItemResult(Answer, frozen=True, kw_only=True):
    """One line of a bulk job's result (NDJSON)."""

    index: int
    ciphertext: bytes | UnsetType = UNSET
    plaintext: bytes | UnsetType = UNSET
    error: ErrorCode | UnsetType = UNSET


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
