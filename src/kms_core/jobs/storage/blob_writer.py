"""Writes a blob of the spool: in memory while it is small, into the spool from then on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Final

from cryptography.utils import Buffer

from kms_core.age.header import VERSION_LINE
from kms_core.envelope import sealing
from kms_core.jobs.ends import SmallBlob
from kms_core.jobs.storage.blob_store import BlobSink
from kms_core.jobs.storage.blocks import BlockWriter, stored_size
from kms_core.payload.streaming import SlabSealer
from kms_protocol.errors import NotACiphertext

WRITE_ID_BYTES: Final = 16
_SIZE_BYTES: Final = 8


class BlobWriter:
    """Writes one blob front to back, sealed or as it is. ``size`` counts what was given.

    ``small``, of a finished blob: its name and its bytes, where those are to rest in Redis.
    """

    def __init__(self, out: BlockWriter, write_id: bytes, sealing_: sealing.Sealing | None) -> None:
        self._out = out
        self._write_id = write_id
        self._sealer = SlabSealer(sealing_.payload_key) if sealing_ else None
        self._start = b""
        self.size = 0
        self.small: SmallBlob | None = None
        if sealing_:
            out.write(memoryview(sealing_.head))

    def write(self, data: Buffer, *, more: bool = False) -> None:
        """Take some bytes; ``more`` tells for certain that others follow, which saves a copy of large ones.

        Raises SpoolFull; NotACiphertext if an unsealed blob begins as something else.
        """
        self.size += len(memoryview(data))
        if self._sealer:
            for slab in self._sealer.feed(data, more=more):
                self._out.write(slab)
            return
        if len(self._start) < len(VERSION_LINE):
            self._start += bytes(memoryview(data)[: len(VERSION_LINE)])
            if not self._start.startswith(VERSION_LINE[: len(self._start)]):
                raise NotACiphertext
        self._out.write(memoryview(data))

    def finish(self) -> None:
        """Write what is held back. The blob is whole afterwards."""
        if self._sealer:
            self._out.write(memoryview(self._sealer.finish()))
        elif len(self._start) < len(VERSION_LINE):
            raise NotACiphertext
        self._out.finish()

    @property
    def ref(self) -> bytes:
        """Of a finished blob: 16 random bytes, and the size of its content in 8 (big-endian)."""
        return self._write_id + self._out.size.to_bytes(_SIZE_BYTES, "big")

    @property
    def stored(self) -> int:
        """Bytes in the spool."""
        return self._out.stored


class NewBlob:
    """A blob that is being written: in memory until it is moved to the spool. A ``BlobSink``."""

    def __init__(self, stack: ExitStack, create: Callable[[], AbstractContextManager[BlobSink]]) -> None:
        self._stack, self._create = stack, create
        self._memory = bytearray()
        self._sink: BlobSink | None = None

    def write_at(self, data: memoryview, position: int) -> None:
        if self._sink:
            self._sink.write_at(data, position)
        else:
            self._memory += data

    def move(self) -> None:
        """Write all of it to the spool from now on. Raises SpoolFull, RecordRefused, SpoolUnavailable."""
        if self._sink is None:
            self._sink = self._stack.enter_context(self._create())
            if self._memory:
                self._sink.write_at(memoryview(self._memory), 0)
            self._memory = bytearray()

    def finish(self) -> None:
        """Move it, and return once it is durable. Raises as ``move``."""
        self.move()
        if self._sink:
            self._sink.finish()

    @property
    def is_moved(self) -> bool:
        return self._sink is not None

    @property
    def content(self) -> bytes:
        """All of it, if it was not moved."""
        return bytes(self._memory)


class GrowingWriter(BlockWriter):
    """Writes a new blob, which is moved before it has more than ``most_bytes``."""

    def __init__(self, new: NewBlob, key: bytes, room: int, most_bytes: int) -> None:
        super().__init__(new, key, room)
        self._new, self._most_bytes = new, most_bytes

    def write(self, data: memoryview) -> None:
        if not self._new.is_moved and stored_size(self.size + len(data)) > self._most_bytes:
            self._new.move()
        super().write(data)
