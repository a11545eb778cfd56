"""JSON shapes of the REST API for callers, shared by server, client and command line.

``admin.py`` has those for operators. ``bytes`` fields are padded standard base64 (RFC 4648 §4). ``null``
means the same as an absent field. ``repr`` shows no value, which keeps the content of a body out of logs.
"""

from datetime import datetime
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

KEY_ID_PATTERN: Final = "^[A-Za-z0-9_.-]{1,80}(?!\\s)$"
MOST_LABELS: Final = 16

KeyId = Annotated[str, Meta(pattern=KEY_ID_PATTERN)]
Labels = Annotated[
    dict[
        Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_./-]{0,62}(?!\\s)$")],
        Annotated[str, Meta(pattern="^[A-Za-z0-9_.:/@+-]{0,128}(?!\\s)$")],
    ],
    Meta(max_length=MOST_LABELS),
]
"""Names and values by which jobs are listed."""
GroupName = Annotated[str, Meta(pattern="^[A-Za-z0-9_.:@+-]{1,128}(?!\\s)$")]
Metadata = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16),
]
"""Texts of the submitter, which answers and events repeat."""
EndpointName = Annotated[str, Meta(pattern=KEY_ID_PATTERN)]
KeepFor = Annotated[int, Meta(ge=60)]
"""Seconds for which a result is kept."""
Moment = Annotated[datetime, Meta(tz=True)]
"""An RFC 3339 time with an offset."""
PREFIX: Final = "/api/v1/kms"
ContextIn = str | dict[str, str] | None
KeySpec = Literal["AES_128", "AES_256"]
JobKind = Literal["encrypt", "decrypt", "rewrap", "reseal"]
JobState = Literal["queued", "running", "committing", "succeeded", "failed", "cancelled"]
Priority = Literal["high", "normal", "low"]
Release = Literal["after_fetch"]
Outcome = Literal["changed", "newest", "foreign", "would_change"]
Origin = Literal["service", "foreign"]
PRIORITIES: Final[tuple[Priority, ...]] = get_args(Priority)
STATES: Final[tuple[JobState, ...]] = get_args(JobState)
ENDED: Final = frozenset({"succeeded", "failed", "cancelled"})
KEY_SPEC_BYTES: Final[dict[str, int]] = {"AES_128": 16, "AES_256": 32}
encode: Final = msgspec.json.encode
NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Exceptions raised for bytes that are not JSON of a shape, not text, or nested too deeply."""


class Hidden(Struct, frozen=True):
    """Base of values that may hold secrets: immutable, and ``repr`` shows none of their fields."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, object]]:  # msgspec's own lists all fields
        return []


class Shape(Hidden, frozen=True, kw_only=True):
    """Base of all shapes."""


