"""The audit log: one JSON line per operation, chained and signed, appended before the result leaves.

A record holds principal, operation, key, sizes, result and duration, and the context: its keys, and keyed
hashes of its values. If a record cannot be written, AuditUnavailable is raised and the result is withheld.

Here are the records, the functions that append them, and the request that they belong to. ``chain`` has the
format of lines, ``log`` the writer, ``maintenance`` its periodic work (checkpoints, anchors, retention).
``query`` and ``verification`` need only the files. Format and guarantees: docs/audit.md.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Final, Literal, Protocol

import msgspec

from kms_core.auth.policy import Principal
from kms_core.observability import logs, metrics
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable, KmsError

request_id: Final[ContextVar[str]] = ContextVar("request_id", default="")
job_id: Final[ContextVar[str]] = ContextVar("job_id", default="")
source: Final[ContextVar[str]] = ContextVar("source", default="")
logs.identify(request_id=request_id, job_id=job_id)
DENIED: Final = "denied"
READ: Final = "audit.read"
_MOST_FILTER: Final = 500
OK: Final = "ok"
COUNTED: Final = "counted"
DENIALS: Final = frozenset({"unauthenticated", "forbidden", "path_refused", "foreign_refused", "unknown_key"})


@contextmanager
def identified(request: str, job: str = "") -> Iterator[None]:
    """Name the request and the job in every log line and audit record until the block ends."""
    tokens = request_id.set(request), job_id.set(job)
    try:
        yield
    finally:
        request_id.reset(tokens[0])
        job_id.reset(tokens[1])


class Noted:
    """The last audit record of one request; threads that work for the request share the object.

    ``denied`` records an attempt that was denied, with its error code, before any operation began.
    """

    __slots__ = ("audit_id", "denied")

    def __init__(self, denied: Callable[[str], None] = lambda _code: None) -> None:
        self.audit_id = ""
        self.denied = denied


_JOB_ID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
noted: Final[ContextVar[Noted | None]] = ContextVar("noted", default=None)


class AuditRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One operation. ``result`` is ``ok`` or an error code; the audit log adds time, number and chain.

    ``source`` is the address that the request came from, ``route`` the template of a denied request's path.
    ``count`` is the number of failed items of a batch where one record stands for several; in a read of the
    log (``audit.read``) it is the number of records returned, and ``filter`` the filter of the read.
    ``file_id`` is the id of the file, ``new_file_id`` that of the result of a reseal, and ``stanzas`` the
    digest of stanzas without their file (see ``envelope.binding``). ``wrap_key`` names the shared key of the
    file (see ``backends.wrap_keys``), several with a comma between.
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
    wrap_key: str = ""
    file_id: str = ""
    new_file_id: str = ""
    stanzas: str = ""
    context: Mapping[str, str] = {}
    new_context: Mapping[str, str] = {}
    bytes_in: int = 0
    bytes_out: int = 0
    result: str = ""
    duration_us: int = 0
    count: int = 0


class AuditWriter(Protocol):
    """Stores audit records."""

    def conceal(self, tenant: str, context: Context) -> Mapping[str, str]:
        """The keys of a context, each with a keyed hash of its value: equal for equal values of a tenant."""

    def append(self, record: AuditRecord) -> str:
        """Store the record; returns its id, or an empty text while it waits for its group (``together``).

        Returns ``COUNTED`` for a failure without a record of its own: those of a group above a bound share
        one. Raises AuditUnavailable if the record may not be stored.
        """

    def together(self) -> AbstractContextManager[None]:
        """Group the records that this thread appends in the block: they may be written at its end only.

        No result may leave before that. Raises AuditUnavailable at the end if a record could not be stored.
        """

    def check(self) -> None:
        """Raise AuditUnavailable if a record could not be written now."""


def append(log: AuditWriter, record: AuditRecord) -> str:
    """Store and count a record; its id, as ``AuditWriter.append``. Raises AuditUnavailable."""
    try:
        name = log.append(record)
    except AuditUnavailable:
        metrics.AUDIT_EVENTS.labels("failed").inc()
        raise
    if name != COUNTED:
        metrics.AUDIT_RECORD.inc()
    return name


def effect_name(subject: str) -> str:
    """A unique name for one effect on ``subject``."""
    return f"{subject}-{os.urandom(8).hex()}"


def begin_effect(log: AuditWriter, record: AuditRecord, name: str) -> None:
    """Append the intent of an effect outside the service, and make ``record`` that of its outcome.

    ``name`` is unique to the effect. The caller appends the outcome once it is known: an intent without an
    outcome says that it is not. Raises AuditUnavailable, before the effect.
    """
    append(log, msgspec.structs.replace(record, stage="intent", effect=name))
    record.stage, record.effect = "outcome", name


@contextmanager
def effect(
    log: AuditWriter, who: Principal, operation: str, name: str, failures: type[BaseException] = KmsError
) -> Iterator[None]:
    """Record the intent of an effect before the block, and its outcome after it.

    A process that finishes the work of a killed one uses the same ``name``. Only success and ``failures`` are
    outcomes. Raises AuditUnavailable, before the effect if the intent cannot be written.
    """
    record = record_of(who, operation)
    begin_effect(log, record, name)
    with _ending(log, record, failures):
        yield


@contextmanager
def recorded(log: AuditWriter, who: Principal, operation: str, job: str) -> Iterator[AuditRecord]:
    """Record an operation on a job, with its result. Raises AuditUnavailable: then no answer may leave.

    Yields the record, in which the block may name another job.

    ``job`` comes from the caller. Text that cannot be the id of a job is left out of the record.
    """
    record = record_of(who, operation, job=job if _JOB_ID.fullmatch(job) else "")
    with _ending(log, record):
        yield record


@contextmanager
def _ending(
    log: AuditWriter, record: AuditRecord, failures: type[BaseException] = KmsError
) -> Iterator[None]:
    """Append the record at the end of the block, with ``ok`` or the code of a failure as its result."""
    record.result = OK
    try:
        yield
    except failures as exc:
        record.result = exc.code if isinstance(exc, KmsError) else KmsError.code
        append(log, record)
        raise
    append(log, record)


def read(log: AuditWriter, who: Principal, asked: Mapping[str, str], count: int) -> str:
    """Record a read of the log, before its ``count`` records leave; ``asked`` is the filter.

    Returns the id of the record. Raises AuditUnavailable: then no record may leave.
    """
    record = record_of(who, READ, result=OK)
    record.filter = "&".join(f"{name}={value}" for name, value in asked.items() if value)[:_MOST_FILTER]
    record.count = count
    return append(log, record)


def denied(log: AuditWriter, who: Principal | None, route: str, code: str) -> None:
    """Record an attempt that was denied before any operation began. ``route`` is a template, never a path."""
    append(log, record_of(who, DENIED, route=route, result=code))


def record_denial(code: str) -> None:
    """Record a denial that no operation has recorded, before a request is answered with an error.

    Raises AuditUnavailable.
    """
    note = noted.get()
    if note is not None and code in DENIALS and not note.audit_id:
        note.denied(code)


def record_of(
    who: Principal | None, operation: str, *, route: str = "", job: str = "", result: str = ""
) -> AuditRecord:
    """A record of the current request; ``who`` is None if its caller is not known."""
    return AuditRecord(
        operation=operation,
        route=route,
        source=source.get(),
        principal=who.name if who else "",
        tenant=who.tenant if who else "",
        credential=who.credential if who else "",
        request_id=request_id.get(),
        job_id=job or job_id.get(),
        result=result,
    )
