"""Names of keys in Redis."""

from typing import Final

PREFIX: Final = "kms:"


def job_key(job_id: str) -> str:
    """Return the key of a job's record."""
    return f"{PREFIX}job:{job_id}"


def busy_key(worker: str) -> str:
    """The key of a worker's last sign of work; ``worker`` is ``<its name>/<pid of the child>``."""
    return f"{PREFIX}busy:{worker.partition('/')[0]}"
