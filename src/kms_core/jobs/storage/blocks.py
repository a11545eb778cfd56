"""Files with MACs behind their content, one for each 128 KiB: any range is verified as it is read.

The MAC is AES-256-GMAC (NIST SP 800-38D: GCM without plaintext) over one block, under a key that serves this
one file; the number of the block is the nonce. A reader knows the key and the size of the content beforehand,
so no block can be changed, moved, left out or added unnoticed. Sizes and positions are in bytes of the
content, unless they are called stored. Knows no name, job or header.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kms_core.age import stream
from kms_core.jobs.storage.blob_store import BlobSink
from kms_core.payload.files import RangeSource
from kms_protocol.errors import RecordRefused, SpoolFull

BLOCK: Final = 128 * 1024
TAG: Final = 16
_NONCE: Final = 12


def stored_size(size: int) -> int:
    """The size of the file that holds ``size`` bytes of content."""
    return size + TAG * -(-size // BLOCK)


class BlockWriter:
    """Writes one blob front to back. ``size`` counts the content so far.

    The MACs wait in memory until the end: 128 KiB for each GiB.
    """

    def __init__(self, sink: BlobSink, key: bytes, room: int) -> None:
        """``key`` has 32 bytes and was never used before; the blob may take ``room`` bytes."""
        self._sink = sink
        self._gmac = AESGCM(key)
        self._room = room
        self._tags = bytearray()
        self._held = bytearray()
        self.size = 0

    @property
    def stored(self) -> int:
        """Bytes that the blob has, or will have, with its MACs."""
        return stored_size(self.size)

    def write(self, data: memoryview) -> None:
        """Write some content. Raises SpoolFull, SpoolUnavailable."""
        if stored_size(self.size + len(data)) > self._room:
            raise SpoolFull(
                "Uploads and results use all of spool_max_bytes: wait until results expire, or raise it"
            )
        self._sink.write_at(data, self.size)
        self.size += len(data)
        if self._held:
            taken = BLOCK - len(self._held)
            self._held += data[:taken]
            data = data[taken:]
            if len(self._held) < BLOCK:
                return
            self._tag([self._held])
        rest = len(data) % BLOCK
        self._tag(stream.cut(data[: len(data) - rest], BLOCK))
        self._held = bytearray(data[len(data) - rest :])

    def finish(self) -> None:
        """Write the MACs. Raises SpoolFull, SpoolUnavailable."""
        if self._held:
            self._tag([self._held])
        self._sink.write_at(memoryview(self._tags), self.size)

    def _tag(self, blocks: Sequence[bytearray | memoryview]) -> None:
        run = _nonces(len(self._tags) // TAG, len(blocks))
        self._tags += b"".join(map(self._gmac.encrypt, run, repeat(b""), blocks))


@dataclass(frozen=True, slots=True)
class BlockReader:
    """The content of such a file from ``offset`` on; safe for threads.

    Blocks are verified after they are read into memory, so a change of the file during the read is noticed.
    """

    source: RangeSource
    size: int
    gmac: AESGCM = field(repr=False)
    offset: int = 0

    @classmethod
    def of(cls, source: RangeSource, key: bytes, size: int) -> "BlockReader":
        """All of an open blob. Raises RecordRefused if it has not the size that such content has."""
        if source.size != stored_size(size):
            raise RecordRefused
        return cls(source, size, AESGCM(key))

    def read_at(self, position: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end. Raises RecordRefused for a changed block."""
        length = min(length, self.size - position)
        if length <= 0:
            return b""
        with stream.blank(length) as (out, view):
            self._fill(view, self.offset + position)
        return out.getvalue()

    def read_into(self, views: Sequence[memoryview], position: int) -> bool:
        """Fill the views one after another; False if the content ends before. Raises as ``read_at``."""
        if position + sum(map(len, views)) > self.size:
            return False
        for view in views:
            self._fill(view, self.offset + position)
            position += len(view)
        return True

    def stamp(self) -> object:
        """Nothing: a change is found block by block."""
        return None

    def tail(self, position: int) -> "BlockReader":
        """The content from ``position`` on."""
        return replace(self, size=self.size - position, offset=self.offset + position)

    def _fill(self, view: memoryview, start: int) -> None:
        """Read the blocks in which a view lies: into it those that it holds whole."""
        stop, total = start + len(view), self.offset + self.size
        first, end = start // BLOCK, -(-stop // BLOCK)
        bounds = [(low, min(low + BLOCK, total)) for low in range(first * BLOCK, end * BLOCK, BLOCK)]
        blocks = [
            view[low - start : high - start]
            if start <= low and high <= stop
            else memoryview(bytearray(high - low))
            for low, high in bounds
        ]
        self._read(blocks, first)
        for (low, high), block in zip(bounds, blocks, strict=True):
            if low < start or high > stop:
                part = block[max(0, start - low) : stop - low]
                view[max(0, low - start) :][: len(part)] = part

    def _read(self, blocks: Sequence[memoryview], first: int) -> None:
        tags = memoryview(bytearray(TAG * len(blocks)))
        tags_at = self.offset + self.size + TAG * first
        if not self.source.read_into(blocks, first * BLOCK) or not self.source.read_into([tags], tags_at):
            raise RecordRefused
        run = _nonces(first, len(blocks))
        try:
            deque(map(self.gmac.decrypt, run, stream.cut(tags, TAG), blocks), 0)
        except InvalidTag as exc:
            raise RecordRefused from exc


def _nonces(first: int, count: int) -> list[bytes]:
    return [index.to_bytes(_NONCE, "big") for index in range(first, first + count)]
