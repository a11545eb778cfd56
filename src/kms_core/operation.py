"""Results of ``Kms``, and the recorder of each operation: audit record, metrics, usage counters and trace."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Self

from kms_core import audit
from kms_core.age import stream
from kms_core.audit import AuditRecord, AuditWriter, record_of
from kms_core.auth.policy import Principal
from kms_core.backends.wrap_keys import wrap_key_name
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef
from kms_core.observability import metrics, tracing
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable, KmsError

Origin = Literal["service", "foreign"]
_SEALING: Final = frozenset({"encrypt", "generate_data_key", "rewrap", "reseal", "wrap"})


class Operation:
    """A running operation and its audit record; as a context manager it records its end.

    A class and no generator, which would double the cost of each call.
    """

    __slots__ = ("_end", "_span", "context", "key_id", "record", "started", "who")

    def __init__(
        self, who: Principal, context: Context, key_id: str | None, record: AuditRecord, end: "RecordEnd"
    ) -> None:
        self.started = time.perf_counter()
        self.who, self.context, self.key_id, self.record = who, context, key_id, record
        self._span, self._end = tracing.span(f"kms.{record.operation}"), end

    def note_key(self, key: KeyRef, origin: str = "") -> None:
        """Put the key into the record as soon as it is known, so that refusals name it too.

        ``origin`` is that of the file that was read; without it the record keeps the one that it has.
        """
        self.record.key_id, self.record.key_version = key.key_id, key.version
        self.record.backend, self.record.origin = key.backend, origin or self.record.origin

    def note_file(self, nonce: bytes) -> str:
        """Put the id of the file into the record as soon as it is known; returns it."""
        self.record.file_id = binding.file_id(nonce)
        return self.record.file_id

    def note_wraps(self, wrapped: Iterable[bytes]) -> None:
        """Name the shared wrap keys that opened the file, or that sealed the result."""
        self.record.wrap_key = ",".join(map(wrap_key_name, filter(None, wrapped)))

    def __enter__(self) -> Self:
        self._span.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if exc is None:
                self._end(self, "ok")
            elif isinstance(exc, KmsError):
                self._end(self, exc.code)
            elif not self.record.stage:
                self._end(self, KmsError.code)
        finally:
            self._span.__exit__(kind, exc, trace)


RecordEnd = Callable[[Operation, str], None]


class UsageCounters:
    """Operations by result, and messages and bytes sealed by each key version. Safe in several threads.

    They are counted in memory and flushed to Redis every 2 seconds (``UsageFlush``), so a call needs no round
    trip. A killed process loses the counts of the last seconds: the sums are lower bounds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def note(self, record: AuditRecord, result: str) -> None:
        """Count an operation. A message is one seal under a key version; bytes are those of its plaintext."""
        with self._lock:
            self._counts[f"{metrics.OPERATIONS} {record.operation} {result}"] += 1
            self._counts[f"{metrics.OF_TENANT} {record.tenant} {record.operation} {result}"] += 1
            if result == "ok" and record.operation in _SEALING:
                version = f"{record.key_id} {record.key_version} {record.backend}"
                self._counts[f"{metrics.MESSAGES} {version}"] += 1
                self._counts[f"{metrics.BYTES} {version}"] += record.bytes_in

    def take(self) -> dict[str, int]:
        """Remove and return the counts; ``put_back`` returns them if they could not be flushed."""
        with self._lock:
            taken, self._counts = dict(self._counts), Counter()
        return taken

    def put_back(self, counts: Mapping[str, int]) -> None:
        with self._lock:
            self._counts.update(counts)

    def peek(self) -> dict[str, int]:
        """The counts that are not flushed yet."""
        with self._lock:
            return dict(self._counts)


class OperationRecorder:
    """Appends operations to the audit log first, then to metrics and usage counters."""

    def __init__(self, audit_log: AuditWriter, usage: UsageCounters) -> None:
        self._audit_log = audit_log
        self._usage = usage

    def recorded(
        self, operation: str, who: Principal, context: Context, key_id: str | None, *, bytes_in: int = 0
    ) -> Operation:
        """Record the operation in the block: one audit record and one count, before its result is returned.

        After ``audit.begin_effect`` only success and KmsError are outcomes: after any other error the effect
        is unknown, and the intent stays without an outcome. Raises AuditUnavailable in place of a result.
        """
        record = record_of(who, operation)
        record.bytes_in, record.context = bytes_in, self._audit_log.conceal(who.tenant, context)
        return Operation(who, context, key_id, record, self._append)

    def _append(self, call: Operation, result: str) -> None:
        record = call.record
        seconds = time.perf_counter() - call.started
        record.result, record.duration_us = result, round(seconds * 1e6)
        counted = AuditUnavailable.code
        try:
            audit.append(self._audit_log, record)
            counted = result
        finally:
            mode = "job" if record.job_id else "sync"
            metrics.operation_seconds(record.operation, record.backend, mode, counted).observe(seconds)
            metrics.payload_bytes(record.operation, "in").inc(record.bytes_in)
            metrics.payload_bytes(record.operation, "out").inc(record.bytes_out)
            self._usage.note(record, counted)
            tracing.note(
                operation=record.operation,
                key_id=record.key_id,
                backend=record.backend,
                bytes_in=record.bytes_in,
                bytes_out=record.bytes_out,
                result=counted,
            )


@dataclass(frozen=True, slots=True)
class Sealed:
    """A ciphertext, empty if a file received it, the key that sealed it, and its id (``binding.file_id``)."""

    ciphertext: bytes = field(repr=False)
    key: KeyRef
    file_id: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A plaintext, empty if a file received it, its key, whether this service sealed it, and its file."""

    plaintext: bytes = field(repr=False)
    key: KeyRef
    origin: Origin
    file_id: str


@dataclass(frozen=True, slots=True)
class DataKey:
    """Random bytes in clear and sealed, and the id of the ciphertext."""

    plaintext: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)
    key: KeyRef
    file_id: str


@dataclass(frozen=True, slots=True)
class WrappedFileKey:
    """A file key wrapped for a header that an age tool writes: one stanza as text."""

    stanza: bytes
    key: KeyRef


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """The 16-byte file key and the 16-byte payload nonce of a file, with the key that unwrapped it."""

    file_key: bytes = field(repr=False)
    nonce: bytes = field(repr=False)
    key: KeyRef
    origin: Origin

    @property
    def payload_key(self) -> bytes:
        return stream.payload_key(self.file_key, self.nonce)


@dataclass(frozen=True, slots=True)
class KeyVersionStatus:
    """The key that a header names; ``key_version`` is empty where the backend has no such version."""

    key_id: str
    key_version: str
    newest: bool
