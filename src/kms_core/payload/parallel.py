"""Large payloads, sealed, opened and sealed anew by several threads; knows no header, path, object or job.

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
from functools import partial
from itertools import repeat
from typing import Final, TypeVar

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age.stream import (
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
from kms_core.payload.files import RangeSource, RangeTarget, changed
from kms_protocol.errors import DecryptFailed

SLAB_CHUNKS: Final = 16
Memory = TypeVar("Memory")


@dataclass(frozen=True, slots=True)
class ParallelOptions:
    """How to go through a payload, and who wants to know.

    ``progress`` is told the plaintext bytes of each slab done; ``check`` is called before each slab and
    stops everything by raising. Threads of ours call both. At most 1,024 chunks make a slab (IOV_MAX).
    More threads than processors are for sources and targets that keep a thread waiting.
    """

    threads: int = min(2, os.cpu_count() or 1)
    slab_chunks: int = SLAB_CHUNKS
    progress: Callable[[int], object] | None = None
    check: Callable[[], object] | None = None

    def before(self) -> None:
        if self.check:
            self.check()

    def after(self, size: int) -> None:
        if self.progress:
            self.progress(size)


STEADY: Final = ParallelOptions()


@dataclass(frozen=True, slots=True)
class ChunkRange:
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

    @property
    def sealed_size(self) -> int:
        return sealed_size(self.size)


class Slab:
    """The memory of one sealing thread, where chunks are sealed in place. Sizes are of plaintext."""

    __slots__ = ("_aead", "_memory", "_plain", "_sealed")

    def __init__(self, key: bytes, chunks: int) -> None:
        self._aead = ChaCha20Poly1305(key)
        self._memory = memoryview(bytearray(chunks * SEALED_CHUNK))
        self._sealed = cut(self._memory, SEALED_CHUNK)
        self._plain = [chunk[:CHUNK] for chunk in self._sealed]

    def plain(self, size: int) -> list[memoryview]:
        """Where ``size`` bytes of plaintext lie, chunk by chunk."""
        full, rest = divmod(size, CHUNK)
        return self._plain[:full] + ([self._plain[full][:rest]] if rest or not size else [])

    def seal(self, piece: ChunkRange, source: memoryview | None = None) -> memoryview:
        """Seal what ``plain(piece.size)`` holds, or ``source``, which is one run of that size."""
        plain = cut(source, CHUNK) if source else self.plain(piece.size)
        sealed = self._sealed[: len(plain)]
        sealed[-1] = sealed[-1][: len(plain[-1]) + TAG]
        run = nonces(piece.first, len(plain), last=piece.last)
        deque(map(self._aead.encrypt_into, run, plain, repeat(None), sealed), 0)
        return self._memory[: piece.sealed_size]


class SealedSlab:
    """The memory of one opening thread: sealed chunks, and beside them the plaintext in one run."""

    __slots__ = ("_aead", "_plain", "memory")

    def __init__(self, key: bytes, chunks: int) -> None:
        self._aead = ChaCha20Poly1305(key)
        self.memory = memoryview(bytearray(chunks * SEALED_CHUNK))
        self._plain = memoryview(bytearray(chunks * CHUNK))

    def open(self, piece: ChunkRange) -> memoryview:
        """Open the chunks that ``memory`` begins with; if one is forged, clear all: DecryptFailed."""
        sealed = cut(self.memory[: piece.sealed_size], SEALED_CHUNK)
        opened = self._plain[: piece.size]
        run = nonces(piece.first, len(sealed), last=piece.last)
        open_into(self._aead, run, sealed, cut(opened, CHUNK) or [opened])
        return opened


def seal_file(
    key: bytes, source: RangeSource, target: RangeTarget, target_at: int = 0, pace: ParallelOptions = STEADY
) -> None:
    """Seal all of ``source`` into chunks at ``target_at``.

    Raises InvalidRequest if the source is shorter or longer than its size or changes meanwhile, SpoolFull
    without room, and what ``pace.check`` raises. The target is then waste, and the key is spent.
    """
    before = source.stamp()
    target.reserve(target_at + sealed_size(source.size))

    def step(slab: Slab, piece: ChunkRange) -> None:
        if not source.read_into(slab.plain(piece.size), piece.plain_at):
            raise changed()
        target.write_at(slab.seal(piece), target_at + piece.sealed_at)

    _work(source.size, partial(Slab, key), step, pace)
    if source.stamp() != before:
        raise changed()


def open_file(
    key: bytes, source: RangeSource, target: RangeTarget, target_at: int = 0, pace: ParallelOptions = STEADY
) -> None:
    """Open the chunks in ``source`` into a target, which holds the truth only once this has returned.

    A forged slab is never written, but slabs behind it may be: write to what nobody sees. Raises
    DecryptFailed if any chunk is forged, missing or one too many, SpoolFull without room, and what
    ``pace.check`` raises.
    """
    size = plaintext_size(source.size)
    target.reserve(target_at + size)

    def step(slab: SealedSlab, piece: ChunkRange) -> None:
        target.write_at(_read_open(slab, source, piece), target_at + piece.plain_at)

    _work(size, partial(SealedSlab, key), step, pace)


def reseal_file(
    keys: tuple[bytes, bytes],
    source: RangeSource,
    target: RangeTarget,
    target_at: int = 0,
    pace: ParallelOptions = STEADY,
) -> None:
    """Open the chunks in ``source`` under the first key and seal them under the second, at ``target_at``.

    The plaintext is in memory alone. Errors, and what a target is worth then, as ``open_file``.
    """
    old, new = keys
    size = plaintext_size(source.size)
    target.reserve(target_at + source.size)

    def step(slabs: tuple[SealedSlab, Slab], piece: ChunkRange) -> None:
        opened, sealed = slabs
        plain = _read_open(opened, source, piece)
        for chunk, data in zip(sealed.plain(piece.size), cut(plain, CHUNK), strict=False):  # empty: no cut
            chunk[:] = data
        target.write_at(sealed.seal(piece), target_at + piece.sealed_at)

    _work(size, lambda chunks: (SealedSlab(old, chunks), Slab(new, chunks)), step, pace)


def copy_run(
    source: RangeSource, target: RangeTarget, target_at: int = 0, pace: ParallelOptions = STEADY
) -> None:
    """Bytes as they are, to ``target_at``. InvalidRequest if the source ends before its size."""

    def step(memory: memoryview, piece: ChunkRange) -> None:
        data = memory[: piece.size]
        if not source.read_into([data], piece.plain_at):
            raise changed()
        target.write_at(data, target_at + piece.plain_at)

    _work(source.size, lambda chunks: memoryview(bytearray(chunks * CHUNK)), step, pace)


def verify_file(key: bytes, source: RangeSource, pace: ParallelOptions = STEADY) -> None:
    """Authenticate every chunk in ``source`` and write nothing; errors as ``open_file``."""

    def step(slab: SealedSlab, piece: ChunkRange) -> None:
        _read_open(slab, source, piece)

    _work(plaintext_size(source.size), partial(SealedSlab, key), step, pace)


def _read_open(slab: SealedSlab, source: RangeSource, piece: ChunkRange) -> memoryview:
    if not source.read_into([slab.memory[: piece.sealed_size]], piece.sealed_at):
        raise DecryptFailed
    return slab.open(piece)


def _work(
    size: int,
    memory: Callable[[int], Memory],
    step: Callable[[Memory, ChunkRange], None],
    pace: ParallelOptions,
) -> None:
    """Call ``step`` once for each piece, from several threads; the first error stops them and is raised.

    ``memory`` makes what a thread works in, from the number of chunks in a slab.
    """
    chunks = min(pace.slab_chunks, chunk_count(size))
    width = chunks * CHUNK
    total = max(1, -(-size // width))
    turns = itertools.count()
    stop = threading.Event()

    def run() -> None:
        slab = memory(chunks)
        try:
            while not stop.is_set() and (turn := next(turns)) < total:
                pace.before()
                piece = ChunkRange(turn * chunks, min(width, size - turn * width), last=turn == total - 1)
                step(slab, piece)
                pace.after(piece.size)
        finally:
            stop.set()  # at the end it stops nobody: every turn has been taken by then

    helpers = min(pace.threads, total) - 1
    if helpers < 1:
        run()
        return
    with ThreadPoolExecutor(helpers, thread_name_prefix="slab") as pool:
        others = [pool.submit(run) for _ in range(helpers)]
        run()
    for other in others:
        other.result()
