"""Payloads in order: pushed data, pipes, bytes in memory, and ranges of a sealed payload.

Opening releases only genuine chunks, in order: of a damaged pipe exactly those before the fault.
"""

import copy
import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.utils import Buffer
from msgspec import Struct

from kms_core.age import header, stream
from kms_core.age.header import FILE_LIMITS, Header, HeaderLimits
from kms_core.age.stream import (
    CHUNK,
    SEALED_CHUNK,
    TAG,
    chunk_count,
    cut,
    nonce,
    open_into,
    plaintext_size,
)
from kms_core.payload import parallel
from kms_core.payload.files import RangeSource, RangeTarget
from kms_core.payload.parallel import DEFAULTS, SLAB_CHUNKS, ChunkRange, ParallelOptions, SealedSlab, Slab
from kms_protocol.errors import DecryptFailed

_BUFFERS: Final = 2
_PIPE_BYTES: Final = 1024 * 1024
_KEPT: Final = 4  # chunks: threads that work on neighbouring slabs share one


class Readable(Protocol):
    """A blocking binary stream."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Read some bytes into ``buffer``. Returns their number, 0 at the end."""


class Writable(Protocol):
    """A blocking binary stream, which must not keep a reference to ``data``."""

    def write(self, data: memoryview, /) -> int | None:
        """Write some of ``data``. Returns the number of bytes."""


class SlabSealer:
    """Seals a payload pushed in parts of any size. A slab is held back until more data follows it."""

    def __init__(self, key: bytes, slab_chunks: int = SLAB_CHUNKS) -> None:
        self._key = key
        self._chunks = slab_chunks
        self._held = self._first = self._full = 0
        self._resize(1)  # most payloads are small, and touching a whole slab would cost them more
        self._finished = False
        self.size = 0

    def feed(self, data: Buffer, *, more: bool = False) -> Iterator[memoryview]:
        """Accept plaintext, and yield the finished sealed slabs in order, each valid until the next.

        ``more`` promises that more plaintext follows: complete slabs are then sealed without a copy. Raises
        ValueError after ``finish``.
        """
        self._check_unfinished()
        rest = memoryview(data)
        self.size += len(rest)
        while rest:
            if self._held == self._full:
                yield self._seal()
                self._resize(self._chunks)
            elif not self._held and len(rest) - (not more) >= self._chunks * CHUNK:
                self._resize(self._chunks)
                yield self._seal(rest[: self._full])
                rest = rest[self._full :]
            else:
                rest = rest[self._take(rest) :]

    def finish(self) -> bytes:
        """Seal the last slab, at least 16 bytes. Raises ValueError if called twice."""
        self._check_unfinished()
        self._finished = True
        return bytes(self._slab.seal(ChunkRange(self._first, self._held, last=True)))

    def _take(self, data: memoryview) -> int:
        chunk, start = divmod(self._held, CHUNK)
        taken = min(CHUNK - start, len(data))
        self._plain[chunk][start : start + taken] = data[:taken]
        self._held += taken
        return taken

    def _resize(self, chunks: int) -> None:
        """Replace the empty slab if it has another size."""
        full = chunks * CHUNK
        if self._full != full:
            self._full, self._slab = full, Slab(self._key, chunks)
            self._plain = self._slab.plain(full)

    def _seal(self, source: memoryview | None = None) -> memoryview:
        sealed = self._slab.seal(ChunkRange(self._first, self._full, last=False), source)
        self._held = 0
        self._first += self._full // CHUNK
        return sealed

    def _check_unfinished(self) -> None:
        if self._finished:
            raise ValueError("the payload is finished: sealing more under its key would reuse a nonce")


