"""Sources and targets that are files beneath the roots: ``locations`` over ``local_paths``."""

import os
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from kms_core.jobs.model import SWEPT, Commit
from kms_core.jobs.storage.local_paths import (
    OpenSource,
    Placement,
    Roots,
    TemporaryFile,
    keep_access,
    temporary_name,
)
from kms_core.payload.files import FileRange, FileWriter, RangeSource, changed
from kms_core.payload.parallel import ParallelOptions, copy_run
from kms_protocol.errors import KmsError

_COPY_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RootedSource:
    """An open file."""

    file: OpenSource

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    @property
    def reader(self) -> FileRange:
        return FileRange(self.file.fd, self.file.size_bytes)

    def check_unchanged(self) -> None:
        self.file.check_unchanged()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.__exit__(kind, exc, trace)


@dataclass(frozen=True, slots=True)
class RootedPending:
    """A temporary file beside its target."""

    file: TemporaryFile
    target: "RootedTarget"
    fence: int

    @property
    def writer(self) -> FileWriter:
        return FileWriter(self.file.fd)

    def copy(self, reader: RangeSource, at: int, pace: ParallelOptions) -> None:
        """Put the rest of a target, from ``at`` on; by reflink or in the kernel, where that can be."""
        if not isinstance(reader, FileRange):
            copy_run(reader, self.writer, at, pace)
            return
        done = 0
        while done < reader.size:
            pace.before()
            step = min(_COPY_BYTES, reader.size - done)
            copied = os.copy_file_range(reader.fd, self.file.fd, step, reader.offset + done, at + done)
            if not copied:
                raise changed()
            done += copied
            pace.after(copied)

    def settle(self, source: object, *, in_place: bool) -> Commit:
        """Make what was written durable and describe it; nothing may be written afterwards."""
        replaced = source.file if in_place and isinstance(source, RootedSource) else None
        if replaced:
            keep_access(replaced.fd, self.file.fd)
        placed = self.file.settle()
        return Commit(
            fence=self.fence,
            inode=placed.inode,
            size_bytes=placed.size_bytes,
            mtime_ns=placed.mtime_ns,
            replaces=replaced.identity.name if replaced else None,
        )

    def finish(self, commit: Commit) -> None:
        """As the target's ``finish``."""
        self.target.finish(commit)

    def discard(self) -> None:
        """Remove it."""
        self.file.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.__exit__(kind, exc, trace)


@dataclass(frozen=True, slots=True)
class RootedTarget:
    """Where the result of a job goes, and how it gets there."""

    url: str
    job_id: str
    overwrite: bool
    roots: Roots

    def prepare(self, fence: int, room_bytes: int = 0) -> RootedPending:
        """Begin an attempt. Raises TargetExists, PathRefused, SpoolFull if there is no room for so much."""
        file = self.roots.prepare(
            self.url, tag(self.job_id, fence), overwrite=self.overwrite, room_bytes=room_bytes
        )
        return RootedPending(file, self, fence)

    def finish(self, commit: Commit) -> bool:
        """Put the file in place; doing it again changes nothing. Raises TargetExists, PathRefused."""
        self.roots.finish(self._placement(commit), overwrite=self.overwrite)
        return True

    def is_placed(self, commit: Commit) -> bool:
        """Whether the file of this commit is in place. Raises PathRefused, Unavailable."""
        return self.roots.is_placed(self._placement(commit))

    def _placement(self, commit: Commit) -> Placement:
        temporary = temporary_name(tag(self.job_id, commit.fence))
        return Placement(
            self.url, temporary, commit.inode, commit.size_bytes, commit.mtime_ns, commit.replaces
        )

    def give_up(self, commit: Commit) -> None:
        """The commit was refused: its file is in nobody's way."""
        self.roots.discard(self.url, temporary_name(tag(self.job_id, commit.fence)))

    def sweep(self, fence: int) -> None:
        """Remove what attempts before this fence left beside the target when they were killed."""
        earlier = range(max(1, fence - SWEPT), fence)
        with suppress(KmsError):  # the attempt itself will say what is wrong with the directory
            self.roots.discard(self.url, *(temporary_name(tag(self.job_id, each)) for each in earlier))


def tag(job_id: str, fence: int) -> str:
    """What differs in every attempt of every job."""
    return f"{job_id}-{fence}"
