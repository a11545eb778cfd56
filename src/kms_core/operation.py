"""One operation of ``Kms`` under way: its audit record, its count and its time, whatever its end."""

import os
import time
from collections.abc import Callable
from types import TracebackType

import msgspec

from kms_core import audit
from kms_core.audit import AuditRecord, AuditWriter
from kms_core.audit.record import COUNTED
from kms_core.auth.policy import Principal
from kms_core.envelope.binding import KeyRef
from kms_core.observability import metrics, tracing
from kms_core.observability.usage import UsageCounters
from kms_protocol.context import Context
from kms_protocol.errors import KmsError


class Operation:
    """Who asked for what, its record, and when it began."""

    __slots__ = ("context", "key_id", "record", "started", "who")

    def __init__(
        self, operation: str, who: Principal, context: Context, key_id: str | None, *, bytes_in: int
    ) -> None:
        self.started = time.perf_counter()
        self.who, self.context, self.key_id = who, context, key_id
        self.record = AuditRecord(
            operation=operation,
            principal=who.name,
            tenant=who.tenant,
            credential=who.credential,
            request_id=audit.request_id.get(),
            job_id=audit.job_id.get(),
            source=audit.source.get(),
            bytes_in=bytes_in,
        )

    def names(self, key: KeyRef, origin: str = "") -> None:
        """Note the key, as soon as it is known, so that refusals name it too."""
        self.record.key_id, self.record.key_version = key.key_id, key.version
        self.record.backend, self.record.origin = key.backend, origin


class Recorded:
    """Entered for the time of a call. A class, since a generator costs every call twice as much."""

    __slots__ = ("_append", "_call", "_span")

    def __init__(self, call: Operation, append: Callable[[Operation, str], None]) -> None:
        self._call, self._append = call, append
        self._span = tracing.span(f"kms.{call.record.operation}")

    def __enter__(self) -> Operation:
        self._span.__enter__()
        return self._call

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if exc is None:
                self._append(self._call, "ok")
            elif isinstance(exc, KmsError):
                self._append(self._call, exc.code)
            elif not self._call.record.stage:
                self._append(self._call, KmsError.code)
        finally:
            self._span.__exit__(kind, exc, trace)


class OperationRecorder:
    """Where operations go on record: the audit trail first, then the metrics and the counts."""

    def __init__(self, trail: AuditWriter, tally: UsageCounters) -> None:
        self._trail = trail
        self._tally = tally

    def recorded(
        self, operation: str, who: Principal, context: Context, key_id: str | None, *, bytes_in: int = 0
    ) -> Recorded:
        """One audit record and one count per operation, whatever its end; appended before the result.

        Of an effect (``sets_out``) success and a KmsError alone are outcomes: after anything else nobody
        knows, and an intent without outcome says so. Raises AuditUnavailable: no record, no result.
        """
        call = Operation(operation, who, context, key_id, bytes_in=bytes_in)
        call.record.context = self._trail.conceal(who.tenant, context)
        return Recorded(call, self.append)

    def sets_out(self, call: Operation) -> None:
        """Put on record that something others see is about to happen; the call's own record is the outcome.

        Raises AuditUnavailable, before the effect.
        """
        name = f"{call.record.key_id}-{os.urandom(8).hex()}"
        self._write(msgspec.structs.replace(call.record, stage="intent", effect=name))
        call.record.stage, call.record.effect = "outcome", name

    def append(self, call: Operation, result: str) -> None:
        """The end of a call."""
        record = call.record
        seconds = time.perf_counter() - call.started
        record.result, record.duration_us = result, round(seconds * 1e6)
        try:
            self._write(record)
        except KmsError:
            metrics.count_operation(record, "audit_unavailable", seconds)
            self._tally.note(record, "audit_unavailable")
            tracing.note(operation=record.operation, result="audit_unavailable")
            raise
        metrics.count_operation(record, result, seconds)
        self._tally.note(record, result)
        if tracing.is_on():
            tracing.note(
                operation=record.operation,
                key_id=record.key_id,
                backend=record.backend,
                bytes_in=record.bytes_in,
                bytes_out=record.bytes_out,
                result=result,
            )

    def _write(self, record: AuditRecord) -> None:
        try:
            is_record = self._trail.append(record) != COUNTED
        except KmsError:
            metrics.AUDIT_EVENTS.labels("failed").inc()
            raise
        if is_record:
            metrics.count_record()
