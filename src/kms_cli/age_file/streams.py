"""Inputs and outputs of the offline commands: files, pipes, the terminal; knows no key and no header."""

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

import click

from kms_cli import terminal
from kms_cli.atomic_file import placed
from kms_cli.progress import Meter
from kms_core.payload.files import FileRange
from kms_core.payload.parallel import ParallelOptions
from kms_protocol.errors import SpoolFull

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

STDIO: Final = Path("-")


class NoRoom(SpoolFull):
    """The disk of the output is full, and no spool is about."""

    hint = "name another place with --output"


@dataclass(frozen=True, slots=True)
class InputStream:
    """An input. ``extent`` is the rest of it where it is a regular file, which threads can read."""

    stream: io.RawIOBase
    extent: FileRange | None

    @property
    def size(self) -> int | None:
        return self.extent.size if self.extent else None


@dataclass(frozen=True, slots=True)
class OutputStream:
    """An output that takes all it is given. ``fd`` is a new file, not yet in its place, for threads."""

    writer: BinaryIO
    fd: int | None


class Joined(io.RawIOBase):
    """Bytes that were read ahead, and then the stream that they were read from."""

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
    """Open an input; ``-`` is stdin. An empty file is read as a pipe: in /proc it may only look empty."""
    if path == STDIO and sys.stdin.isatty():
        terminal.say("reading from the terminal, end with Ctrl-D")
    with io.FileIO(sys.stdin.fileno(), closefd=False) if path == STDIO else io.FileIO(path) as stream:
        status = os.fstat(stream.fileno())
        at = stream.tell() if stat.S_ISREG(status.st_mode) else 0
        whole = stat.S_ISREG(status.st_mode) and status.st_size > at
        yield InputStream(stream, FileRange(stream.fileno(), status.st_size - at, at) if whole else None)


@contextlib.contextmanager
def target(path: Path, *, force: bool) -> Iterator[OutputStream]:
    """Open an output; ``-`` is stdout. A file appears in the end, whole; a pipe or device is written to.

    Raises TargetExists if a file is there, unless ``force`` replaces it.
    """
    if path == STDIO:
        with _flushed(sys.stdout.buffer) as writer:
            yield OutputStream(writer, None)
    elif path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as writer:
            yield OutputStream(writer, None)
    else:
        with _room(), placed(path, overwrite=force) as writer:
            yield OutputStream(writer, writer.fileno())


def refuse_terminal(path: Path) -> None:
    """Raise UsageError if binary would go to the terminal."""
    if path == STDIO and sys.stdout.isatty():
        raise click.UsageError(
            "the result is binary: name a file with -o, or use -a for text", click.get_current_context()
        )


def exactly(stream: io.RawIOBase, size_bytes: int) -> bytes:
    """So many bytes, fewer at the end. Raises BlockingIOError if the stream is not in blocking mode."""
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


def pace(meter: Meter, label: str, total_bytes: int | None) -> ParallelOptions:
    """Slab by slab, and shown; threads call it."""
    lock = threading.Lock()
    done_bytes = 0

    def advance(size_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += size_bytes
            meter.show(label, done_bytes, total_bytes)

    return ParallelOptions(progress=advance)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except SpoolFull as exc:
        raise NoRoom(exc.detail) from exc


@contextlib.contextmanager
def _flushed(writer: BinaryIO) -> Iterator[BinaryIO]:
    """Whatever was released before a failure leaves too."""
    try:
        yield writer
    finally:
        writer.flush()
