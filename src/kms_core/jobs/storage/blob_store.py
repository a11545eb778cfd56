"""Interface of the stores of spool blobs: a directory (``spool_folder``).

Blobs have a name in a folder. A folder is that of a job, by its id, or ``multipart``. All calls may raise
SpoolUnavailable while the disk or the bucket does not answer; a name that is missing raises ResultExpired.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from kms_core.payload.files import RangeSource

WriteBlob = Callable[[memoryview, int], None]
"""Writes bytes of a new blob at a position, front to back.

The caller may change them afterwards. Raises SpoolFull.
"""


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
        """Bytes for which there is room."""
