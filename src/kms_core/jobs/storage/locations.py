"""Locations that jobs read and write: one interface over files beneath the roots and objects in buckets.

They differ in how an invisible target is made, and how it is put in place; the work
in between (``jobs/execution/one_file.py``) knows neither.
"""

import errno
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from kms_core.jobs.file_patterns import Tree, base_of
from kms_core.jobs.model import RecordKey
from kms_core.jobs.spec import FileJob, TreeJob
from kms_core.jobs.storage.blob_store import BlobStore
from kms_core.jobs.storage.commit_marks import CommitMarks
from kms_core.jobs.storage.local import (
    ListedFile,
    OpenSource,
    RootedPending,
    RootedTarget,
    Roots,
    file_errors,
    walk,
)
from kms_core.jobs.storage.s3 import (
    ANY_NAME,
    SCHEME,
    Buckets,
    MultipartJournal,
    ObjectPending,
    ObjectSource,
    ObjectTarget,
)
from kms_core.settings.model import JobsSection
from kms_protocol.errors import PathRefused, TooLarge
from kms_protocol.units import GiB

MOST_HOLE_BYTES: Final = 4 * GiB  # of a source
_BLOCK_BYTES: Final = 512  # of st_blocks, whatever the file system's own are
_MOST_HOLES: Final = 10_000


JobSource = OpenSource | ObjectSource
"""Something to read, pinned as it was when it was opened."""

PendingTarget = RootedPending | ObjectPending
"""A target in the making, not yet visible."""

JobTarget = RootedTarget | ObjectTarget
"""The place of a job's result."""


def check_holes(fd: int, most_bytes: int) -> None:
    """Raise TooLarge for an open file with more bytes of holes, which take no room on the disk.

    A hole costs its maker nothing and its reader as much as data: a result has no holes.
    """
    found = os.fstat(fd)
    missing = found.st_size - found.st_blocks * _BLOCK_BYTES
    if missing > most_bytes and holes(fd, found.st_size, missing) > most_bytes:
        raise TooLarge(
            f"The source is sparse, with more than {most_bytes} bytes of holes: fill them (cp --sparse=never)"
        )


def holes(fd: int, size_bytes: int, missing_bytes: int) -> int:
    """Bytes of an open file that are in holes, by SEEK_DATA and SEEK_HOLE (lseek(2)).

    A file system that compresses also allocates less than a file's size: it shows no hole there. Of a file
    with more than 10,000 holes all bytes that are not allocated count, ``missing_bytes``.
    """
    total = at = 0
    for _ in range(_MOST_HOLES):
        begin = os.lseek(fd, at, os.SEEK_HOLE) if at < size_bytes else size_bytes
        if begin >= size_bytes:
            return total
        try:
            at = os.lseek(fd, begin, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            return total + size_bytes - begin  # the last hole ends the file
        total += at - begin
    return missing_bytes


@dataclass(frozen=True, slots=True)
class Locations:
    """All that jobs may name: ``file://`` beneath the roots, ``s3://`` in the buckets."""

    roots: Roots
    buckets: Buckets
    notes: MultipartJournal
    key: RecordKey
    spool: BlobStore
    limits: JobsSection

    def resource(self, url: str) -> str:
        """The root or bucket of a URL, as ``root:/path`` or ``bucket:name``. Raises PathRefused."""
        if url.startswith(SCHEME):
            return f"bucket:{url.removeprefix(SCHEME).partition('/')[0]}"
        return f"root:{quote(self.roots.root_of(url), safe='/:')}"

    def check(self, url: str) -> None:
        """Raises PathRefused unless jobs may write there. Looks at nothing."""
        if url.startswith(SCHEME):
            self.buckets.writing(url)
        else:
            self.roots.check(url)

    def admit(self, job: FileJob | TreeJob) -> int:
        """The size of a job's source in bytes, 0 of many files: asked before it is accepted.

        Raises what would fail for certain: PathRefused, TooLarge, SpoolFull, Unavailable.
        """
        if isinstance(job, TreeJob):
            self.check_base(base_of(job.source))
            if not job.in_place:
                self.check(f"{job.target}{ANY_NAME}")
            return 0
        self.check(job.target)
        with self.open_source(job.source) as opened:
            # a rewrap may move a payload without copying it, and a store does not say how much it takes
            if job.kind != "rewrap" and not job.target.startswith(SCHEME):
                with suppress(PathRefused):  # its directory may be made before the job runs
                    self.roots.check_room(job.target, opened.reader.size)
            return opened.reader.size

    @contextmanager
    def open_source(self, url: str) -> Iterator[JobSource]:
        """Raises PathRefused if it is not there or not allowed, TooLarge above ``limits``, Unavailable."""
        if url.startswith(SCHEME):
            found = ObjectSource.at(url, self.buckets)
            self._check_size(found.reader.size)
            yield found
            return
        with self.roots.open_source(url) as file:
            self._check_size(file.reader.size)
            with file_errors():
                check_holes(file.fd, MOST_HOLE_BYTES)
            yield file

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > (most := self.limits.source_max_bytes):
            raise TooLarge(
                f"The source is above {most} bytes: split it, or raise [kms.jobs] source_max_bytes"
            )

    def target(self, job: FileJob, owner: str, spec: bytes) -> JobTarget:
        """The place of a job's result; looks at nothing.

        ``owner`` is the job that the submitter knows, ``spec`` the digest of its sealed record.
        """
        marks = CommitMarks(self.key, owner, spec, job.source, self.spool)
        if job.target.startswith(SCHEME):
            return ObjectTarget(job.target, job.job_id, job.overwrite, self.buckets, self.notes, marks)
        return RootedTarget(job.target, job.job_id, job.overwrite, self.roots, marks)

    def sweep(self, targets: Mapping[str, str], keep: Collection[str] = ()) -> None:
        """Remove temporary files and uploads of jobs, by id, but for those of the attempts ``keep``.

        ``targets`` are their targets. A file that cannot be removed is left to a later call.
        """
        files = {job_id: url for job_id, url in targets.items() if not url.startswith(SCHEME)}
        self.roots.sweep(files, keep)
        self.notes.sweep(self.buckets, targets, keep)

    def check_base(self, url: str) -> None:
        """Raises PathRefused unless jobs may read what is below this URL, which ends in a slash."""
        if url.startswith(SCHEME):
            self.buckets.reading(f"{url}{ANY_NAME}")
        else:
            with self.roots.directory(url):
                pass

    def make_parents(self, url: str) -> None:
        """Make the directories that a target lacks. Raises PathRefused, SpoolFull, Unavailable."""
        if not url.startswith(SCHEME):
            self.roots.make_parents(url)

    def files(self, tree: Tree) -> Iterator[ListedFile]:
        """List the files of a pattern, in a fixed order. Raises PathRefused, TooLarge, Unavailable."""
        if not tree.base.startswith(SCHEME):
            yield from walk(self.roots, tree)
            return
        above = tree.base.count("/")  # a key may be written in several ways, but none hides a slash
        for url, size in self.buckets.listing(tree.base):
            path = url.split("/", above)[above]
            if tree.names(path):
                yield ListedFile(path, size)


def is_remote(url: str) -> bool:
    """Return whether reading or writing there keeps a thread waiting more than working."""
    return url.startswith(SCHEME)
