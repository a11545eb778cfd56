"""Reads small files, such as settings, keys and credentials, with a limit on their size."""

import errno
import os
import stat
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 1024 * 1024
_AT_ONCE: Final = getattr(os, "O_NONBLOCK", 0)  # Windows has no such pipes


def at_once(path: str, flags: int) -> int:
    """Open a file without waiting for a program to open the other end of a pipe: an ``opener`` of ``open``.

    A later read of the pipe waits as usual while a program has it open for writing (fifo(7)). Raises OSError.
    """
    fd = os.open(path, flags | _AT_ONCE)
    if _AT_ONCE:
        os.set_blocking(fd, True)
    return fd


def read(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file, or a pipe to its end.

    Raises OSError, with EOVERFLOW above ``max_bytes``, with ENXIO for a pipe that no program has written to.
    """
    with open(path, "rb", opener=at_once) as file:
        found = file.read(max_bytes + 1)
        if not found and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.ENXIO, "it is a pipe, and no program has written to it", str(path))
    if len(found) > max_bytes:
        raise OSError(errno.EOVERFLOW, f"it is above {max_bytes // 1024} KiB", str(path))
    return found


def text(path: Path) -> str:
    """Read a file as UTF-8, with the default limit. Raises OSError, UnicodeDecodeError."""
    return read(path).decode("utf-8")
