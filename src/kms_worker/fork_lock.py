"""Makes forks wait for threads: a forked process copies a lock that a thread holds as taken, for good.

Celery's parent forks a process whenever one died, while periodic threads run beside it. The forked process
would hang at its first count, for example, if a thread held the lock of the metrics.
"""

import os
import threading
from typing import Final

from kms_core.observability import buffered_metrics

between_forks: Final = threading.Lock()
"""Held by each thread of the parent while it works, and by the parent while it forks."""


def install() -> None:
    """Make every fork of this process wait until no thread holds ``between_forks`` or the metrics' lock."""
    buffered_metrics.protect_forks()
    os.register_at_fork(
        before=between_forks.acquire,
        after_in_parent=between_forks.release,
        after_in_child=between_forks.release,
    )
