"""Sources and targets that are files beneath the roots, and the files below a directory that a pattern names.

Each directory is opened by its name in the one above, never through a symbolic link. Nothing outside the root
is seen, even if directories are exchanged during the walk.
"""

import errno
import os
import stat
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from kms_core.jobs.file_patterns import TAG, TEMPORARY, Positions, Tree, encoded, parse_file_url
from kms_core.jobs.model import Commit, CommitGone
from kms_core.jobs.spec import PlacedTarget
from kms_core.jobs.storage.commit_marks import CommitMarks, FileIdentity
from kms_core.payload.files import (
    FileRange,
    FileWriter,
    RangeSource,
    copied_in_kernel,
    full_disk_as_error,
    source_changed_error,
)
from kms_core.payload.parallel import ParallelOptions, copy_run
from kms_core.secure_files import keep_access
from kms_protocol.errors import (
    ConfigurationError,
    KmsError,
    PathRefused,
    SpoolFull,
    TargetExists,
    TooLarge,
    Unavailable,
)

# Files that jobs name by ``file://``: opened once beneath an allowed root, put in place once.
#
# Every path is walked from its root by directory descriptors, a component at a time and without following
# symbolic links (docs/design.md), so what was checked is what is used. A target appears complete or not at
# all: ``prepare`` makes a temporary file beside it, ``settle`` makes that durable, and ``finish`` puts it
# in place from its commit, in any process and any number of times (docs/design.md, Jobs).

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SOURCE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # no FIFO waits
_TEMPORARY: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_BEGIN: Final = ".kms-"
_END: Final = ".tmp"
_FORGOTTEN_S: Final = 31 * 86_400  # no job lasts longer; Redis may have forgotten that of a file
_NOT_PLAIN: Final = "The path must be that of a regular file with one link, and no part of it a symbolic link"
_NO_LINKS: Final = "The service's user may not do this here, or the file system knows no hard links"
_REFUSALS: Final = {
    errno.ENOENT: "There is nothing at this path: create the file, or for a target its directory, first",
    errno.EACCES: "The service's user has no permission for this path",
    errno.EFBIG: "The file would be larger than its file system, or the limit of the process, allows",
    errno.EROFS: "The file system of this path is read-only",
    errno.ENAMETOOLONG: "The path, or a part of it, is too long for the file system",
    errno.EEXIST: "A temporary file of this attempt is already there",
    **dict.fromkeys((errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EMLINK), _NOT_PLAIN),
    **dict.fromkeys((errno.EPERM, errno.ENOTSUP, errno.ENOSYS), _NO_LINKS),
}
MOST_DEPTH: Final = 128  # a descriptor is open for each


