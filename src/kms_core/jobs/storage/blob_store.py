"""Interface of the stores of spool blobs: a directory (``spool_folder``) or a bucket (``spool_bucket``).

Blobs have a name in a folder. A folder is that of a job, by its id, or ``multipart``. All calls may raise
SpoolUnavailable while the disk or the bucket does not answer; a name that is missing raises ResultExpired.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from cryptography.utils import Buffer

from kms_core.envelope.sealing import Sealing
from kms_core.jobs.spec import SmallBlob
from kms_core.payload.files import RangeSource
from kms_core.payload.streaming import SlabSealer
from kms_protocol.errors import SpoolFull

WriteBlob = Callable[[memoryview, int], None]
"""Writes bytes of a new blob at a position, front to back.

The caller may change them afterwards. Raises SpoolFull.
"""
CreateBlob = Callable[[], tuple[WriteBlob, int]]
"""Begins a blob in a store, and says how many bytes it may take from then on."""


class SpoolNote(NamedTuple):
    """A few bytes, and when they were written (seconds since the epoch)."""

    data: bytes
    at: float


class BlobStore(Protocol):
    """Blobs by folder and name. Safe for threads and across forks."""

    @property
    def usage_cache_s(self) -> float:
        """Seconds for which a count of ``used_bytes`` is good at least."""

    @property
    def is_remote(self) -> bool:
        """Return whether a count may take so long that no caller is to wait for it."""

    @property
    def is_away(self) -> bool:
        """Return whether the last call got no answer."""

    @property
    def is_refused(self) -> bool:
        """Return whether a call was refused in the last minute, and nothing was written since."""

    def create(self, folder: str, name: str, declared_bytes: int = 0) -> AbstractContextManager[WriteBlob]:
        """A new blob in place of an unfinished one, durable under its name when the block ends.

        Nothing is left of it if the block fails.

        ``declared_bytes`` is about its size, 0 for an unknown one. Raises SpoolFull; RecordRefused where
        something else is in its place.
        """

    def open(self, folder: str, name: str) -> AbstractContextManager[RangeSource]:
        """A blob to be read. Raises RecordRefused where something else is in its place."""

    def put(self, folder: str, name: str, data: bytes, *, durable: bool) -> None:
        """Write a note, in place of an earlier one. Raises as ``create``."""

    def get(self, folder: str, name: str, most_bytes: int) -> SpoolNote:
        """Read the first bytes of a note. Raises as ``open``."""

    def names(self, folder: str, young_s: float = math.inf) -> list[str]:
        """Names in a folder; a bucket leaves out what was written longer ago. Raises as ``open``."""

    def remove(self, folder: str, name: str) -> None:
        """Remove a name, if it is there. Raises as ``open``."""

    def remove_folder(self, folder: str) -> bool:
        """Remove a folder and all in it; whether it is gone."""

    def folders(self, older_than_s: float) -> Iterator[str]:
        """Names of folders that nothing has changed for so long."""

    def sweep(self) -> None:
        """Remove what writers that were killed left unfinished, and no name shows."""

    def used_bytes(self) -> int:
        """Bytes of all blobs."""

    def free_bytes(self) -> int:
        """Bytes for which there is room. Raises SpoolUnavailable if that cannot be asked."""


class BlobWriter:
    """Seals and writes one blob front to back. ``ref`` is the random id of this writing.

    ``stored`` counts the bytes in the spool. ``small``, of a finished blob: its name and bytes if they are to
    be stored in Redis.
    """

    def __init__(
        self, ref: bytes, begun: Sealing, create: CreateBlob, room: int, most_small_bytes: int
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
        """Take some bytes; ``more`` says for certain that others follow, which saves a copy of large ones.

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
        if self._write is None and self.stored > self._most_small_bytes:
            self._write, self._room = self._create()
        if self.stored > self._room:
            raise SpoolFull(
                "Uploads and results use all of spool_max_bytes: wait until results expire, or raise it"
            )
        if self._write is None:
            self._memory += data
            return
        if self._memory:
            self._write(memoryview(self._memory), 0)
            self._memory = bytearray()
        self._write(data, position)
