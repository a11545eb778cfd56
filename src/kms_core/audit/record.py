"""What a process says of itself and its operations: the record, and who is asking. Knows no file."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Final, Literal, Protocol

import msgspec

from kms_core.observability import logs, metrics
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable, KmsError

request_id: Final[ContextVar[str]] = ContextVar("request_id", default="")
job_id: Final[ContextVar[str]] = ContextVar("job_id", default="")
source: Final[ContextVar[str]] = ContextVar("source", default="")
logs.identify(request_id=request_id, job_id=job_id)


@contextmanager
def identified(request: str, job: str = "") -> Iterator[None]:
    """Name the request and the job in all that is logged and recorded until the block ends."""
    tokens = request_id.set(request), job_id.set(job)
    try:
        yield
    finally:
        request_id.reset(tokens[0])
        job_id.reset(tokens[1])


DENIED: Final = "denied"
READ: Final = "audit.read"
_MOST_FILTER: Final = 500
OK: Final = "ok"
COUNTED: Final = "counted"
DENIALS: Final = frozenset({"unauthenticated", "forbidden", "path_refused", "foreign_refused", "unknown_key"})


class Noted:
    """What was recorded for one request; threads that work for it share the object.

    ``denied`` records an attempt that is turned away with a code before any operation began.
    """

    __slots__ = ("audit_id", "denied")

    def __init__(self, denied: Callable[[str], None] = lambda _code: None) -> None:
        self.audit_id = ""
        self.denied = denied


_JOB_ID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
noted: Final[ContextVar[Noted | None]] = ContextVar("noted", default=None)


class AuditRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One operation. ``result`` is ``ok`` or an error code; time, number and chain are the trail's to add.

    ``source`` is the address that the request came from, ``route`` the template of a denied one's path.
    ``count`` is set where one record stands for several denied items of a batch, and says how many; of a
    read of the log (``audit.read``) it says how many records were given, and ``filter`` what was asked for.
    ``context`` and ``new_context`` hold keyed hashes of the values. An operation with an effect outside the
    service has two records with one ``effect``: the ``intent`` before it and the ``outcome`` after it.
    """

    operation: str
    stage: Literal["", "intent", "outcome"] = ""
    effect: str = ""
    route: str = ""
    filter: str = ""
    source: str = ""
    principal: str
    tenant: str
    credential: str
    request_id: str = ""
    job_id: str = ""
    key_id: str = ""
    key_version: str = ""
    backend: str = ""
    origin: str = ""
    context: Mapping[str, str] = {}
    new_context: Mapping[str, str] = {}
    bytes_in: int = 0
    bytes_out: int = 0
    result: str = ""
    duration_us: int = 0
    count: int = 0


class AuditWriter(Protocol):
    """Where records go."""

    def conceal(self, tenant: str, context: Context) -> Mapping[str, str]:
        """The keys of a context, each with a keyed hash of its value, equal for equal ones of a tenant."""

    def append(self, record: AuditRecord) -> str:
        """Store the record; its id, or nothing where it waits (``together``).

        ``COUNTED`` for a denial that has no record of its own: those of a group above a bound share one.
        Raises AuditUnavailable if it may not be there afterwards.
        """

    def together(self) -> AbstractContextManager[None]:
        """Records that this thread appends meanwhile may wait for each other and the disk until the end.

        No result may leave before that. Raises AuditUnavailable at the end if one of them is not there.
        """

    def check(self) -> None:
        """Raise AuditUnavailable if a record could not be written now."""


class Who(Protocol):
    """A principal, as far as a record names it."""

    @property
    def name(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def credential(self) -> str: ...


@contextmanager
def effect(trail: AuditWriter, who: Who, operation: str, name: str) -> Iterator[None]:
    """An intent before an effect that others see, and its outcome after it.

    ``name`` says which effect, so that whoever finishes what a killed process began writes the outcome under
    the same name. Nothing but a KmsError is an outcome: after anything else nobody knows, and an intent
    without outcome says so. Raises AuditUnavailable, before the effect if the intent cannot be written.
    """
    _append(trail, _of(who, operation, stage="intent", effect=name))
    try:
        yield
    except KmsError as exc:
        _append(trail, _of(who, operation, stage="outcome", effect=name, result=exc.code))
        raise
    _append(trail, _of(who, operation, stage="outcome", effect=name, result=OK))


@contextmanager
def recorded(trail: AuditWriter, who: Who, operation: str, job: str) -> Iterator[None]:
    """One record of what is done with a job, by how it ends. Raises AuditUnavailable: answer nothing then.

    ``job`` is what the caller named. If no job can be called so, it is left out: it may be anything.
    """
    job = job if _JOB_ID.fullmatch(job) else ""
    try:
        yield
    except KmsError as exc:
        _append(trail, _of(who, operation, job=job, result=exc.code))
        raise
    _append(trail, _of(who, operation, job=job, result=OK))


def read(trail: AuditWriter, who: Who, asked: Mapping[str, str], count: int) -> str:
    """Record a read of the log, before the records leave: who, by which filter, and how many there are.

    The id of the record. Raises AuditUnavailable: give no records then.
    """
    text = "&".join(f"{name}={value}" for name, value in asked.items() if value)[:_MOST_FILTER]
    made = msgspec.structs.replace(_of(who, READ, result=OK), filter=text, count=count)
    return _append(trail, made)


def denied(trail: AuditWriter, who: Who | None, route: str, code: str) -> None:
    """An attempt that was turned away before any operation began. ``route`` is the template, never a path."""
    _append(trail, _of(who, DENIED, route=route, result=code))


def turned_away(code: str) -> None:
    """Before a request is answered with an error: record a denial that no operation has recorded.

    Raises AuditUnavailable.
    """
    note = noted.get()
    if note is not None and code in DENIALS and not note.audit_id:
        note.denied(code)


def _of(  # noqa: PLR0913 -- the fields of a record
    who: Who | None,
    operation: str,
    *,
    stage: Literal["", "intent", "outcome"] = "",
    effect: str = "",
    route: str = "",
    job: str = "",
    result: str = "",
) -> AuditRecord:
    return AuditRecord(
        operation=operation,
        stage=stage,
        effect=effect,
        route=route,
        source=source.get(),
        principal=who.name if who else "",
        tenant=who.tenant if who else "",
        credential=who.credential if who else "",
        request_id=request_id.get(),
        job_id=job or job_id.get(),
        result=result,
    )


def _append(trail: AuditWriter, record: AuditRecord) -> str:
    try:
        name = trail.append(record)
    except AuditUnavailable:
        metrics.AUDIT_EVENTS.labels("failed").inc()
        raise
    metrics.count_record()
    return name