def seal_pipe(key: bytes, reader: Readable, writer: Writable, options: ParallelOptions = DEFAULTS) -> int:
    """Seal all of ``reader``. Returns the size of the plaintext. ``options.threads`` is ignored."""
    _enlarge_pipes(reader, writer)
    pair = [Slab(key, options.slab_chunks) for _ in range(_BUFFERS)]
    full = options.slab_chunks * CHUNK
    turns = _in_turn(reader, [slab.plain(full) for slab in pair])
    total = 0
    for turn, (size, last) in enumerate(turns):
        options.check()
        _write_all(
            writer, pair[turn % _BUFFERS].seal(ChunkRange(turn * options.slab_chunks, size, last=last))
        )
        total += size
        options.progress(size)
    return total


def open_pipe(key: bytes, reader: Readable, writer: Writable, options: ParallelOptions = DEFAULTS) -> int:
    """Open all chunks of ``reader``. Returns the size of the plaintext.

    Raises DecryptFailed after writing the chunks before the fault: they are genuine but incomplete, and the
    caller must tell the consumer.
    """
    _enlarge_pipes(reader, writer)
    pair = [SealedSlab(key, options.slab_chunks) for _ in range(_BUFFERS)]
    total = 0
    for turn, (size, last) in enumerate(_in_turn(reader, [[slab.memory] for slab in pair])):
        options.check()
        slab, first = pair[turn % _BUFFERS], turn * options.slab_chunks
        try:
            opened = slab.open(ChunkRange(first, _run_size(first, size, last=last), last=last))
        except DecryptFailed:
            for chunk in _genuine(ChaCha20Poly1305(key), first, slab.memory[:size], last=last):
                _write_all(writer, memoryview(chunk))
            raise
        _write_all(writer, opened)
        total += len(opened)
        options.progress(len(opened))
    return total


def _run_size(first: int, sealed: int, *, last: bool) -> int:
    """The plaintext size of consecutive chunks. Raises DecryptFailed if no payload can end with them."""
    if last:
        return plaintext_size(first * SEALED_CHUNK + sealed) - first * CHUNK
    return plaintext_size(sealed)


def _genuine(aead: ChaCha20Poly1305, first: int, sealed: memoryview, *, last: bool) -> Iterator[bytes]:
    """The plaintext of the chunks before the fault.

    A full chunk with the wrong mark is genuine, too, and the fault is after it: data follows the last chunk,
    or the payload ends after another.
    """
    chunks = cut(sealed, SEALED_CHUNK)
    for index, chunk in enumerate(chunks):
        ends = last and index == len(chunks) - 1
        opened = _try(aead, nonce(first + index, last=ends), chunk)
        if not opened:  # forged, or empty, as only an empty payload may be
            if len(chunk) == SEALED_CHUNK:
                yield _try(aead, nonce(first + index, last=not ends), chunk)
            return
        yield opened


def _try(aead: ChaCha20Poly1305, number: bytes, chunk: memoryview) -> bytes:
    try:
        return aead.decrypt(number, chunk, None)
    except InvalidTag:
        return b""


