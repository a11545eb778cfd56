"""Locks the memory of a server's processes, and says in its log and metrics whether that was possible."""

import structlog

from kms_core import secure_memory
from kms_core.observability import metrics
from kms_core.secure_memory import ADVICE, Obstacle

_log = structlog.get_logger(__name__)


def protect(*, strict: bool) -> None:
    """Lock the memory of this process and log what protects it; not locked is a warning if ``strict``."""
    obstacle = lock_again()
    if obstacle is None:
        _log.info("memory.protected", dumpable=False, locked=True)
        return
    log = _log.warning if strict else _log.info
    log("memory.protected", dumpable=False, locked=False, reason=obstacle, advice=ADVICE[obstacle])


def lock_again() -> Obstacle | None:
    """Lock the memory of a process that was just forked, which inherits no lock; None, or the obstacle."""
    obstacle = secure_memory.lock()
    metrics.MEMORY_PROTECTED.labels("no_dumps").set(1)  # else it would not have started
    metrics.MEMORY_PROTECTED.labels("locked").set(obstacle is None)
    return obstacle
