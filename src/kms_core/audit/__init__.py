"""The audit trail: one JSON line per operation, chained, signed, and appended before the result leaves.

A record holds who, what, which key, sizes, the outcome and how long it took; of a context the keys, and the
values as keyed hashes. If a line cannot be written, AuditUnavailable is raised and the result is withheld.

``record`` is what is written, ``chain`` what binds one line to all before it, ``trail`` the writer,
``keeper`` what happens beside it (checkpoints in time, anchors, copies, retention). ``verify``, ``receipt``
and ``reading`` need the files alone. Format and promises: docs/audit.md.
"""

from kms_core.audit.log import AuditLog, AuditLogRules
from kms_core.audit.record import (
    AuditRecord,
    AuditWriter,
    Noted,
    denied,
    effect,
    identified,
    job_id,
    noted,
    read,
    recorded,
    request_id,
    source,
    turned_away,
)

__all__ = [
    "AuditLog",
    "AuditLogRules",
    "AuditRecord",
    "AuditWriter",
    "Noted",
    "denied",
    "effect",
    "identified",
    "job_id",
    "noted",
    "read",
    "recorded",
    "request_id",
    "source",
    "turned_away",
]