def _enlarge_pipes(*streams: Readable | Writable) -> None:
    """Enlarge pipe buffers to a slab, so that both ends work at the same time: 50 % faster (Linux)."""
    for each in streams:
        fileno = getattr(each, "fileno", None)
        with suppress(OSError):  # no descriptor, no pipe, or above the limit of the system
            if fileno:
                fcntl.fcntl(fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _in_turn(reader: Readable, buffers: Sequence[Sequence[memoryview]]) -> Iterator[tuple[int, bool]]:
    """Fill the buffers in turn, and yield the size of each and whether it is the last."""
    full = sum(map(len, buffers[0]))
    turn, size = 0, _fill(reader, buffers[0])
    while True:
        turn += 1
        more = _fill(reader, buffers[turn % _BUFFERS]) if size == full else 0
        yield size, not more
        if not more:
            return
        size = more


def _fill(reader: Readable, views: Sequence[memoryview]) -> int:
    filled = 0
    for view in views:
        at = 0
        while at < len(view):
            got = _blocking(reader.readinto(view[at:]))
            if not got:
                return filled + at
            at += got
        filled += at
    return filled


def _write_all(writer: Writable, data: memoryview) -> None:
    while data:
        data = data[_blocking(writer.write(data)) :]


def _blocking(transferred: int | None) -> int:
    """The number of transferred bytes. Raises BlockingIOError for a non-blocking stream without data."""
    if transferred is None:
        raise BlockingIOError("the stream is not in blocking mode")
    return transferred


class RangeReader:
    """Reads ranges of a sealed payload, as a ``RangeSource`` of its plaintext.

    Reads only their chunks, and holds at most 2 MiB. Safe for threads. The payload must not change. The
    last chunk is verified first: otherwise a payload truncated between two chunks would pass with a wrong
    size. Each read verifies the chunks that it reads, and raises DecryptFailed if one is forged.
    """

    def __init__(self, key: bytes, payload: RangeSource) -> None:
        """Raise DecryptFailed if no payload has that size, or if its last chunk is forged."""
        self.size = self._total = plaintext_size(payload.size)
        self.sealed_size: Final = payload.size
        self._aead = ChaCha20Poly1305(key)
        self._payload = payload
        self._offset = 0
        last = chunk_count(self._total) - 1
        self._kept: tuple[tuple[int, memoryview], ...] = ((last, self._chunk_plaintext(last)),)

    def tail(self, position: int) -> Self:
        """The range from ``position`` on."""
        found = copy.copy(self)
        found.size, found._offset = self.size - position, self._offset + position  # noqa: SLF001 -- of this class
        return found

    def stamp(self) -> None:
        """Do nothing: each read finds a change of its range."""

    def read_at(self, position: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``position`` on, fewer at the end."""
        return b"".join(self.slabs(position, position + length))

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        """Fill the views one after another from ``position`` on; False if the range ends before."""
        if position + sum(map(len, views)) > self.size:
            return False
        for view in views:
            self._fill(view, self._offset + position)
            position += len(view)
        return True

    def slabs(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes from ``start`` to before ``stop`` in order, about 1 MiB at a time.

        Of a slab with a forged chunk nothing is yielded.
        """
        if start < 0:
            raise ValueError("a range starts at 0 or later")
        stop = self.size if stop is None else min(stop, self.size)
        for low, high in _runs(self._offset + start, self._offset + stop, SLAB_CHUNKS * CHUNK):
            opened = memoryview(bytearray(high - low))
            self._fill(opened, low)
            yield opened

    def sealed_slabs(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yield bytes of the payload as it is, ``sealed_size`` in all, after their chunks were verified."""
        plain = memoryview(bytearray(CHUNK))
        for low, high in _runs(start, min(stop, self.sealed_size), SLAB_CHUNKS * SEALED_CHUNK):
            first, end = low // SEALED_CHUNK, -(-high // SEALED_CHUNK)
            base = first * SEALED_CHUNK
            sealed = memoryview(bytearray(min(end * SEALED_CHUNK, self.sealed_size) - base))
            for at, chunk in enumerate(cut(sealed, SEALED_CHUNK), start=first):
                self._open(at, chunk, plain)
            yield sealed[low - base : high - base]

    def _fill(self, view: memoryview, start: int) -> None:
        """Fill a view with the plaintext from ``start`` on, chunk by chunk.

        The last chunks of which a part was read are kept: what is read next often begins in one.
        """
        sealed = memoryview(b"")
        while view:
            at, skipped = divmod(start, CHUNK)
            opened = dict(self._kept).get(at)
            if opened is None and not skipped and len(view) >= min(CHUNK, self._total - start):
                sealed = sealed or memoryview(bytearray(SEALED_CHUNK))
                taken = self._open(at, sealed, view)
            else:
                if opened is None:
                    opened = self._chunk_plaintext(at)
                    self._kept = (*self._kept[1 - _KEPT :], (at, opened))
                part = opened[skipped : skipped + len(view)]
                taken = len(part)
                view[:taken] = part
            view, start = view[taken:], start + taken

    def _chunk_plaintext(self, at: int) -> memoryview:
        """Read and open the chunk of this number."""
        opened = memoryview(bytearray(min(CHUNK, self._total - at * CHUNK)))
        self._open(at, memoryview(bytearray(len(opened) + TAG)), opened)
        return opened

    def _open(self, at: int, sealed: memoryview, plain: memoryview) -> int:
        """Read a chunk into the start of ``sealed`` and open it into that of ``plain``. Returns its size."""
        size = min(CHUNK, self._total - at * CHUNK)
        if not self._payload.read_into([sealed[: size + TAG]], at * SEALED_CHUNK):
            raise DecryptFailed
        last = (at + 1) * SEALED_CHUNK >= self.sealed_size
        open_into(self._aead, [nonce(at, last=last)], [sealed[: size + TAG]], [plain[:size]])
        return size


def _runs(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of ``width``."""
    while start < stop:
        end = min(start - start % width + width, stop)
        yield start, end
        start = end


# The data of one operation: bytes in memory, or a file and the target that receives the result.
#
# Both classes have the same methods. They return the result, or b"" if a target receives it. ``offset`` is
# that of the first chunk in a ciphertext, ``head`` a header and its payload nonce; payload keys have 32
# bytes.


class InMemory(Struct, frozen=True):
    """Bytes in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read_header(self, limits: HeaderLimits) -> Header:
        """Parse the header of a ciphertext. Raises as ``header.parse``."""
        return header.parse(self.data, limits)

    def seal(self, head: bytes, key: bytes) -> bytes:
        """Seal a plaintext behind ``head``."""
        return head + stream.seal(key, self.data)

    def open(self, offset: int, key: bytes) -> bytes:
        """Open the payload of a ciphertext. Raises DecryptFailed."""
        return stream.open_(key, memoryview(self.data)[offset:])

    def reseal(self, offset: int, keys: tuple[bytes, bytes], head: bytes) -> bytes:
        """Open the payload under the first key and seal it under the second. Raises DecryptFailed."""
        old, new = keys
        return head + stream.seal(new, self.open(offset, old))

    def replace_header(self, size: int, new: bytes) -> bytes:
        """Put ``new`` in the place of a header of ``size`` bytes; the payload stays as it is."""
        return new + self.data[size:]


@dataclass(frozen=True, slots=True)
class FileToFile:
    """A file and the target that receives the result, processed by several threads.

    After an error the target is incomplete and must not be published. Methods also raise InvalidRequest if
    the source changes, SpoolFull, and what ``options.check`` raises. ``copy`` copies a payload to a position
    of the target.
    """

    source: RangeSource
    target: RangeTarget
    options: ParallelOptions
    copy: Callable[[RangeSource, int, ParallelOptions], None]

    @property
    def size(self) -> int:
        return self.source.size

    def read_header(self, limits: HeaderLimits) -> Header:
        """Parse the header; ``limits`` are for ciphertexts in memory, files have ``FILE_LIMITS``."""
        del limits
        return header.read_by(self.source.read_at, FILE_LIMITS)

    def seal(self, head: bytes, key: bytes) -> bytes:
        parallel.seal_file(key, self.source, self.target, head, self.options)
        return b""

    def open(self, offset: int, key: bytes) -> bytes:
        parallel.open_file(key, self.source.tail(offset), self.target, self.options)
        return b""

    def reseal(self, offset: int, keys: tuple[bytes, bytes], head: bytes) -> bytes:
        parallel.reseal_file(keys, self.source.tail(offset), self.target, head, self.options)
        return b""

    def replace_header(self, size: int, new: bytes) -> bytes:
        payload = self.source.tail(size)
        self.target.reserve(len(new) + payload.size)
        self.target.write_at(memoryview(new), 0)
        self.copy(payload, len(new), self.options)
        return b""
