"""Marks by which a job recognises what it has put in place, also when Redis has forgotten that it did.

A mark is ``<job id>/<attempt id>/<MAC in hex>``. The MAC is over the job, its sealed record, the attempt, the
URLs of source and target and, of a file, its inode, size in bytes and mtime in ns: so the mark counts for no
copy and no later version. A file has it as the extended attribute ``user.kms.commit``; where the file system
has none, it is a note in the job's folder of the spool. An object has it in its metadata from the beginning
of its upload.
"""

import errno
import hmac
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from kms_core.jobs.model import RecordKey
from kms_core.jobs.storage.blob_store import BlobStore
from kms_protocol.errors import RecordRefused, ResultExpired

ATTRIBUTE: Final = "user.kms.commit"
NOTE: Final = "commit"
_LABEL: Final = b"commit-mark"
_LONGEST: Final = 512
_NO_ATTRIBUTES: Final = frozenset(
    (errno.ENOTSUP, errno.ENOSYS, errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE, errno.EPERM)
)
"""Errors of setxattr(2) where the file system, or its settings, take no attribute."""


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
        """The mark of an attempt on its target at a URL.

        ``facts`` are those of the ``FileIdentity`` of a file; none for an object.
        """
        texts = (self.job_id, attempt_id, self.source, url, *map(str, facts))
        mac = self.key.digest(_LABEL, self.spec, *(text.encode() for text in texts))
        return f"{self.job_id}/{attempt_id}/{mac.hex()}"

    def is_ours(self, mark: str, url: str, *facts: int) -> bool:
        """Return whether an attempt at this job made the mark, with ``url`` and ``facts`` as in ``sign``."""
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
