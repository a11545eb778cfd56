"""Files that get their names once they are whole, and are then on disk with them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_FLAGS: Final = _NEW | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def replacing(path: Path, *, overwrite: bool = True, locked: bool = False) -> Iterator[BinaryIO]:
    """A file (0600) that gets the name ``path`` when the block ends without an error.

    It is then complete and on disk, with its name. Without ``overwrite`` an existing file stays, and
    FileExistsError is raised. ``locked``: the caller excludes other writers, so the temporary file that a
    killed one left is removed. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{'tmp' if locked else os.urandom(4).hex()}")
    if locked:
        temporary.unlink(missing_ok=True)
    fd = os.open(temporary, _FLAGS, 0o600)
    try:
        with open(fd, "wb") as file:  # noqa: PTH123 -- a descriptor, not a path
            yield file
            file.flush()
            os.fsync(fd)
        if overwrite:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Write the entries of a directory to disk: a file that was created or renamed there keeps its name.

    fsync(2): syncing a file does not sync the directory that names it. Raises OSError. Does nothing on
    Windows, which opens no directories.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
