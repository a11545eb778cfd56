"""Reads small files, such as settings, keys and credentials, with a limit on their size."""

import errno
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 1024 * 1024


def read(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file or pipe. Raises OSError, with EFBIG above ``max_bytes``."""
    with path.open("rb") as file:
        found = file.read(max_bytes + 1)
    if len(found) > max_bytes:
        raise OSError(errno.EFBIG, f"it is above {max_bytes // 1024} KiB", str(path))
    return found


def text(path: Path) -> str:
    """Read a file as UTF-8, with the default limit. Raises OSError, UnicodeDecodeError."""
    return read(path).decode("utf-8")
