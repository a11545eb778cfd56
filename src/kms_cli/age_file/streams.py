"""Inputs and outputs of the offline commands: files, pipes and the terminal."""

import contextlib
import io
import os
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from kms_cli import terminal
from kms_cli.options import STDIO, writing
from kms_core.age import armor
from kms_core.age.header import VERSION_LINE
from kms_core.payload.files import FileRange, FileWriter
from kms_core.payload.parallel import ParallelOptions
from kms_protocol.errors import NotACiphertext, SpoolFull

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LOOK_BYTES: Final = 2048


class NoRoom(SpoolFull):
    """The disk of the output is full."""

    hint = "name another output with --output"


@dataclass(frozen=True, slots=True)
class InputStream:
    """An input. ``file_range`` is its remainder in a regular file, which threads can read."""

    stream: io.RawIOBase
    file_range: FileRange | None

    @property
    def size(self) -> int | None:
        return self.file_range.size if self.file_range else None


class Joined(io.RawIOBase):
    """A stream with the bytes that were read ahead of it."""

    def __init__(self, ahead: bytes, rest: io.RawIOBase) -> None:
        super().__init__()
        self._ahead = memoryview(ahead)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._rest.fileno()

    def readinto(self, buffer: "WriteableBuffer", /) -> int | None:
        if not self._ahead:
            return self._rest.readinto(buffer)
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._ahead))
        target[:size], self._ahead = self._ahead[:size], self._ahead[size:]
        return size


@contextlib.contextmanager
def source(path: Path) -> Iterator[InputStream]:
    """Open an input; ``-`` is stdin. An empty file is read as a pipe, since files in /proc have size 0."""
    if path == STDIO and sys.stdin.isatty():
        terminal.say("reading from the terminal, end with Ctrl-D")
    with io.FileIO(sys.stdin.fileno(), closefd=False) if path == STDIO else io.FileIO(path) as stream:
        status = os.fstat(stream.fileno())
        at = stream.tell() if stat.S_ISREG(status.st_mode) else 0
        whole = stat.S_ISREG(status.st_mode) and status.st_size > at
        yield InputStream(stream, FileRange(stream.fileno(), status.st_size - at, at) if whole else None)


def unarmored(given: InputStream) -> InputStream:
    """Return the age file in an input, without its armor if it has one. Raises NotACiphertext."""
    start, rest = exactly(given.stream, LOOK_BYTES), given.stream
    if given.file_range:
        rest.seek(-len(start), io.SEEK_CUR)
    else:
        rest = Joined(start, rest)
    if start.startswith(VERSION_LINE):
        return InputStream(rest, given.file_range)
    if not start.lstrip().startswith(armor.BEGIN):
        raise NotACiphertext("Neither an age file nor an armored one")
    return InputStream(armor.ArmorReader(rest), None)


@contextlib.contextmanager
def target(path: Path | None, *, force: bool) -> Iterator[BinaryIO]:
    """Open an output as ``options.writing``. A file appears complete or not at all; a device is written to.

    Raises TargetExists for an existing file, unless ``force`` is set.
    """
    if path and path != STDIO and path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as writer:
            yield writer
        return
    try:
        with writing(path, overwrite=force) as writer:
            yield writer
    except SpoolFull as exc:
        raise NoRoom(exc.detail) from exc


def new_file(target: BinaryIO) -> FileWriter | None:
    """Return the file of an output, which threads can write; None for stdout, pipes and devices."""
    is_file = isinstance(target, io.BufferedWriter) and stat.S_ISREG(os.fstat(target.fileno()).st_mode)
    return FileWriter(target.fileno()) if is_file else None


def exactly(stream: io.RawIOBase, size_bytes: int) -> bytes:
    """Read ``size_bytes``, fewer at the end. Raises BlockingIOError for a stream in non-blocking mode."""
    parts: list[bytes] = []
    while size_bytes:
        part = stream.read(size_bytes)
        if part is None:
            raise BlockingIOError("the stream is not in blocking mode")
        if not part:
            break
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)


def with_progress(meter: terminal.Meter, label: str, total_bytes: int | None) -> ParallelOptions:
    """Return options that show progress in ``meter``. Threads may report it."""
    lock = threading.Lock()
    done_bytes = 0

    def advance(size_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += size_bytes
            meter.show(label, done_bytes, total_bytes)

    return ParallelOptions(progress=advance)
