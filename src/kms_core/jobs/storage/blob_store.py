"""Interface of the stores of spool blobs: a directory (``spool_folder``) or a bucket (``spool_bucket``).

Blobs have a name in a folder. A folder is that of a job, by its id, or ``multipart``. All calls may raise
SpoolUnavailable while the disk or the bucket does not answer; a name that is missing raises ResultExpired.
"""

import errno
import hmac
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, Self

from cryptography.utils import Buffer

from kms_core.envelope.sealing import Sealing
from kms_core.jobs.model import RecordKey
from kms_core.jobs.spec import SmallBlob
from kms_core.payload.files import RangeSource
from kms_core.payload.streaming import SlabSealer
from kms_protocol.errors import RecordRefused, ResultExpired, SpoolFull

WriteBlob = Callable[[memoryview, int], None]
"""Writes bytes of a new blob at a position, front to back.

The caller may change them afterwards. Raises SpoolFull.
"""
CreateBlob = Callable[[], tuple[WriteBlob, int]]
"""Begins a blob in a store, and says how many bytes it may take from then on."""
ATTRIBUTE: Final = "user.kms.commit"
NOTE: Final = "commit"
_LABEL: Final = b"commit-mark"
_LONGEST: Final = 512
_NO_ATTRIBUTES: Final = frozenset(
    (errno.ENOTSUP, errno.ENOSYS, errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE, errno.EPERM)
)
"""Errors of setxattr(2) where the file system, or its settings, take no attribute."""


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


# Marks by which a job recognises what it has put in place, also when Redis has forgotten that it did.
#
# A mark is ``<job id>/<attempt id>/<MAC in hex>``. The MAC is over the job, its sealed record, the attempt,
# the URLs of source and target and, of a file, its inode, size in bytes and mtime in ns: so the mark counts
# for no copy and no later version. A file has it as the extended attribute ``user.kms.commit``; where the
# file system has none, it is a note in the job's folder of the spool. An object has it in its metadata from
# the beginning of its upload.


class FileIdentity(NamedTuple):
    """The identity of a file and its last change, on its file system."""

    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class CommitMarks:
    """Marks of a job on the target of one source.

    ``job_id`` is that which its submitter knows, ``spec`` the digest of its sealed record.
    """

    key: RecordKey
    job_id: str
    spec: bytes
    source: str
    spool: BlobStore

    def sign(self, attempt_id: str, url: str, *facts: int) -> str:
        """The mark of an attempt on its target at a URL."""
        texts = (self.job_id, attempt_id, self.source, url, *map(str, facts))
        mac = self.key.digest(_LABEL, self.spec, *(text.encode() for text in texts))
        return f"{self.job_id}/{attempt_id}/{mac.hex()}"

    def is_ours(self, mark: str, url: str, *facts: int) -> bool:
        """Return whether an attempt at this job has put this in place."""
        attempt_id = mark.removeprefix(f"{self.job_id}/").partition("/")[0]
        return hmac.compare_digest(mark.encode(), self.sign(attempt_id, url, *facts).encode())

    # -- files ----------------------------------------------------------------------------------------

    def put(self, fd: int, attempt_id: str, url: str) -> None:
        """Mark an open file as it is now. Raises SpoolFull if the note that it needs has no room."""
        mark = self.sign(attempt_id, url, *FileIdentity.of(os.fstat(fd))).encode()
        try:
            os.setxattr(fd, ATTRIBUTE, mark)
        except OSError as exc:
            if exc.errno not in _NO_ATTRIBUTES:
                raise
            self.spool.put(self.job_id, f"{self._note(url)}.{attempt_id}", mark, durable=False)

    def is_on(self, fd: int, url: str) -> bool:
        """Return whether an open file, as it is now, is what this job has put at a URL."""
        facts = FileIdentity.of(os.fstat(fd))
        found = []
        with suppress(OSError):  # no attribute, or none at all
            found.append(os.getxattr(fd, ATTRIBUTE))
        with suppress(ResultExpired, RecordRefused):
            names = (name for name in self.spool.names(self.job_id) if name.startswith(self._note(url)))
            found += [self.spool.get(self.job_id, name, _LONGEST).data for name in names]
        return any(self.is_ours(mark.decode("ascii", "replace"), url, *facts) for mark in found)

    def _note(self, url: str) -> str:
        return f"{NOTE}.{self.key.digest(_LABEL, url.encode()).hex()[:32]}"
