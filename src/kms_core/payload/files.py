"""Where payloads come from and go to: runs of bytes that several threads read and write at an offset.

Knows no chunk and no key. Files are here; whoever has another kind of storage offers the same two seams.
Sizes and positions are in bytes, and positions count from the beginning of the run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from kms_core.payload import disk
from kms_protocol.errors import InvalidRequest


class RangeSource(Protocol):
    """Something of a known size that does not change while it is read. Safe for threads."""

    @property
    def size(self) -> int: ...

    def read_at(self, position: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``position`` on; fewer only at the end."""

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        """Fill the views one after another from ``position`` on; False if the run ends before."""

    def stamp(self) -> object:
        """What is another after a change. Raises InvalidRequest if the run has no longer its size."""

    def tail(self, position: int) -> Self:
        """The run from ``position`` on."""


class RangeTarget(Protocol):
    """A target in the making. Safe for threads; every byte is written once."""

    def reserve(self, size: int) -> None:
        """Tell the size that the target will have, before its payload is written. Raises SpoolFull."""

    def write_at(self, data: memoryview, position: int) -> None:
        """Write all of ``data``, which may be changed afterwards. Raises SpoolFull."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """A run of bytes in an open file, which ends where the run does."""

    fd: int
    size: int
    offset: int = 0

    def read_at(self, position: int, length: int) -> bytes:
        return os.pread(self.fd, min(length, self.size - position), self.offset + position)

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        return disk.read_into(self.fd, views, self.offset + position)

    def stamp(self) -> int:
        status = os.fstat(self.fd)
        if status.st_size != self.offset + self.size:
            raise changed()
        return status.st_mtime_ns

    def tail(self, position: int) -> "FileRange":
        return FileRange(self.fd, self.size - position, self.offset + position)


@dataclass(frozen=True, slots=True)
class FileWriter:
    """A file as a target."""

    fd: int

    def reserve(self, size: int) -> None:
        disk.reserve(self.fd, size)

    def write_at(self, data: memoryview, position: int) -> None:
        disk.write_all(self.fd, data, position)


def changed() -> InvalidRequest:
    """The error for a source that is not what it was."""
    return InvalidRequest("The source changed while it was read; try again when nothing writes to it")
