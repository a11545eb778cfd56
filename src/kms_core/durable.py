"""Directory entries that survive a power cut."""

import os
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Write the entries of a directory to disk: a file that was made or renamed there keeps its name.

    fsync(2): syncing a file does not sync the directory that names it. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
