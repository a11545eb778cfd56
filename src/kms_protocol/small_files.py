"""Reads files of settings, keys and credentials: they are small, and a larger one is refused unread."""

import errno
from pathlib import Path
from typing import Final

MOST_BYTES: Final = 1024 * 1024


def read(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The whole file, which may be a pipe. Raises OSError, EFBIG for one above ``most_bytes``."""
    with path.open("rb") as file:
        found = file.read(most_bytes + 1)
    if len(found) > most_bytes:
        raise OSError(errno.EFBIG, f"it is above {most_bytes // 1024} KiB", str(path))
    return found


def text(path: Path) -> str:
    """As ``read``, as UTF-8. Raises OSError, UnicodeDecodeError."""
    return read(path).decode("utf-8")
