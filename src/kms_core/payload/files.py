"""Sources and targets of payloads: several threads read and write them at byte positions.

``RangeSource`` and ``RangeTarget`` are the interfaces, ``FileRange`` and ``FileWriter`` implement them for
open files. Sizes and positions are in bytes; positions count from the start of the range.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol, Self

from kms_protocol.errors import InvalidRequest, SpoolFull

_RESERVE_FROM_BYTES: Final = 1024 * 1024
# On ext4 preallocation saves a third of the write time. Memory file systems would zero every page.
_EXT4: Final = "ext4"
# Larger aligned writes make ext4 use huge pages, whose first touch costs several times the write itself in a
# virtual machine that returns free memory to its host. On other file systems several small writes would only
# make the threads contend for the file's lock.
_EXT4_WRITE_BYTES: Final = 256 * 1024
_KERNEL_COPY_BYTES: Final = 8 * 1024 * 1024
NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a disk that may have room later, unlike EFBIG: no file of that size is ever allowed."""


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``. Raises SpoolFull."""
    width = _EXT4_WRITE_BYTES if _file_system(os.fstat(fd).st_dev) == _EXT4 else len(data)
    with full_disk_as_error():
        while data:
            written = os.pwrite(fd, data[:width], offset)
            data, offset = data[written:], offset + written


@contextmanager
def full_disk_as_error() -> Iterator[None]:
    """Raise SpoolFull in place of an OSError for a full disk or an exceeded quota."""
    try:
        yield
    except OSError as exc:
        if exc.errno in NO_SPACE:
            raise SpoolFull("The disk of the result is full; free some space and try again") from exc
        raise


@lru_cache(maxsize=64)
def _file_system(device: int) -> str:
    """The type of the file system on a device, from mountinfo (proc(5)); "" if it is not listed."""
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = Path("/proc/self/mountinfo")
    for line in mounts.read_text("utf-8", "replace").splitlines() if mounts.exists() else ():
        mount, _, details = line.partition(" - ")
        if mount.split(" ")[2] == number:
            return details.split(" ")[0]
    return ""


class RangeSource(Protocol):
    """A range of bytes that does not change while it is read. Safe for threads."""

    @property
    def size(self) -> int: ...

    def read_at(self, position: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``position`` on; fewer only at the end."""

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        """Fill the views one after another from ``position`` on. False if the range ends before."""

    def stamp(self) -> object:
        """A value that differs after a change. Raises InvalidRequest if the range no longer has its size."""

    def tail(self, position: int) -> Self:
        """The range from ``position`` on."""


class RangeTarget(Protocol):
    """A target of which each byte is written once. Safe for threads."""

    def reserve(self, size: int) -> None:
        """Set the final size before the payload is written. Raises SpoolFull."""

    def write_at(self, data: memoryview, position: int) -> None:
        """Write all of ``data``; the caller may change it afterwards. Raises SpoolFull."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """A range of an open file, from ``offset`` to the end of the file."""

    fd: int
    size: int
    offset: int = 0

    def read_at(self, position: int, length: int) -> bytes:
        return os.pread(self.fd, min(length, self.size - position), self.offset + position)

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        offset = self.offset + position
        if os.preadv(self.fd, views, offset) == sum(map(len, views)):
            return True
        for view in views:  # slower, for file systems that return less than requested
            while view:
                got = os.preadv(self.fd, [view], offset)
                if not got:
                    return False
                view, offset = view[got:], offset + got  # noqa: PLW2901 -- the rest of it
        return True

    def stamp(self) -> int:
        status = os.fstat(self.fd)
        if status.st_size != self.offset + self.size:
            raise source_changed_error()
        return status.st_mtime_ns

    def tail(self, position: int) -> "FileRange":
        return FileRange(self.fd, self.size - position, self.offset + position)


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """Bytes in memory, as a range."""

    data: memoryview

    @property
    def size(self) -> int:
        return len(self.data)

    def read_at(self, position: int, length: int) -> bytes:
        return bytes(self.data[position : position + length])

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        if position + sum(map(len, views)) > self.size:
            return False
        for view in views:
            view[:] = self.data[position : position + len(view)]
            position += len(view)
        return True

    def stamp(self) -> None:
        """Do nothing: they do not change."""

    def tail(self, position: int) -> "MemoryRange":
        return MemoryRange(self.data[position:])


@dataclass(frozen=True, slots=True)
class FileWriter:
    """An open file as a target."""

    fd: int

    def reserve(self, size: int) -> None:
        """Grow the file before it is written, in the way that is fastest on its file system.

        Raises SpoolFull where the file system can tell in advance.
        """
        status = os.fstat(self.fd)
        if size - status.st_size < _RESERVE_FROM_BYTES or not stat.S_ISREG(status.st_mode):
            return
        with full_disk_as_error():
            if _file_system(status.st_dev) == _EXT4:
                os.posix_fallocate(self.fd, status.st_size, size - status.st_size)
            else:
                os.ftruncate(self.fd, size)

    def write_at(self, data: memoryview, position: int) -> None:
        write_all(self.fd, data, position)


def copied_in_kernel(source: FileRange, fd: int, at: int | None = None) -> Iterator[int]:
    """Copy a range to position ``at`` of a file, by reflink if it can be; yield the bytes of each step.

    Without ``at`` the range goes to the position of the descriptor, which moves. Ends early where the kernel
    cannot copy: two file systems, an old kernel, a full disk. The caller reads and writes the rest, which
    raises the error that remains.
    """
    done = 0
    with suppress(OSError):
        while done < source.size:
            step, to = min(_KERNEL_COPY_BYTES, source.size - done), None if at is None else at + done
            copied = os.copy_file_range(source.fd, fd, step, source.offset + done, to)
            if not copied:
                return
            done += copied
            yield copied


def source_changed_error() -> InvalidRequest:
    """The error for a source that changed while it was read."""
    return InvalidRequest("The source changed while it was read; try again when no process writes to it")
