"""An audit log that keeps nothing, in every Python that starts with this folder on its path.

No setting allows that: it is the floor of a benchmark, and nothing else should run with it.
"""

from kms_core.audit import AuditRecord
from kms_core.audit.log import AuditLog


def _nothing(log: AuditLog, record: AuditRecord) -> str:
    del log, record
    return ""


AuditLog.append = _nothing  # type: ignore[assignment, method-assign]  # see above
