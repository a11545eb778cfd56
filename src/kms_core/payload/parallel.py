"""Seals, opens and reseals large payloads with several threads.

A slab is a number of consecutive chunks (16 chunks: 1 MiB). Chunks are independent and all offsets are known
in advance: each thread takes the next slab, reads it, works in place and writes it. A slab is read once for
sealing; after an error the payload and its key are abandoned, never resumed. Sizes and offsets are in bytes
and exclude the 16-byte nonce before the chunks.
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
from kms_core.payload.files import RangeSource, RangeTarget, source_changed_error
from kms_protocol.errors import DecryptFailed

SLAB_CHUNKS: Final = 16
Memory = TypeVar("Memory")


def _do_nothing(*_: object) -> None:
    """The callback of operations that report to nothing."""


@dataclass(frozen=True, slots=True)
class ParallelOptions:
    """Number of threads, size of a slab, and callbacks, which worker threads call.

    ``progress`` receives the plaintext bytes of each finished slab. ``check`` runs before each slab and stops
    the operation by raising. A slab has at most 1,024 chunks (IOV_MAX). More threads than processors help
    with sources and targets that block.
    """

    threads: int = min(2, os.cpu_count() or 1)
    slab_chunks: int = SLAB_CHUNKS
    progress: Callable[[int], object] = _do_nothing
    check: Callable[[], object] = _do_nothing


DEFAULTS: Final = ParallelOptions()


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """The chunks of one slab: number of the first, plaintext size, and whether they end the payload."""

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
    """The memory of one sealing thread; chunks are sealed in place. Sizes are those of plaintext."""

    __slots__ = ("_aead", "_memory", "_plain", "_sealed")

    def __init__(self, key: bytes, chunks: int) -> None:
        self._aead = ChaCha20Poly1305(key)
        self._memory = memoryview(bytearray(chunks * SEALED_CHUNK))
        self._sealed = cut(self._memory, SEALED_CHUNK)
        self._plain = [chunk[:CHUNK] for chunk in self._sealed]

    def plain(self, size: int) -> list[memoryview]:
        """Views of the memory for ``size`` bytes of plaintext, one for each chunk."""
        full, rest = divmod(size, CHUNK)
        return self._plain[:full] + ([self._plain[full][:rest]] if rest or not size else [])

    def seal(self, chunks: ChunkRange, source: memoryview | None = None) -> memoryview:
        """Seal the content of ``plain(chunks.size)``, or ``source``, which has that size."""
        plain = cut(source, CHUNK) if source else self.plain(chunks.size)
        sealed = self._sealed[: len(plain)]
        sealed[-1] = sealed[-1][: len(plain[-1]) + TAG]
        run = nonces(chunks.first, len(plain), last=chunks.last)
        deque(map(self._aead.encrypt_into, run, plain, repeat(None), sealed), 0)
        return self._memory[: chunks.sealed_size]


class SealedSlab:
    """The memory of one opening thread: sealed chunks, and separately their contiguous plaintext."""

    __slots__ = ("_aead", "_plain", "memory")

    def __init__(self, key: bytes, chunks: int) -> None:
        self._aead = ChaCha20Poly1305(key)
        self.memory = memoryview(bytearray(chunks * SEALED_CHUNK))
        self._plain = memoryview(bytearray(chunks * CHUNK))

    def open(self, chunks: ChunkRange) -> memoryview:
        """Open the chunks at the start of ``memory``. Raises DecryptFailed, after clearing all plaintext."""
        sealed = cut(self.memory[: chunks.sealed_size], SEALED_CHUNK)
        opened = self._plain[: chunks.size]
        run = nonces(chunks.first, len(sealed), last=chunks.last)
        open_into(self._aead, run, sealed, cut(opened, CHUNK) or [opened])
        return opened


def seal_file(
    key: bytes,
    source: RangeSource,
    target: RangeTarget,
    head: bytes = b"",
    options: ParallelOptions = DEFAULTS,
) -> None:
    """Write ``head`` to the target, and behind it the sealed chunks of ``source``.

    Raises InvalidRequest if the source changes or does not have its size, SpoolFull, and what
    ``options.check`` raises. After an error the target is incomplete and the key must not be used again.
    """
    before = source.stamp()
    _write_head(target, head, sealed_size(source.size))

    def step(slab: Slab, chunks: ChunkRange) -> None:
        if not source.read_into(slab.plain(chunks.size), chunks.plain_at):
            raise source_changed_error()
        target.write_at(slab.seal(chunks), len(head) + chunks.sealed_at)

    _work(source.size, partial(Slab, key), step, options)
    if source.stamp() != before:
        raise source_changed_error()


def open_file(
    key: bytes, source: RangeSource, target: RangeTarget, options: ParallelOptions = DEFAULTS
) -> None:
    """Open the chunks in ``source`` into a target, which must not be published before this returns.

    A forged slab is never written, but genuine slabs after it may be. Raises DecryptFailed if a chunk is
    forged, missing or added, SpoolFull, and what ``options.check`` raises.
    """
    size = plaintext_size(source.size)
    target.reserve(size)

    def step(slab: SealedSlab, chunks: ChunkRange) -> None:
        target.write_at(_read_open(slab, source, chunks), chunks.plain_at)

    _work(size, partial(SealedSlab, key), step, options)


def reseal_file(
    keys: tuple[bytes, bytes],
    source: RangeSource,
    target: RangeTarget,
    head: bytes = b"",
    options: ParallelOptions = DEFAULTS,
) -> None:
    """Write ``head``, and behind it the chunks of ``source``, opened with one key and sealed with the other.

    The plaintext is only in memory. Errors as ``open_file``.
    """
    old, new = keys
    size = plaintext_size(source.size)
    _write_head(target, head, source.size)

    def step(slabs: tuple[SealedSlab, Slab], chunks: ChunkRange) -> None:
        opened, sealed = slabs
        plain = _read_open(opened, source, chunks)
        for chunk, data in zip(sealed.plain(chunks.size), cut(plain, CHUNK), strict=False):  # empty: no cut
            chunk[:] = data
        target.write_at(sealed.seal(chunks), len(head) + chunks.sealed_at)

    _work(size, lambda chunks: (SealedSlab(old, chunks), Slab(new, chunks)), step, options)


def copy_run(
    source: RangeSource, target: RangeTarget, target_at: int = 0, options: ParallelOptions = DEFAULTS
) -> None:
    """Copy bytes to ``target_at``. Raises InvalidRequest if the source ends before its size."""

    def step(memory: memoryview, chunks: ChunkRange) -> None:
        data = memory[: chunks.size]
        if not source.read_into([data], chunks.plain_at):
            raise source_changed_error()
        target.write_at(data, target_at + chunks.plain_at)

    _work(source.size, lambda chunks: memoryview(bytearray(chunks * CHUNK)), step, options)


def verify_file(key: bytes, source: RangeSource, options: ParallelOptions = DEFAULTS) -> None:
    """Authenticate all chunks in ``source`` and write nothing. Errors as ``open_file``."""

    def step(slab: SealedSlab, chunks: ChunkRange) -> None:
        _read_open(slab, source, chunks)

    _work(plaintext_size(source.size), partial(SealedSlab, key), step, options)


def _write_head(target: RangeTarget, head: bytes, payload_bytes: int) -> None:
    target.reserve(len(head) + payload_bytes)
    if head:
        target.write_at(memoryview(head), 0)


def _read_open(slab: SealedSlab, source: RangeSource, chunks: ChunkRange) -> memoryview:
    if not source.read_into([slab.memory[: chunks.sealed_size]], chunks.sealed_at):
        raise DecryptFailed
    return slab.open(chunks)


def _work(
    size: int,
    memory: Callable[[int], Memory],
    step: Callable[[Memory, ChunkRange], None],
    options: ParallelOptions,
) -> None:
    """Call ``step`` once for each slab, from several threads; the first error stops them and is raised.

    ``memory`` allocates the memory of a thread for the number of chunks in a slab.
    """
    slab_chunks = min(options.slab_chunks, chunk_count(size))
    width = slab_chunks * CHUNK
    total = max(1, -(-size // width))
    turns = itertools.count()
    stop = threading.Event()

    def run() -> None:
        slab = memory(slab_chunks)
        try:
            while not stop.is_set() and (turn := next(turns)) < total:
                options.check()
                chunks = ChunkRange(
                    turn * slab_chunks, min(width, size - turn * width), last=turn == total - 1
                )
                step(slab, chunks)
                options.progress(chunks.size)
        finally:
            stop.set()  # without an error each turn is taken by then

    helpers = min(options.threads, total) - 1
    if helpers < 1:
        run()
        return
    with ThreadPoolExecutor(helpers, thread_name_prefix="slab") as pool:
        others = [pool.submit(run) for _ in range(helpers)]
        run()
    for other in others:
        other.result()