@contextmanager
def file_errors() -> Iterator[None]:
    """Turns OSErrors into errors of the service; also used to read a source and to write a target.

    SpoolFull for a full disk or quota, PathRefused if the caller can mend it, else Unavailable.
    """
    try:
        with full_disk_as_error():
            yield
    except OSError as exc:
        if text := _REFUSALS.get(exc.errno or 0):
            raise PathRefused(text) from exc
        raise Unavailable(f"The file system answered {errno.errorcode.get(exc.errno or 0)}") from exc


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source, open for reading at offset 0."""

    fd: int
    identity: FileIdentity

    @property
    def reader(self) -> FileRange:
        return FileRange(self.fd, self.identity.size_bytes)

    def check_unchanged(self) -> None:
        """Raises InvalidRequest if the file was written to since it was opened; ask after the last read."""
        if FileIdentity.of(os.fstat(self.fd)) != self.identity:
            raise source_changed_error()


def temporary_name(tag: str) -> str:
    """``tag`` (letters, digits, ``_``, ``-``; at most 64) differs in every attempt of every job.

    Raises PathRefused for any other: it may have rested where others can write, and no file but a temporary
    one is ever renamed or removed by it.
    """
    if not TAG.fullmatch(tag):
        raise PathRefused("A temporary file of the service has a tag of 1 to 64 letters, digits, _ and -")
    return f"{_BEGIN}{tag}{_END}"


class Roots:
    """The directories beneath which jobs may read and write. Holds no descriptor between calls."""

    def __init__(self, roots: Sequence[Path], forbidden: Sequence[Path] = ()) -> None:
        """Refuse, by ConfigurationError, what would let a job reach too far.

        That is a root which is relative, missing, no directory or ``/``, or which contains or lies in one
        of ``forbidden`` (keys, spool, audit, run directory), symbolic links followed.
        """
        private = [Path(os.path.realpath(path)) for path in forbidden]
        # A link in the operator's own path is followed here, once; callers may write either form.
        self._roots = [(PurePosixPath(root), _checked_root(root, private)) for root in roots]

    def check(self, url: str) -> None:
        """Raises PathRefused unless the URL is well-formed and beneath a root. Looks at no file."""
        self._locate(url)

    def root_of(self, url: str) -> str:
        """The root that a URL is beneath, or is, as the settings name it. Raises PathRefused."""
        root, _ = self._locate(url.removesuffix("/"), itself=True)
        return str(next(named for named, found in self._roots if found == root))

    def directory(self, url: str) -> AbstractContextManager[int]:
        """A descriptor of a directory, which may be a root itself. Raises PathRefused if it is none."""
        return _directory(*self._locate(url.removesuffix("/"), itself=True))

    def check_room(self, url: str, size_bytes: int) -> None:
        """Raise SpoolFull if the file system of a target has no room for so much, PathRefused."""
        with self.parent(url) as (dir_fd, _):
            _check_room(dir_fd, size_bytes)

    def make_parents(self, url: str) -> None:
        """Make the directories above a target that are missing (0700), each durable before the next.

        Those that are there too: who made them may have died before its sync, or be about to.
        """
        root, (*parents, _) = self._locate(url)
        for depth, name in enumerate(parents):
            with _directory(root, parents[:depth]) as above:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=above)
                os.fsync(above)

    @contextmanager
    def open_source(self, url: str, *, may_have_links: bool = False) -> Iterator[OpenSource]:
        """Open for reading. Raises PathRefused unless it is a regular file, reached by no symlink.

        It has one link only, unless it ``may_have_links``.
        """
        with self.parent(url) as (dir_fd, name):
            fd = os.open(name, _SOURCE, dir_fd=dir_fd)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or (found.st_nlink != 1 and not may_have_links):
                raise PathRefused(_NOT_PLAIN)
            yield OpenSource(fd, FileIdentity.of(found))
        finally:
            os.close(fd)

    def sweep(self, targets: Mapping[str, str], keep: Collection[str]) -> None:
        """Remove temporary files of jobs, by id, beside their targets, but not of the attempts ``keep``.

        Old ones of other jobs too. Each directory is read once.
        """
        for url in {url.rpartition("/")[0]: url for url in targets.values()}.values():
            # the attempt itself will say what is wrong with the directory
            with suppress(KmsError), self.parent(url) as (dir_fd, _):
                for name in os.listdir(dir_fd):  # noqa: PTH208 -- a descriptor
                    if name.startswith(_BEGIN) and TEMPORARY.fullmatch(name):
                        job_id, _, attempt = name.removeprefix(_BEGIN).removesuffix(_END).rpartition("-")
                        _unlink_left(name, dir_fd, is_left=job_id in targets and attempt not in keep)

    def _locate(self, url: str, *, itself: bool = False) -> tuple[Path, tuple[str, ...]]:
        path = parse_file_url(url)
        for written, real in self._roots:
            for form in (written, real):
                if (itself or path != form) and path.is_relative_to(form):
                    return real, path.relative_to(form).parts
        raise PathRefused("The path is not beneath an allowed root; [kms.jobs] roots names them")

    @contextmanager
    def parent(self, url: str) -> Iterator[tuple[int, str]]:
        """The directory above a path, open, and the last name of the path. Raises as ``file_errors``."""
        root, (*parents, name) = self._locate(url)
        with _directory(root, parents) as dir_fd:
            yield dir_fd, name


def _checked_root(root: Path, private: Sequence[Path]) -> Path:
    if not root.is_absolute() or not root.is_dir():
        raise ConfigurationError(f"kms.jobs.roots: {root} is not an absolute path of a directory that exists")
    real = root.resolve()
    if real == Path("/"):
        raise ConfigurationError("kms.jobs.roots: / would allow every file; name a directory")
    for path in private:
        if path.is_relative_to(real) or real.is_relative_to(path):
            raise ConfigurationError(f"kms.jobs.roots: {root} overlaps {path}, which no job may reach")
    return real


@contextmanager
def _directory(root: Path, names: Sequence[str]) -> Iterator[int]:
    """A descriptor of a directory, opened name by name from its root on. Raises as ``file_errors``."""
    with file_errors():
        fd = os.open(root, DIRECTORY)
        try:
            for name in names:
                inner = os.open(name, DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)


def _found(name: str, dir_fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _unlink_left(name: str, dir_fd: int, *, is_left: bool) -> None:
    """Remove a temporary file that is left, or so old that its job is forgotten."""
    with suppress(FileNotFoundError):
        written = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mtime
        if is_left or time.time() - written > _FORGOTTEN_S:
            os.unlink(name, dir_fd=dir_fd)


def _check_room(dir_fd: int, size_bytes: int) -> None:
    found = os.fstatvfs(dir_fd)
    if found.f_blocks and size_bytes > found.f_bavail * found.f_frsize:
        raise SpoolFull(
            "The file system of the target has no room for the result: make room there, or name a target "
            "elsewhere"
        )


def _check_free(
    name: str, dir_fd: int, *, overwrite: bool, replaces: tuple[int, int, int] | None = None
) -> None:
    """Raise TargetExists for a name that is taken, or no longer that of the source that it ``replaces``.

    Raises PathRefused for one that cannot be overwritten.
    """
    found = _found(name, dir_fd)
    if found and not overwrite:
        raise TargetExists
    if found and not stat.S_ISREG(found.st_mode):
        raise PathRefused("Only a regular file can be overwritten")
    if replaces and (not found or FileIdentity.of(found) != replaces):
        raise TargetExists("The source is another file by now: run the job again when nothing writes to it")


def _is(commit: Commit, name: str, dir_fd: int) -> bool:
    found = _found(name, dir_fd)
    described = commit.inode, commit.size_bytes, commit.mtime_ns
    return bool(found and stat.S_ISREG(found.st_mode) and FileIdentity.of(found) == described)


def _place(commit: Commit, temporary: str, name: str, dir_fd: int, *, overwrite: bool) -> None:
    """Another process may do the same: the second one finds nothing left to do."""
    with suppress(FileNotFoundError):  # renamed away, or removed by the other process
        if not overwrite:
            try:
                os.link(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
            except FileExistsError as exc:
                if not _is(commit, name, dir_fd):
                    raise TargetExists from exc
        elif not _is(commit, name, dir_fd):
            _check_free(name, dir_fd, overwrite=True, replaces=commit.replaces)
            os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        os.unlink(temporary, dir_fd=dir_fd)


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
        yield from _below(tree, top, "", tree.start())


def _below(tree: Tree, fd: int, path: str, positions: Positions) -> Iterator[ListedFile]:
    """The files in an open directory. ``path`` is its path below the base, which leads to ``positions``."""
    if path.count("/") == MOST_DEPTH:
        raise TooLarge(f"There are more than {MOST_DEPTH} directories in one another")
    with file_errors(), os.scandir(fd) as entries:
        found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in found:
        name = entry.name
        after, at = tree.step(positions, name), path + encoded(name)
        if entry.is_dir(follow_symlinks=False):
            if tree.goes_on(after):
                yield from _inside(tree, fd, name, f"{at}/", after)
        elif entry.is_file(follow_symlinks=False) and tree.is_whole(after) and not TEMPORARY.fullmatch(name):
            yield ListedFile(at, _size(entry))


def _inside(tree: Tree, above: int, name: str, path: str, positions: Positions) -> Iterator[ListedFile]:
    try:
        with file_errors():
            inner = os.open(name, DIRECTORY, dir_fd=above)
    except PathRefused as exc:
        yield ListedFile(path, code=exc.code)
        return
    try:
        yield from _below(tree, inner, path, positions)
    finally:
        os.close(inner)


def _size(entry: "os.DirEntry[str]") -> int:
    with suppress(OSError):  # opening it will raise the error
        return entry.stat(follow_symlinks=False).st_size
    return 0


@dataclass(frozen=True, slots=True)
class RootedPending:
    """A temporary file (0600) beside its target, open for writing."""

    name: str
    dir_fd: int
    fd: int
    target: "RootedTarget"
    attempt_id: str

    @property
    def writer(self) -> FileWriter:
        return FileWriter(self.fd)

    def copy(self, reader: RangeSource, at: int, options: ParallelOptions) -> None:
        """Put the rest of a target, from ``at`` on; by reflink or in the kernel, where that can be."""
        if isinstance(reader, FileRange):
            for copied in copied_in_kernel(reader, self.fd, at):
                options.progress(copied)
                options.check()
                reader, at = reader.tail(copied), at + copied
        copy_run(reader, self.writer, at, options)

    def settle(self, source: object, *, in_place: bool) -> Commit:
        """Make what was written durable and describe it; nothing may be written afterwards.

        ``in_place``: the result takes the place of its source, and of nothing that came after it. The file is
        marked as it is; again if making it durable has changed its time, as on NFS.
        """
        replaced = source if in_place and isinstance(source, OpenSource) else None
        with file_errors():
            if replaced:
                keep_access(self.fd, os.fstat(replaced.fd))
            marked = None
            while marked != (found := os.fstat(self.fd)).st_mtime_ns:
                marked = found.st_mtime_ns
                self.target.marks.put(self.fd, self.attempt_id, self.target.url)
                os.fsync(self.fd)
            os.fsync(self.dir_fd)
        return Commit(
            attempt_id=self.attempt_id,
            **FileIdentity.of(found)._asdict(),
            replaces=replaced.identity if replaced else None,
        )

    def finish(self, commit: Commit) -> None:
        """Finish the target, with the open file or upload of the process that did the work."""
        self.target.finish(commit)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        with file_errors(), suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self.dir_fd)


@dataclass(frozen=True, slots=True)
class RootedTarget:
    """The target file of a job. Methods raise PathRefused, Unavailable."""

    url: str
    job_id: str
    overwrite: bool
    roots: Roots
    marks: CommitMarks

    def recognised(self) -> PlacedTarget | None:
        """Return what this job has put in place, if that is there now.

        None for a target that is no regular file or may not be read: the attempt itself says what is wrong.
        """
        with suppress(PathRefused), self.roots.open_source(self.url, may_have_links=True) as file:
            if self.marks.is_on(file.fd, self.url):
                return PlacedTarget(**file.identity._asdict())
        return None

    @contextmanager
    def prepare(self, attempt_id: str, room_bytes: int = 0) -> Iterator[RootedPending]:
        """Make the temporary file of an attempt, which stays when the block ends.

        The target may be its job's source with ``overwrite`` only. Raises TargetExists, PathRefused (also
        where ``overwrite`` would replace anything but a regular file), SpoolFull, also where there is no room
        for ``room_bytes``.
        """
        temporary = self._temporary(attempt_id)
        with ExitStack() as stack:
            with self.roots.parent(self.url) as (dir_fd, name):
                _check_free(name, dir_fd, overwrite=self.overwrite)
                _check_room(dir_fd, room_bytes)
                kept = os.dup(dir_fd)
                stack.callback(os.close, kept)
                fd = os.open(temporary, _TEMPORARY, 0o600, dir_fd=kept)
                stack.callback(os.close, fd)
            yield RootedPending(temporary, kept, fd, self, attempt_id)

    def finish(self, commit: Commit) -> bool:
        """Put the temporary file in place; once it is there, doing it again changes nothing.

        Raises TargetExists if something else took the name, CommitGone if the temporary file is gone or
        another and the target is not the file of the commit.
        """
        temporary = self._temporary(commit.attempt_id)
        with self.roots.parent(self.url) as (dir_fd, name):
            if _is(commit, temporary, dir_fd):
                _place(commit, temporary, name, dir_fd, overwrite=self.overwrite)
            if not _is(commit, name, dir_fd):
                raise CommitGone
            os.fsync(dir_fd)
        return True

    def is_placed(self, commit: Commit) -> bool:
        """Return whether the target is the file of this commit."""
        with self.roots.parent(self.url) as (dir_fd, name):
            return _is(commit, name, dir_fd)

    def give_up(self, commit: Commit) -> None:
        """Remove the temporary file of a refused commit, if it is there."""
        temporary = self._temporary(commit.attempt_id)
        with self.roots.parent(self.url) as (dir_fd, _), suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=dir_fd)

    def _temporary(self, attempt_id: str) -> str:
        return temporary_name(f"{self.job_id}-{attempt_id}")
