"""Locks the memory of a server's processes, and reports the result in log and metrics."""

import structlog

from kms_core import secure_memory
from kms_core.observability import metrics
from kms_core.secure_memory import ADVICE, Obstacle

_log = structlog.get_logger(__name__)


def protect(*, strict: bool) -> None:
    """Lock the memory of this process and log the result; a failure is a warning if ``strict``."""
    obstacle = lock_again()
    if obstacle is None:
        _log.info("memory.protected", dumpable=False, locked=True)
        return
    log = _log.warning if strict else _log.info
    log("memory.protected", dumpable=False, locked=False, reason=obstacle, advice=ADVICE[obstacle])


def lock_again() -> Obstacle | None:
    """Lock the memory of a forked process, which inherits no lock; returns None, or the obstacle."""
    obstacle = secure_memory.lock()
    metrics.MEMORY_PROTECTED.labels("no_dumps").set(1)  # or the process would not have started
    metrics.MEMORY_PROTECTED.labels("locked").set(obstacle is None)
    return obstacle
