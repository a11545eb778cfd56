"""Notes of multipart uploads under way, so that the next attempt can throw away what a killed one left.

A store keeps the parts of an upload that nobody completes, and does not tell whose it is. A note is a small
file beside the spool's folders, ``multipart/<job id>.<fence>.<digest of the target>``, written before the
first part and removed with the upload. An upload whose note is lost (a kill between two requests) has no
parts.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from kms_core.jobs.storage import plain_files
from kms_core.payload import disk
from kms_protocol.errors import RecordRefused, ResultExpired

_LONGEST: Final = 4096


class MultipartJournal:
    """One note for each attempt and target. Shared by all workers of an install, as the spool is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def add(self, job_id: str, fence: int, url: str, upload: str) -> None:
        """Note an upload. Raises SpoolFull, RecordRefused if something else is in its place."""
        name = self._name(job_id, fence, url)
        with plain_files.create(self._directory, f"{name}.tmp") as fd:
            disk.write_all(fd, memoryview(upload.encode("ascii")), 0)
            (self._directory / f"{name}.tmp").rename(self._directory / name)

    def find(self, job_id: str, fence: int, url: str) -> str | None:
        """The upload that was noted for this attempt."""
        try:
            with plain_files.open_(self._directory, self._name(job_id, fence, url)) as fd:
                return os.pread(fd, _LONGEST, 0).decode("ascii", "replace")
        except (ResultExpired, RecordRefused):
            return None

    def forget(self, job_id: str, fence: int, url: str) -> None:
        """The upload is no more. Doing it twice is no error."""
        with suppress(ResultExpired, RecordRefused):
            plain_files.remove(self._directory, self._name(job_id, fence, url))

    @staticmethod
    def _name(job_id: str, fence: int, url: str) -> str:
        return f"{job_id}.{fence}.{hashlib.sha256(url.encode()).hexdigest()[:32]}"
