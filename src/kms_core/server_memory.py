"""Locks the memory of a server's first process, and logs the result."""

import structlog

from kms_core import secure_memory
from kms_core.secure_memory import ADVICE

_log = structlog.get_logger(__name__)


def protect(*, strict: bool) -> None:
    """Lock the memory of this process and log the result; a failure is a warning if ``strict``."""
    obstacle = secure_memory.lock()
    if obstacle is None:
        _log.info("memory.protected", dumpable=False, locked=True)
        return
    log = _log.warning if strict else _log.info
    log("memory.protected", dumpable=False, locked=False, reason=obstacle, advice=ADVICE[obstacle])
