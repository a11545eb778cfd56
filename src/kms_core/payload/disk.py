"""Whole reads and writes at an offset, and room set aside for a file; knows nothing of what is in it."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final

from kms_protocol.errors import SpoolFull

_WORTH_RESERVING_BYTES: Final = 1024 * 1024
# On ext4 setting room aside saves a third of the write time. Memory file systems would zero every page.
_EXT4: Final = "ext4"
# Larger aligned writes make ext4 take huge pages, and a virtual machine that gives free ones back to its
# host pays for their first touch several times what the write costs. Elsewhere a slab goes out at once:
# pieces would only make the threads fight for the file's lock.
_EXT4_WRITE_BYTES: Final = 256 * 1024
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def read_into(fd: int, views: Sequence[memoryview], offset: int) -> bool:
    """Fill the views one after another from ``offset`` on; False if the file ends before they are full."""
    if os.preadv(fd, views, offset) == sum(map(len, views)):
        return True
    for view in views:  # the slow way, for file systems that give less than was asked for
        if not _read_view(fd, view, offset):
            return False
        offset += len(view)
    return True


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; SpoolFull without room."""
    width = _EXT4_WRITE_BYTES if _file_system(os.fstat(fd).st_dev) == _EXT4 else len(data)
    with room():
        while data:
            written = os.pwrite(fd, data[:width], offset)
            data, offset = data[written:], offset + written


def reserve(fd: int, size: int) -> None:
    """Grow a file to ``size`` bytes before it is written, in the way its file system likes best.

    SpoolFull without room, where the file system can tell beforehand.
    """
    status = os.fstat(fd)
    if size - status.st_size < _WORTH_RESERVING_BYTES or not stat.S_ISREG(status.st_mode):
        return
    with room():
        if _file_system(status.st_dev) == _EXT4:
            os.posix_fallocate(fd, status.st_size, size - status.st_size)
        else:
            os.ftruncate(fd, size)


def sync_folder(path: Path) -> None:
    """Wait until the names in a directory are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_view(fd: int, view: memoryview, offset: int) -> bool:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if not got:
            return False
        done += got
    return True


@contextmanager
def room() -> Iterator[None]:
    """Turns what the kernel says of a full disk, quota or file system into SpoolFull."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            raise SpoolFull("No room is left where the result is written; free some and try again") from exc
        raise


@lru_cache(maxsize=64)
def _file_system(device: int) -> str:
    """The type of the file system on a device, or "" where Linux does not tell (proc(5), mountinfo)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = Path("/proc/self/mountinfo")
    for line in mounts.read_text("utf-8", "replace").splitlines() if mounts.exists() else ():
        mount, _, details = line.partition(" - ")
        if mount.split(" ")[2] == number:
            return details.split(" ")[0]
    return ""
