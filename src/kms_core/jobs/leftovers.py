"""Notes of multipart uploads under way, so that the next attempt can throw away what a killed one left.

A store keeps the parts of an upload that nobody completes, and does not tell whose it is. A note is a small
file beside the spool's folders, ``multipart/<job id>.<fence>.<digest of the target>``, written before the
first part and removed with the upload. An upload whose note is lost (a kill between two requests) has no
parts.
"""

import hashlib
from pathlib import Path

from kms_core.envelope import disk


class Notes:
    """One note for each attempt and target. Shared by all workers of an install, as the spool is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def add(self, job_id: str, fence: int, url: str, upload: str) -> None:
        """Note an upload. Raises SpoolFull."""
        path = self._path(job_id, fence, url)
        temporary = path.with_suffix(".tmp")
        with disk.room():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_text(upload, "ascii")
            temporary.rename(path)

    def find(self, job_id: str, fence: int, url: str) -> str | None:
        """The upload that was noted for this attempt."""
        try:
            return self._path(job_id, fence, url).read_text("ascii")
        except FileNotFoundError:
            return None

    def forget(self, job_id: str, fence: int, url: str) -> None:
        """The upload is no more. Doing it twice is no error."""
        self._path(job_id, fence, url).unlink(missing_ok=True)

    def _path(self, job_id: str, fence: int, url: str) -> Path:
        return self._directory / f"{job_id}.{fence}.{hashlib.sha256(url.encode()).hexdigest()[:32]}"
