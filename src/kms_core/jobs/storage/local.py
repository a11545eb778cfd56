"""Sources and targets that are files beneath the roots, and the files below a directory that a pattern names.

Each directory is opened by its name in the one above, never through a symbolic link. Nothing outside the root
is seen, even if directories are exchanged during the walk.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import msgspec

from kms_core.jobs.ends import PlacedTarget
from kms_core.jobs.file_patterns import TEMPORARY, States, Tree, encoded
from kms_core.jobs.model import Commit
from kms_core.jobs.storage.commit_marks import CommitMarks
from kms_core.jobs.storage.local_paths import (
    DIRECTORY,
    OpenSource,
    Roots,
    TemporaryFile,
    file_errors,
)
from kms_core.payload.files import FileRange, FileWriter, RangeSource, source_changed_error
from kms_core.payload.parallel import ParallelOptions, copy_run
from kms_protocol.errors import KmsError, PathRefused, TooLarge

MOST_DEPTH: Final = 128  # a descriptor is open for each


class ListedFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file of a job over many: its path below the base as in a URL, and its size when it was listed.

    ``code`` is the error of a file that cannot be worked on; an unreadable directory stands for its content.
    """

    path: str
    size_bytes: int = 0
    code: str = ""


def walk(roots: Roots, tree: Tree) -> Iterator[ListedFile]:
    """Regular files in the order of their names' bytes, each directory in its place among them.

    Links, and entries that are neither file nor directory, are skipped. Raises PathRefused if the base is no
    directory beneath a root, TooLarge below 128 directories, Unavailable.
    """
    with roots.directory(tree.base) as top:
        yield from _below(tree, _Place(top, "", tree.start(), 0))


@dataclass(frozen=True, slots=True)
class _Place:
    """An open directory: its path below the base, and what of the pattern it may have matched."""

    fd: int
    path: str
    states: States
    depth: int


def _below(tree: Tree, place: _Place) -> Iterator[ListedFile]:
    if place.depth == MOST_DEPTH:
        raise TooLarge(f"There are more than {MOST_DEPTH} directories in one another")
    with file_errors(), os.scandir(place.fd) as entries:
        found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in found:
        states = tree.step(place.states, entry.name)
        path = place.path + encoded(entry.name)
        if entry.is_dir(follow_symlinks=False):
            if tree.goes_on(states):
                yield from _inside(tree, place, entry.name, states)
        elif entry.is_file(follow_symlinks=False) and tree.is_whole(states) and not _is_ours(entry.name):
            yield ListedFile(path, _size(entry))


def _inside(tree: Tree, place: _Place, name: str, states: States) -> Iterator[ListedFile]:
    path = f"{place.path}{encoded(name)}/"
    try:
        with file_errors():
            inner = os.open(name, DIRECTORY, dir_fd=place.fd)
    except PathRefused as exc:
        yield ListedFile(path, code=exc.code)
        return
    try:
        yield from _below(tree, _Place(inner, path, states, place.depth + 1))
    finally:
        os.close(inner)


def _is_ours(name: str) -> bool:
    return TEMPORARY.fullmatch(name) is not None


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # opening it will raise the error
        return 0


_COPY_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RootedPending:
    """A temporary file beside its target."""

    file: TemporaryFile
    target: "RootedTarget"
    attempt_id: str

    @property
    def writer(self) -> FileWriter:
        return FileWriter(self.file.fd)

    def copy(self, reader: RangeSource, at: int, options: ParallelOptions) -> None:
        """Put the rest of a target, from ``at`` on; by reflink or in the kernel, where that can be."""
        if not isinstance(reader, FileRange):
            copy_run(reader, self.writer, at, options)
            return
        done = 0
        while done < reader.size:
            options.check()
            step = min(_COPY_BYTES, reader.size - done)
            copied = os.copy_file_range(reader.fd, self.file.fd, step, reader.offset + done, at + done)
            if not copied:
                raise source_changed_error()
            done += copied
            options.progress(copied)

    def settle(self, source: object, *, in_place: bool) -> Commit:
        """Make what was written durable and describe it; nothing may be written afterwards.

        ``in_place``: the result takes the place of its source, and of nothing that came after it.
        """
        replaced = source if in_place and isinstance(source, OpenSource) else None
        if replaced:
            _keep_access(replaced.fd, self.file.fd)
        found = self.file.settle(lambda fd: self.target.marks.put(fd, self.attempt_id, self.target.url))
        return Commit(
            attempt_id=self.attempt_id,
            inode=found.inode,
            size_bytes=found.size_bytes,
            mtime_ns=found.mtime_ns,
            replaces=replaced.identity.name if replaced else None,
        )

    def finish(self, commit: Commit) -> None:
        """Finish the target, with the open file or upload of the process that did the work."""
        self.target.finish(commit)

    def discard(self) -> None:
        """Leave nothing of it behind."""
        self.file.discard()


@dataclass(frozen=True, slots=True)
class RootedTarget:
    """The target file of a job."""

    url: str
    job_id: str
    overwrite: bool
    roots: Roots
    marks: CommitMarks

    def recognised(self) -> PlacedTarget | None:
        """Return what this job has put in place, if that is there now. Raises Unavailable."""
        with suppress(PathRefused):  # the attempt itself will say what is wrong
            if found := self.roots.is_marked(self.url, lambda fd: self.marks.is_on(fd, self.url)):
                return PlacedTarget(size_bytes=found.size_bytes, inode=found.inode, mtime_ns=found.mtime_ns)
        return None

    @contextmanager
    def prepare(self, attempt_id: str, room_bytes: int = 0) -> Iterator[RootedPending]:
        """Begin an attempt. Raises TargetExists, PathRefused, SpoolFull if there is no room for so much."""
        name = tag(self.job_id, attempt_id)
        with self.roots.prepare(self.url, name, overwrite=self.overwrite, room_bytes=room_bytes) as file:
            yield RootedPending(file, self, attempt_id)

    def finish(self, commit: Commit) -> bool:
        """Put the file in place; doing it again changes nothing. Raises as ``Roots.finish``."""
        name = tag(self.job_id, commit.attempt_id)
        self.roots.finish(self.url, name, commit, overwrite=self.overwrite)
        return True

    def is_placed(self, commit: Commit) -> bool:
        """Return whether the file of this commit is in place. Raises PathRefused, Unavailable."""
        return self.roots.is_placed(self.url, commit)

    def give_up(self, commit: Commit) -> None:
        """Remove the temporary file of a refused commit."""
        self.roots.discard(self.url, tag(self.job_id, commit.attempt_id))


def sweep(roots: Roots, targets: Mapping[str, str], keep: Collection[str]) -> None:
    """Remove temporary files of jobs, by id, beside their targets, but for those of the attempts ``keep``.

    Each directory is read once.
    """
    beside = {url.rpartition("/")[0]: url for url in targets.values()}
    for url in beside.values():
        with suppress(KmsError):  # the attempt itself will say what is wrong with the directory
            roots.sweep(url, lambda job_id, attempt: job_id in targets and attempt not in keep)


def tag(job_id: str, attempt: str) -> str:
    """A text that differs in every attempt of every job."""
    return f"{job_id}-{attempt}"


def _keep_access(source_fd: int, target_fd: int) -> None:
    """Owner and mode of a file for the one that takes its place. PathRefused if that is not allowed."""
    found, made = os.fstat(source_fd), os.fstat(target_fd)
    with file_errors():
        if (found.st_uid, found.st_gid) != (made.st_uid, made.st_gid):
            os.fchown(target_fd, found.st_uid, found.st_gid)
        os.fchmod(target_fd, found.st_mode & 0o777)