class Body(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body. Unknown fields are refused."""


class Answer(Shape, frozen=True, kw_only=True):
    """A response body. UNSET fields are left out."""


class Problem(Answer, frozen=True, kw_only=True):
    """An error (RFC 9457, ``application/problem+json``). ``code`` is stable; ``detail`` is for people.

    ``job_id`` is the job that ``durability_unconfirmed`` is about.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    links: dict[str, str] | UnsetType = UNSET
    job_id: str | UnsetType = UNSET


class Payload(Body, frozen=True, kw_only=True):
    """A value of Temporal (temporal.api.common.v1.Payload, as JSON)."""

    metadata: dict[str, bytes] = field(default_factory=dict)
    data: bytes = b""


class CodecIn(Body, frozen=True, kw_only=True):
    """Payloads for the codec server."""

    payloads: Annotated[list[Payload], Meta(max_length=1000)] = field(default_factory=list)


class CodecOut(Answer, frozen=True, kw_only=True):
    """Payloads of the codec server."""

    payloads: list[Payload]


class GroupIn(Body, frozen=True, kw_only=True):
    """A group of ``jobs`` jobs, which all say the same name and number.

    It ends once all have been submitted and have ended. ``callback`` is a webhook endpoint for that event.
    """

    name: GroupName
    jobs: Annotated[int, Meta(ge=1, le=10_000)]
    callback: EndpointName | None = None


class GroupOut(Answer, frozen=True, kw_only=True):
    """A group: the number of its jobs, of those submitted, and of these by state.

    ``ended`` once all have been submitted and have ended. ``failed`` has the ids of the first ten jobs that
    did not succeed.
    """

    name: str
    jobs: int
    submitted: int
    states: dict[str, int]
    ended: bool
    failed: list[str]


class EncryptIn(Body, frozen=True, kw_only=True):
    plaintext: bytes
    context: ContextIn = None
    key_id: KeyId | None = None


class UsedKey(Answer, frozen=True, kw_only=True):
    """The version of a key that sealed or opened something, and its backend."""

    key_id: str
    key_version: str
    backend: str


class EncryptOut(UsedKey, frozen=True, kw_only=True):
    """``file_id`` names the file in audit records; a rewrap keeps it."""

    ciphertext: bytes
    file_id: str = ""


class DecryptIn(Body, frozen=True, kw_only=True):
    ciphertext: bytes
    context: ContextIn = None
    key_id: KeyId | None = None


class DecryptOut(UsedKey, frozen=True, kw_only=True):
    plaintext: bytes
    origin: Origin
    file_id: str = ""


class GenerateKeyIn(Body, frozen=True, kw_only=True):
    """A data key: random bytes, encrypted like any other plaintext."""

    key_spec: KeySpec | None = None
    number_of_bytes: Annotated[int, Meta(ge=1, le=1024)] | None = None
    context: ContextIn = None
    key_id: KeyId | None = None
    without_plaintext: bool | None = None


class GenerateKeyOut(UsedKey, frozen=True, kw_only=True):
    plaintext: bytes | UnsetType = UNSET
    ciphertext: bytes
    key_spec: str
    file_id: str = ""


class RewrapIn(Body, frozen=True, kw_only=True):
    """``new_context`` replaces the context; absent keeps it. ``key_id`` is the new key, else the old."""

    ciphertext: bytes
    context: ContextIn = None
    new_context: ContextIn = None
    key_id: KeyId | None = None


class WrapIn(Body, frozen=True, kw_only=True):
    """``file_key``: the 16-byte file key of an age file, made by the caller."""

    file_key: bytes
    context: ContextIn = None
    key_id: KeyId | None = None


class WrapOut(UsedKey, frozen=True, kw_only=True):
    """``stanza``: one recipient stanza as header text, with a line feed at its end."""

    stanza: bytes


class UnwrapIn(Body, frozen=True, kw_only=True):
    """``stanzas``: the recipient stanzas of a header, as text. ``key_id``: refuse files of any other key.

    ``nonce``: the 16 bytes between header and payload. With them the origin of every file is proven.
    """

    stanzas: bytes
    nonce: bytes | None = None
    context: ContextIn = None
    key_id: KeyId | None = None


class UnwrapOut(UsedKey, frozen=True, kw_only=True):
    """``origin`` is ``foreign`` unless the stanzas prove that this service wrapped the key."""

    file_key: bytes
    origin: Origin


# -- batch -------------------------------------------------------------------------------------------


class JobItem(Body, frozen=True, kw_only=True):
    """One item of a job: ``plaintext`` for encrypt, ``ciphertext`` for all other kinds."""

    plaintext: bytes | None = None
    ciphertext: bytes | None = None
    context: ContextIn = None


class BatchItem(JobItem, frozen=True, kw_only=True):
    """One call of a batch: ``plaintext`` for encrypt, ``ciphertext`` for all other operations."""

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
    file_id: str | UnsetType = UNSET
    error: ErrorCode | UnsetType = UNSET


class BatchOut(Answer, frozen=True, kw_only=True):
    """The outcome of each item.

    ``retry_after_s``: the batch used up the requests of the tenant, whose next one is refused for so long.
    """

    results: list[BatchResult]
    failed: int
    retry_after_s: float | UnsetType = UNSET


# -- jobs --------------------------------------------------------------------------------------------


class JobIn(Body, frozen=True, kw_only=True):
    """A job over bulk ``items``, or from a ``source`` to a ``target``.

    Source and target are ``file:///…`` under an allowed root, or ``s3://bucket/key`` in a configured bucket.

    A ``source`` with ``*`` selects many files: ``*`` matches any characters within a name, ``**`` any number
    of directories. The ``target`` is then a directory that ends in ``/``. Relative paths are kept; encrypt
    appends ``.age``, decrypt removes it. To rewrap or reseal in place, omit ``target`` and set ``overwrite``.
    Rewrap and reseal of many files skip those on the newest key version. ``dry_run`` only counts files;
    ``report`` of the job has the counts.

    ``priority`` defaults to ``normal``. No other job starts while a ``high`` job waits; a ``low`` job starts
    only if no other job waits. ``callback`` is a webhook endpoint of the settings, called when the job ends.
    A job fails if it has not started by ``start_by``, or not ended by ``run_by``. Its result is kept for
    ``keep_for`` seconds after its end. ``ttl_s``, in seconds from submission, stands for all three.
    ``release`` ``after_fetch`` deletes the result a minute after it was fetched whole.

    Jobs can be listed by their ``labels``. Answers and events repeat ``labels`` and ``metadata``; neither is
    for secrets.
    """

    kind: JobKind
    items: list[JobItem] | None = None
    source: str | None = None
    target: str | None = None
    overwrite: bool | None = None
    key_id: KeyId | None = None
    context: ContextIn = None
    new_context: ContextIn = None
    start_by: Moment | None = None
    run_by: Moment | None = None
    keep_for: KeepFor | None = None
    ttl_s: Annotated[int, Meta(ge=60, le=30 * 24 * 3600)] | None = None
    dry_run: bool | None = None
    priority: Priority | None = None
    callback: EndpointName | None = None
    release: Release | None = None
    labels: Labels | None = None
    metadata: Metadata | None = None
    group: GroupIn | None = None


class JobLinks(Answer, frozen=True, kw_only=True, rename={"self_": "self"}):
    self_: str
    result: str


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
    """An old key version: the number of files found on it, and of those left on it."""

    key_id: str
    key_version: str
    found: int
    left: int


class Report(Answer, frozen=True, kw_only=True):
    """Numbers of files of a rewrap or reseal of many files, while it runs or at its end.

    With ``dry_run`` no file is changed, and ``changed`` counts those that would be. Files on the ``newest``
    version and ``foreign`` files are never changed.
    """

    dry_run: bool
    changed: int
    newest: int
    foreign: int
    failed: int
    older: list[OlderVersion]


class FailedItem(Answer, frozen=True, kw_only=True):
    """An item or file that failed: its index in the result, and its error code."""

    index: int
    code: str


class JobError(Answer, frozen=True, kw_only=True):
    """The reason why a job failed, and what to do. ``items`` are the first items or files that failed."""

    code: str
    detail: str | UnsetType = UNSET
    hint: str | UnsetType = UNSET
    items: list[FailedItem] | UnsetType = UNSET


class JobOut(Answer, frozen=True, kw_only=True):
    """A job. ``submitter`` is the name of the credential that submitted it.

    ``waits_for`` names a feature that only newer workers have: the job is queued until one takes it.

    ``file_id`` is that of the file that an upload or a single source became, or that it was.
    ``started_at`` is the time of the first attempt. ``released_at`` is the time from which on the result is
    deleted because its reader released it.
    ``cancelling``: it was asked to stop, and a worker may still be at work until the state is ``cancelled``.
    ``expires_at`` is the time at which the result is deleted; before the end, the latest such time.
    """

    job_id: str
    kind: JobKind
    state: JobState
    priority: Priority = "normal"
    attempt: int
    progress: JobProgress
    created_at: str
    expires_at: str
    start_by: str | UnsetType = UNSET
    run_by: str | UnsetType = UNSET
    cancelling: bool | UnsetType = UNSET
    not_before: str | UnsetType = UNSET
    waits_for: str | UnsetType = UNSET
    started_at: str | UnsetType = UNSET
    ended_at: str | UnsetType = UNSET
    released_at: str | UnsetType = UNSET
    submitter: str | UnsetType = UNSET
    key_id: str | UnsetType = UNSET
    file_id: str | UnsetType = UNSET
    labels: Labels | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET
    group: str | UnsetType = UNSET
    error: JobError | None = None
    report: Report | UnsetType = UNSET
    links: JobLinks


class JobList(Answer, frozen=True, kw_only=True):
    jobs: list[JobOut]
    next: str | None = None


class JobsIn(Body, frozen=True, kw_only=True):
    job_ids: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(min_length=1, max_length=1000)]


class JobsOut(Answer, frozen=True, kw_only=True):
    """The jobs asked for. ``unknown`` are ids of jobs that do not exist for this caller."""

    jobs: list[JobOut]
    unknown: list[str]


class ItemResult(Answer, frozen=True, kw_only=True):
    """One line of an NDJSON result: an item of a bulk job, or a file of a job over many files.

    ``outcome`` is that of a rewrap or reseal; a refused file has an ``error`` instead.
    """

    index: int
    file_id: str | UnsetType = UNSET
    source: str | UnsetType = UNSET
    target: str | UnsetType = UNSET
    outcome: Outcome | UnsetType = UNSET
    ciphertext: bytes | UnsetType = UNSET
    plaintext: bytes | UnsetType = UNSET
    error: ErrorCode | UnsetType = UNSET


class IntakeOut(Answer, frozen=True, kw_only=True):
    """Recipient for the encryption of ``kms.submit`` messages, and the accepted version of the message."""

    recipient: str
    key_version: str
    version: int
