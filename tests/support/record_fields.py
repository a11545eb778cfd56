"""The plain fields of a record in Redis, and how others write to them."""

from typing import Final

from kms_core.jobs.model import Job
from kms_core.jobs.store.store import JobStore
from support.job_stores import forge

FIELDS: Final = (
    *(name for name in Job.__struct_fields__ if name not in {"job_id", "tallies"}),
    *("sealed", "lease_until", "asked", "owed", "parts_left", "work_bytes", "deferrals", "worker"),
    *("resources", "needs", "group", "run_by"),
    *("settled", "granted", "commit", "log", "ended_at", "tally:changed", "tally:found k/1", "unheard-of"),
)
MISSING: Final = b"<missing>"


def put(store: JobStore, job_id: str, field: str, value: bytes) -> None:
    """Write it into a field, or take the field out."""
    if value == MISSING:
        store.redis.hdel(f"kms:job:{job_id}", field)
    else:
        forge(store, job_id, **{field: value})
