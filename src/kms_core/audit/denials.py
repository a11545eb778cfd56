"""Bounds the audit records of denied items: a batch costs its sender little, and each record disk space."""

from collections.abc import Iterable
from typing import Final

import msgspec

from kms_core.audit.record import DENIALS, AuditRecord

MOST: Final = 10
"""How many denied items of one batch, or of one part of a bulk job, have a record each."""
_OF_ITEMS: Final[dict[str, object]] = {
    "key_id": "",
    "key_version": "",
    "backend": "",
    "origin": "",
    "context": {},
    "new_context": {},
}
"""The fields in which items of one batch may differ, and their values where they do."""


class Denials:
    """The denied items of one batch: the first ``MOST`` have a record each, the others one by result."""

    __slots__ = ("_recorded", "_summaries")

    def __init__(self) -> None:
        self._recorded = 0
        self._summaries: dict[tuple[str, str], AuditRecord] = {}

    def counts(self, record: AuditRecord) -> bool:
        """Count the record in a summary, if it is of a denial above the bound; else it is to be written."""
        if record.result not in DENIALS:
            return False
        self._recorded += 1
        if self._recorded <= MOST:
            return False
        kind = record.operation, record.result
        summary = self._summaries.get(kind)
        if summary is None:
            self._summaries[kind] = msgspec.structs.replace(record, count=1)
        else:
            _add(summary, record)
        return True

    @property
    def summaries(self) -> Iterable[AuditRecord]:
        """One record for each operation and result, with the number of items that it stands for."""
        return self._summaries.values()


def _add(summary: AuditRecord, record: AuditRecord) -> None:
    """Sizes and times are those of all items together; what is not the same for all is left out."""
    for name, nothing in _OF_ITEMS.items():
        if getattr(summary, name) != getattr(record, name):
            setattr(summary, name, nothing)
    summary.count += 1
    summary.bytes_in += record.bytes_in
    summary.duration_us += record.duration_us
