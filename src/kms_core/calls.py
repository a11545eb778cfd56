"""One operation of ``Kms`` under way: its audit record, its count and its time, whatever its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kms_core import audit, metrics
from kms_core.audit import Audit, Record
from kms_core.context import Context
from kms_core.envelope.binding import KeyRef
from kms_core.errors import KmsError
from kms_core.policy import Principal
from kms_core.tally import Tally


class Call:
    """Who asked for what, its record, and when it began."""

    __slots__ = ("context", "key_id", "record", "started", "who")

    def __init__(
        self, operation: str, who: Principal, context: Context, key_id: str | None, *, bytes_in: int
    ) -> None:
        self.started = time.perf_counter()
        self.who, self.context, self.key_id = who, context, key_id
        self.record = Record(
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


class Calls:
    """Where operations go on record: the audit trail first, then the metrics and the counts."""

    def __init__(self, trail: Audit, tally: Tally) -> None:
        self._trail = trail
        self._tally = tally

    @contextmanager
    def recorded(
        self, operation: str, who: Principal, context: Context, key_id: str | None, *, bytes_in: int = 0
    ) -> Iterator[Call]:
        """One audit record and one count per operation, whatever its end; appended before the result.

        Raises AuditUnavailable: no record, no result.
        """
        call = Call(operation, who, context, key_id, bytes_in=bytes_in)
        call.record.context = self._trail.conceal(who.tenant, context)
        try:
            yield call
        except KmsError as exc:
            self._append(call, exc.code)
            raise
        except BaseException:
            self._append(call, KmsError.code)
            raise
        self._append(call, "ok")

    def _append(self, call: Call, result: str) -> None:
        record = call.record
        seconds = time.perf_counter() - call.started
        record.result, record.duration_us = result, round(seconds * 1e6)
        try:
            self._trail.append(record)
        except KmsError:
            metrics.AUDIT_EVENTS.labels("failed").inc()
            metrics.count_operation(record, "audit_unavailable", seconds)
            self._tally.note(record, "audit_unavailable")
            raise
        metrics.AUDIT_EVENTS.labels("ok").inc()
        metrics.count_operation(record, result, seconds)
        self._tally.note(record, result)
