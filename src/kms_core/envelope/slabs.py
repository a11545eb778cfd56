"""Payloads in files, sealed and opened by several threads at once; knows no header, path or job.

A slab is some consecutive chunks (16 of them: 1 MiB). Chunks are independent and every offset is known
beforehand, so each thread takes the next slab, reads it, works where it lies, and writes it. A slab is
read once for sealing: if anything goes wrong, the payload is abandoned with its key, never resumed.
Sizes and offsets are in bytes; those of payloads leave out the 16-byte nonce before the chunks.
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.envelope import disk
from kms_core.envelope.stream import (
    CHUNK,
    SEALED_CHUNK,
    TAG,
    chunk_count,
    cut,
    nonces,
    open_into,
    plaintext_size,
    sealed_size,
)
from kms_core.errors import DecryptFailed, InvalidRequest

SLAB_CHUNKS: Final = 16


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in an open file."""

    fd: int
    size: int
    offset: int = 0

    def read_at(self, position: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``position`` of the extent on."""
        return os.pread(self.fd, min(length, self.size - position), self.offset + position)


@dataclass(frozen=True, slots=True)
class Pace:
    """How to go through a payload, and who wants to know.

    ``progress`` is told the plaintext bytes of each slab done; ``check`` is called before each slab and
    stops everything by raising. Threads of ours call both. At most 1,024 chunks make a slab (IOV_MAX).
    """

    threads: int = 2
    slab_chunks: int = SLAB_CHUNKS
    progress: Callable[[int], object] | None = None
    check: Callable[[], object] | None = None

    def before(self) -> None:
        if self.check:
            self.check()

    def after(self, size: int) -> None:
        if self.progress:
            self.progress(size)


STEADY: Final = Pace()


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a payload that fills one slab: its first chunk, plaintext size, and whether it ends it."""

    first: int
    size: int
    last: bool

    @property
    def plain_at(self) -> int:
        return self.first * CHUNK

    @property
    def sealed_at(self) -> int:
        return self.first * SEALED_CHUNK


class Slab:
    """The memory of one thread, where chunks are sealed and opened in place. Sizes are of plaintext."""

    __slots__ = ("_aead", "_plain", "_sealed", "memory")

    def __init__(self, key: bytes, chunks: int) -> None:
        self._aead = ChaCha20Poly1305(key)
        self.memory = memoryview(bytearray(chunks * SEALED_CHUNK))
        self._sealed = cut(self.memory, SEALED_CHUNK)
        self._plain = [chunk[:CHUNK] for chunk in self._sealed]

    def plain(self, size: int) -> list[memoryview]:
        """Where ``size`` bytes of plaintext lie, chunk by chunk."""
        full, rest = divmod(size, CHUNK)
        return self._plain[:full] + ([self._plain[full][:rest]] if rest or not size else [])

    def seal(self, first: int, size: int, *, last: bool) -> memoryview:
        """Seal what ``plain(size)`` holds as chunks ``first`` and on."""
        plain = self.plain(size)
        sealed = self._sealed[: len(plain)]
        sealed[-1] = sealed[-1][: len(plain[-1]) + TAG]
        deque(
            map(self._aead.encrypt_into, nonces(first, len(plain), last=last), plain, repeat(None), sealed), 0
        )
        return self.memory[: sealed_size(size)]

    def open(self, piece: Piece) -> list[memoryview]:
        """Open the chunks in ``memory``; if one is forged, clear them all and raise DecryptFailed."""
        plain = self.plain(piece.size)
        sealed = cut(self.memory[: sealed_size(piece.size)], SEALED_CHUNK)
        open_into(self._aead, nonces(piece.first, len(plain), last=piece.last), sealed, plain)
        return plain


def seal_file(
    key: bytes, source: Extent, target_fd: int, target_offset: int = 0, pace: Pace = STEADY
) -> None:
    """Seal the rest of a file, from ``source.offset`` to its end, into chunks at ``target_offset``.

    Raises InvalidRequest if the source is shorter or longer than ``source.size`` or changes meanwhile,
    SpoolFull without room, and what ``pace.check`` raises. The target is then waste, and the key is spent.
    """
    written_at = _settled(source)
    disk.reserve(target_fd, target_offset + sealed_size(source.size))

    def step(slab: Slab, piece: Piece) -> None:
        if not disk.read_into(source.fd, slab.plain(piece.size), source.offset + piece.plain_at):
            raise _changed()
        sealed = slab.seal(piece.first, piece.size, last=piece.last)
        disk.write_all(target_fd, [sealed], target_offset + piece.sealed_at)

    _work(key, source.size, step, pace)
    if _settled(source) != written_at:
        raise _changed()


def open_file(
    key: bytes, source: Extent, target_fd: int, target_offset: int = 0, pace: Pace = STEADY
) -> None:
    """Open the chunks in ``source`` into a file, which holds the truth only once this has returned.

    A forged slab is never written, but slabs behind it may be: write to a temporary file. Raises
    DecryptFailed if any chunk is forged, missing or one too many, SpoolFull without room, and what
    ``pace.check`` raises.
    """
    size = plaintext_size(source.size)
    disk.reserve(target_fd, target_offset + size)

    def step(slab: Slab, piece: Piece) -> None:
        disk.write_all(target_fd, _read_open(slab, source, piece), target_offset + piece.plain_at)

    _work(key, size, step, pace)


def verify_file(key: bytes, source: Extent, pace: Pace = STEADY) -> None:
    """Authenticate every chunk in ``source`` and write nothing; errors as ``open_file``."""

    def step(slab: Slab, piece: Piece) -> None:
        _read_open(slab, source, piece)

    _work(key, plaintext_size(source.size), step, pace)


def _read_open(slab: Slab, source: Extent, piece: Piece) -> list[memoryview]:
    sealed = slab.memory[: sealed_size(piece.size)]
    if not disk.read_into(source.fd, [sealed], source.offset + piece.sealed_at):
        raise DecryptFailed
    return slab.open(piece)


def _work(key: bytes, size: int, step: Callable[[Slab, Piece], None], pace: Pace) -> None:
    """Call ``step`` once for each piece, from several threads; the first error stops them and is raised."""
    chunks = min(pace.slab_chunks, chunk_count(size))
    width = chunks * CHUNK
    total = max(1, -(-size // width))
    turns = itertools.count()
    stop = threading.Event()

    def run() -> None:
        slab = Slab(key, chunks)
        try:
            while not stop.is_set() and (turn := next(turns)) < total:
                pace.before()
                piece = Piece(turn * chunks, min(width, size - turn * width), last=turn == total - 1)
                step(slab, piece)
                pace.after(piece.size)
        finally:
            stop.set()  # at the end it stops nobody: every turn has been taken by then

    helpers = min(pace.threads, os.cpu_count() or 1, total) - 1
    if helpers < 1:
        run()
        return
    with ThreadPoolExecutor(helpers, thread_name_prefix="slab") as pool:
        others = [pool.submit(run) for _ in range(helpers)]
        run()
    for other in others:
        other.result()


def _settled(source: Extent) -> int:
    """When the source was last written (ns), if it still has its size."""
    status = os.fstat(source.fd)
    if status.st_size != source.offset + source.size:
        raise _changed()
    return status.st_mtime_ns


def _changed() -> InvalidRequest:
    return InvalidRequest("The source changed while it was read; try again when nothing writes to it")
