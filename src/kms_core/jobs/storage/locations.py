"""Locations that jobs read and write: one interface over files beneath the roots and objects in buckets.

They differ in how an invisible target is made, and how it is put in place; the work
in between (``jobs/execution/one_file.py``) knows neither.
"""

import errno
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self
from urllib.parse import quote

from kms_core.jobs.ends import PlacedTarget
from kms_core.jobs.file_patterns import Tree
from kms_core.jobs.model import Commit
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.spec import FileJob, TreeJob
from kms_core.jobs.storage import local
from kms_core.jobs.storage.blob_store import BlobStore
from kms_core.jobs.storage.buckets import SCHEME, Buckets
from kms_core.jobs.storage.commit_marks import CommitMarks
from kms_core.jobs.storage.local import ListedFile, RootedSource, RootedTarget, walk
from kms_core.jobs.storage.local_paths import Roots, file_errors
from kms_core.jobs.storage.multipart_journal import MultipartJournal
from kms_core.jobs.storage.s3 import ObjectSource, ObjectTarget
from kms_core.payload.files import RangeSource, RangeTarget
from kms_core.payload.parallel import ParallelOptions
from kms_protocol.errors import KmsError, PathRefused, TooLarge

_ANY: Final = "any"  # a name below a directory
_BLOCK_BYTES: Final = 512  # of st_blocks, whatever the file system's own are
_MOST_HOLES: Final = 10_000


class Open(Protocol):
    """Something that its ``with`` block closes."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class JobSource(Open, Protocol):
    """Something to read, pinned as it was when it was opened."""

    @property
    def reader(self) -> RangeSource: ...
    @property
    def size_bytes(self) -> int: ...
    def check_unchanged(self) -> None:
        """Raises InvalidRequest if it is another by now; ask after the last read."""


class PendingTarget(Open, Protocol):
    """A target in the making, not yet visible."""

    @property
    def writer(self) -> RangeTarget: ...
    def copy(self, reader: RangeSource, at: int, options: ParallelOptions) -> None:
        """Write all of ``reader`` from ``at`` on, to the end of the target, as cheaply as it can be done."""

    def settle(self, source: JobSource, *, in_place: bool) -> Commit:
        """Describe what will be put in place; nothing may be written afterwards.

        ``in_place``: the result takes the place of its source, and of nothing that came after it.
        """

    def finish(self, commit: Commit) -> None:
        """As the target's ``finish``, with what only the process that did the work has."""

    def discard(self) -> None:
        """Leave nothing of it behind."""


class JobTarget(Protocol):
    """The place of a job's result."""

    def recognised(self) -> PlacedTarget | None:
        """Return what an attempt at this job has put in place, if that is there now. Raises Unavailable."""

    def prepare(self, attempt_id: str, room_bytes: int = 0) -> PendingTarget:
        """Begin an attempt whose result will have about ``room_bytes``.

        Raises TargetExists, PathRefused, SpoolFull, Unavailable.
        """

    def finish(self, commit: Commit) -> bool:
        """Put in place what a commit describes; once it is there, doing it again changes nothing.

        False if the work must be done again for that. Raises TargetExists, CommitGone, PathRefused,
        Unavailable.
        """

    def is_placed(self, commit: Commit) -> bool:
        """Return whether what a commit describes is in place. Raises PathRefused, Unavailable."""

    def give_up(self, commit: Commit) -> None:
        """Remove what a commit would have put in place; what is in place stays. Raises PathRefused."""


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """Bounds of a source in bytes: its size, and how much of it may be holes, which take no room on the disk.

    A hole costs its maker nothing and its reader as much as data: a result has no holes.
    """

    size_bytes: int = 1024**4
    hole_bytes: int = 4 * 1024**3

    def check(self, size_bytes: int) -> None:
        """Raise TooLarge for a source of more bytes."""
        if size_bytes > self.size_bytes:
            raise TooLarge(
                f"The source is above {self.size_bytes} bytes: split it, or raise [kms.jobs] source_max_bytes"
            )

    def check_holes(self, fd: int) -> None:
        """Raise TooLarge for an open file with more bytes of holes."""
        found = os.fstat(fd)
        missing = found.st_size - found.st_blocks * _BLOCK_BYTES
        if missing > self.hole_bytes and holes(fd, found.st_size, missing) > self.hole_bytes:
            raise TooLarge(
                f"The source is sparse, with more than {self.hole_bytes} bytes of holes: fill them "
                "(cp --sparse=never), or raise [kms.jobs] source_max_hole_bytes"
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
    limits: SourceLimits = SourceLimits()

    def resource(self, url: str) -> str:
        """The root or bucket of a URL, as ``root:/path`` or ``bucket:name``. Raises PathRefused."""
        if url.startswith(SCHEME):
            return f"bucket:{url.removeprefix(SCHEME).partition('/')[0]}"
        return f"root:{quote(self.roots.root_of(url))}"

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
            self.check_base(Tree.parse(job.source).base)
            if not job.in_place:
                self.check_directory(job.target)
            return 0
        self.check(job.target)
        with self.open_source(job.source) as opened:
            if job.kind != "rewrap":  # a file system may move a payload without copying it
                self.check_room(job.target, opened.size_bytes)
            return opened.size_bytes

    def open_source(self, url: str) -> JobSource:
        """Raises PathRefused if it is not there or not allowed, TooLarge above ``limits``, Unavailable."""
        if url.startswith(SCHEME):
            found = ObjectSource.at(url, self.buckets)
            self.limits.check(found.size_bytes)
            return found
        file = self.roots.open_source(url)
        try:
            with file_errors():
                self.limits.check(file.size_bytes)
                self.limits.check_holes(file.fd)
        except KmsError:
            os.close(file.fd)
            raise
        return RootedSource(file)

    def check_room(self, url: str, size_bytes: int) -> None:
        """Raise SpoolFull if a target has no room for so much, as far as that can be told before the work."""
        if not url.startswith(SCHEME):
            with suppress(PathRefused):  # its directory may be made before the job runs
                self.roots.check_room(url, size_bytes)

    def marks(self, job_id: str, spec: bytes, source: str) -> CommitMarks:
        """The marks of a job, as its submitter knows it, on what it makes of a source.

        ``spec`` is the digest of its sealed record.
        """
        return CommitMarks(self.key, job_id, spec, source, self.spool)

    def target(self, url: str, job_id: str, marks: CommitMarks, *, overwrite: bool) -> JobTarget:
        """The place of a job's result; looks at nothing."""
        if url.startswith(SCHEME):
            return ObjectTarget(url, job_id, overwrite, self.buckets, self.notes, marks)
        return RootedTarget(url, job_id, overwrite, self.roots, marks)

    def sweep(self, targets: Mapping[str, str], keep: Collection[str] = ()) -> None:
        """Remove temporary files and uploads of jobs, by id, but for those of the attempts ``keep``.

        ``targets`` are their targets. What cannot be removed now is left to a later call.
        """
        files = {job_id: url for job_id, url in targets.items() if not url.startswith(SCHEME)}
        local.sweep(self.roots, files, keep)
        self.notes.sweep(self.buckets, targets, keep)

    def check_base(self, url: str) -> None:
        """Raises PathRefused unless jobs may read what is below this URL, which ends in a slash."""
        if url.startswith(SCHEME):
            self.buckets.reading(f"{url}{_ANY}")
        else:
            with self.roots.directory(url):
                pass

    def check_directory(self, url: str) -> None:
        """The same for writing; looks at nothing."""
        if url.startswith(SCHEME):
            self.buckets.writing(f"{url}{_ANY}")
        else:
            self.roots.check_directory(url)

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
