"""Writes a blob of the spool: in memory while it is small, into the spool from then on."""

from collections.abc import Callable

from cryptography.utils import Buffer

from kms_core.envelope.sealing import Sealing
from kms_core.jobs.ends import SmallBlob
from kms_core.jobs.storage.blob_store import WriteBlob
from kms_core.payload.streaming import SlabSealer
from kms_protocol.errors import SpoolFull


class BlobWriter:
    """Seals and writes one blob front to back. ``ref`` is the random id of this writing.

    ``stored`` counts the bytes in the spool. ``small``, of a finished blob: its name and bytes if they are to
    be stored in Redis.
    """

    def __init__(
        self, ref: bytes, begun: Sealing, create: Callable[[], WriteBlob], room: int, most_small_bytes: int
    ) -> None:
        """The blob may take ``room`` bytes; ``create`` is called before it has more than may be small.

        Raises SpoolFull, and what ``create`` raises.
        """
        self.ref = ref
        self.stored = 0
        self.small: SmallBlob | None = None
        self._sealer = SlabSealer(begun.payload_key)
        self._create, self._room, self._most_small_bytes = create, room, most_small_bytes
        self._memory = bytearray()
        self._write: WriteBlob | None = None
        self._put(memoryview(begun.head))

    @property
    def size(self) -> int:
        """Bytes that were given so far."""
        return self._sealer.size

    def write(self, data: Buffer, *, more: bool = False) -> None:
        """Take some bytes; ``more`` tells for certain that others follow, which saves a copy of large ones.

        Raises SpoolFull, SpoolUnavailable.
        """
        for slab in self._sealer.feed(data, more=more):
            self._put(slab)

    def finish(self, name: str) -> None:
        """Write what is held back. Raises as ``write``."""
        self._put(memoryview(self._sealer.finish()))
        if self._write is None:
            self.small = name, bytes(self._memory)

    def _put(self, data: memoryview) -> None:
        position, self.stored = self.stored, self.stored + len(data)
        if self.stored > self._room:
            raise SpoolFull(
                "Uploads and results use all of spool_max_bytes: wait until results expire, or raise it"
            )
        if self._write is None and self.stored <= self._most_small_bytes:
            self._memory += data
            return
        if self._write is None:
            self._write = self._create()
            if self._memory:
                self._write(memoryview(self._memory), 0)
                self._memory = bytearray()
        self._write(data, position)
