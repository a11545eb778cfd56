"""Threads and forks in one process: a fork must not copy a lock that a thread of ours holds at that moment.

Celery's parent forks a child whenever one died, while the caretaker and its like run in threads beside it.
The child would inherit, for example, the lock of the metrics as taken, and hang at its first count.
"""

import os
import threading
from typing import Final

between_forks: Final = threading.Lock()
"""Held by each thread of the parent while it works, and by the parent while it forks."""


def install() -> None:
    """Make every fork of this process wait until no thread holds ``between_forks``."""
    os.register_at_fork(
        before=between_forks.acquire,
        after_in_parent=between_forks.release,
        after_in_child=between_forks.release,
    )
