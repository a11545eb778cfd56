"""Any part of a sealed payload without the rest of it; knows no header, and not where the bytes come from."""

from collections.abc import Callable, Iterator
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age.stream import CHUNK, SEALED_CHUNK, chunk_count, open_run, plaintext_size
from kms_core.payload.parallel import SLAB_CHUNKS
from kms_protocol.errors import DecryptFailed

ReadAt = Callable[[int, int], bytes]
"""(position, length) -> the sealed bytes there; fewer at the end. ``Extent.read_at`` is one."""

_SLAB: Final = SLAB_CHUNKS * CHUNK


class RangeReader:
    """Reads parts of a payload, touching only their chunks and holding 2 MiB at most; safe for threads.

    The last chunk is verified first: without it, a payload cut at a chunk's border would pass with a
    wrong size. Beyond that a read vouches for the chunks it touches. The sealed bytes must not change.
    """

    def __init__(self, key: bytes, read_at: ReadAt, sealed_size: int) -> None:
        """Raise DecryptFailed if no payload has that size, or if its last chunk is not genuine."""
        self.size: Final = plaintext_size(sealed_size)
        self._aead = ChaCha20Poly1305(key)
        self._read_at = read_at
        self._sealed_size = sealed_size
        self._chunks = chunk_count(self.size)
        self._open(self._chunks - 1, self._chunks)

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``offset`` on, fewer at the end; DecryptFailed if a chunk is forged."""
        return b"".join(self.slabs(offset, offset + length))

    def slabs(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes from ``start`` to before ``stop``, in order, some 1 MiB at a time.

        Raises DecryptFailed at the first slab that holds a forged chunk, and yields nothing of it.
        """
        stop = self.size if stop is None else min(stop, self.size)
        if start < 0:
            raise ValueError("a range starts at 0 or later")
        while start < stop:
            first = start // CHUNK
            base = first * CHUNK
            end = min(base + _SLAB, stop)
            yield memoryview(self._open(first, chunk_count(end)))[start - base : end - base]
            start = end

    def _open(self, first: int, end: int) -> bytes:
        position = first * SEALED_CHUNK
        length = min(end * SEALED_CHUNK, self._sealed_size) - position
        sealed = self._read_at(position, length)
        if len(sealed) != length:
            raise DecryptFailed
        return open_run(self._aead, first, sealed, last=end == self._chunks)


def open_slabs(key: bytes, read_at: ReadAt, sealed_size: int) -> Iterator[memoryview]:
    """A whole payload in order, some 1 MiB at a time; errors as ``RangeReader``, the first ones at once."""
    return RangeReader(key, read_at, sealed_size).slabs()
