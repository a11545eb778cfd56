"""The audit log: one JSON line per operation, chained and signed, appended before the result leaves.

A record holds principal, operation, key, sizes, result and duration, and the context: its keys, and keyed
hashes of its values. If a record cannot be written, AuditUnavailable is raised and the result is withheld.

``record`` has the records, ``chain`` the format of lines, ``log`` the writer, ``maintenance`` its periodic
work (checkpoints, anchors, retention). ``query`` and ``verification`` need only the files.
Format and guarantees: docs/audit.md.
"""

from kms_core.audit.log import AuditLog
from kms_core.audit.record import (
    AuditRecord,
    AuditWriter,
    Noted,
    append,
    begin_effect,
    denied,
    effect,
    effect_name,
    identified,
    job_id,
    noted,
    read,
    record_denial,
    recorded,
    request_id,
    source,
)

__all__ = [
    "AuditLog",
    "AuditRecord",
    "AuditWriter",
    "Noted",
    "append",
    "begin_effect",
    "denied",
    "effect",
    "effect_name",
    "identified",
    "job_id",
    "noted",
    "read",
    "record_denial",
    "recorded",
    "request_id",
    "source",
]
