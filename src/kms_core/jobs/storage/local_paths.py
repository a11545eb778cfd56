"""Files that jobs name by ``file://``: opened once beneath an allowed root, put in place once.

Every path is walked from its root by directory descriptors, a component at a time and without following
symbolic links (docs/design.md), so what was checked is what is used. A target appears complete or not at all:
``prepare`` makes a temporary file beside it, ``settle`` makes that durable, and ``finish`` puts it
in place from its commit, in any process and any number of times (docs/design.md, Jobs).
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple, Self

from kms_core.jobs.file_patterns import TAG, TEMPORARY, parse_file_url
from kms_core.jobs.model import Commit, CommitGone
from kms_core.payload.files import FileRange, full_disk_as_error, source_changed_error
from kms_protocol.errors import (
    ConfigurationError,
    PathRefused,
    SpoolFull,
    TargetExists,
    Unavailable,
)

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SOURCE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # no FIFO waits
_TEMPORARY: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_BEGIN: Final = ".kms-"
_END: Final = ".tmp"
_NOT_PLAIN: Final = "The path must be that of a regular file with one link, and no part of it a symbolic link"
_REFUSALS: Final = {
    errno.ENOENT: "There is nothing at this path: create the file, or for a target its directory, first",
    errno.EACCES: "The service's user has no permission for this path",
    errno.EPERM: "The service's user may not do this here, or the file system knows no hard links",
    errno.EROFS: "The file system of this path is read-only",
    errno.ENAMETOOLONG: "The path, or a part of it, is too long for the file system",
    errno.EEXIST: "A temporary file of this attempt is already there",
} | dict.fromkeys((errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EMLINK), _NOT_PLAIN)


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


class FileIdentity(NamedTuple):
    """The identity of a file and its last change."""

    device: int
    inode: int
    mtime_ns: int
    size_bytes: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        return cls(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)

    @property
    def name(self) -> tuple[int, int, int]:
        """Inode, size and mtime, as ``Commit.replaces`` has it."""
        return self.inode, self.size_bytes, self.mtime_ns


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


@dataclass(frozen=True, slots=True)
class TemporaryFile:
    """A temporary file (0600) beside its target, open for writing."""

    name: str
    dir_fd: int
    fd: int

    def settle(self, mark: Callable[[int], object]) -> FileIdentity:
        """Make what was written durable; nothing may be written afterwards.

        ``mark`` marks the open file as it is; again if making it durable has changed its time, as on NFS.
        """
        with file_errors():
            marked = None
            while marked != (found := os.fstat(self.fd)).st_mtime_ns:
                marked = found.st_mtime_ns
                mark(self.fd)
                os.fsync(self.fd)
            os.fsync(self.dir_fd)
        return FileIdentity.of(found)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        with file_errors(), suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self.dir_fd)


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
        private = [path.resolve() for path in forbidden]
        # A link in the operator's own path is followed here, once; callers may write either form.
        self._roots = [(PurePosixPath(root), _checked_root(root, private)) for root in roots]

    def check(self, url: str) -> None:
        """Raises PathRefused unless the URL is well-formed and beneath a root. Looks at no file."""
        self._locate(url)

    def root_of(self, url: str) -> str:
        """The root that a URL is beneath, or is, as the settings name it. Raises PathRefused."""
        root, _ = self._locate(url.removesuffix("/"), itself=True)
        return str(next(named for named, found in self._roots if found == root))

    @contextmanager
    def directory(self, url: str) -> Iterator[int]:
        """A descriptor of a directory, which may be a root itself. Raises PathRefused if it is none."""
        root, names = self._locate(url.removesuffix("/"), itself=True)
        with _directory(root, names) as dir_fd:
            yield dir_fd

    def check_room(self, url: str, size_bytes: int) -> None:
        """Raise SpoolFull if the file system of a target has no room for so much, PathRefused."""
        with self._parent(url) as (dir_fd, _):
            _check_room(dir_fd, size_bytes)

    def make_parents(self, url: str) -> None:
        """Make the directories above a target that are missing (0700), each durable before the next."""
        root, (*parents, _) = self._locate(url)
        for depth, name in enumerate(parents):
            with _directory(root, parents[:depth]) as above, suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=above)
                os.fsync(above)

    @contextmanager
    def open_source(self, url: str) -> Iterator[OpenSource]:
        """Open for reading. Raises PathRefused unless it is a regular file with one link, by no symlink."""
        with self._parent(url) as (dir_fd, name):
            fd = os.open(name, _SOURCE, dir_fd=dir_fd)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise PathRefused(_NOT_PLAIN)
            yield OpenSource(fd, FileIdentity.of(found))
        finally:
            os.close(fd)

    @contextmanager
    def prepare(self, url: str, tag: str, *, overwrite: bool, room_bytes: int = 0) -> Iterator[TemporaryFile]:
        """Make the temporary file of a target, which stays when the block ends.

        A target may be its job's source with ``overwrite`` only. Raises TargetExists, PathRefused (also where
        ``overwrite`` would replace anything but a regular file), SpoolFull, also where there is no room for
        ``room_bytes``.
        """
        temporary = temporary_name(tag)
        with ExitStack() as stack:
            with self._parent(url) as (dir_fd, name):
                _check_free(name, dir_fd, overwrite=overwrite)
                _check_room(dir_fd, room_bytes)
                kept = os.dup(dir_fd)
                stack.callback(os.close, kept)
                fd = os.open(temporary, _TEMPORARY, 0o600, dir_fd=kept)
                stack.callback(os.close, fd)
            yield TemporaryFile(temporary, kept, fd)

    def finish(self, url: str, tag: str, commit: Commit, *, overwrite: bool) -> None:
        """Put the temporary file in place; once it is there, doing it again changes nothing.

        Raises TargetExists if something else took the name, CommitGone if the temporary file is gone or
        another and the target is not the file of the commit, PathRefused.
        """
        temporary = temporary_name(tag)
        with self._parent(url) as (dir_fd, name):
            if _is(commit, temporary, dir_fd):
                _place(commit, temporary, name, dir_fd, overwrite=overwrite)
            if not _is(commit, name, dir_fd):
                raise CommitGone
            os.fsync(dir_fd)

    def is_placed(self, url: str, commit: Commit) -> bool:
        """Return whether the target is the file of the commit. Raises PathRefused, Unavailable."""
        with self._parent(url) as (dir_fd, name):
            return _is(commit, name, dir_fd)

    def is_marked(self, url: str, is_on: Callable[[int], bool]) -> FileIdentity | None:
        """The target, if it is a regular file and ``is_on`` says of it, open, that it is marked.

        None also if it may not be read. Raises PathRefused, Unavailable.
        """
        with self._parent(url) as (dir_fd, name):
            try:
                fd = os.open(name, _SOURCE, dir_fd=dir_fd)
            except OSError:
                return None
            try:
                found = os.fstat(fd)
                return FileIdentity.of(found) if stat.S_ISREG(found.st_mode) and is_on(fd) else None
            finally:
                os.close(fd)

    def discard(self, url: str, tag: str) -> None:
        """Remove the temporary file of a target, if it is there."""
        temporary = temporary_name(tag)
        with self._parent(url) as (dir_fd, _), suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=dir_fd)

    def sweep(self, url: str, is_left: Callable[[str, str], bool]) -> None:
        """Remove temporary files beside a target of which ``is_left`` says so, given job id and attempt."""
        with self._parent(url) as (dir_fd, _):
            for name in os.listdir(dir_fd):  # noqa: PTH208 -- a descriptor
                if name.startswith(_BEGIN) and TEMPORARY.fullmatch(name):
                    job_id, _, attempt = name.removeprefix(_BEGIN).removesuffix(_END).rpartition("-")
                    if is_left(job_id, attempt):
                        with suppress(FileNotFoundError):
                            os.unlink(name, dir_fd=dir_fd)

    def _locate(self, url: str, *, itself: bool = False) -> tuple[Path, tuple[str, ...]]:
        path = parse_file_url(url)
        for written, real in self._roots:
            for form in (written, real):
                if (itself or path != form) and path.is_relative_to(form):
                    return real, path.relative_to(form).parts
        raise PathRefused("The path is not beneath an allowed root; [kms.jobs] roots names them")

    @contextmanager
    def _parent(self, url: str) -> Iterator[tuple[int, str]]:
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


def _check_room(dir_fd: int, size_bytes: int) -> None:
    found = os.fstatvfs(dir_fd)
    if found.f_blocks and size_bytes > found.f_bavail * found.f_frsize:
        raise SpoolFull(
            "The file system of the target has no room for the result: make room there, or name a target "
            "elsewhere"
        )


def _check_free(name: str, dir_fd: int, *, overwrite: bool) -> None:
    found = _found(name, dir_fd)
    if found is None:
        return
    if not overwrite:
        raise TargetExists
    if not stat.S_ISREG(found.st_mode):
        raise PathRefused("Only a regular file can be overwritten")


def _is(commit: Commit, name: str, dir_fd: int) -> bool:
    found = _found(name, dir_fd)
    described = commit.inode, commit.size_bytes, commit.mtime_ns
    return bool(found and stat.S_ISREG(found.st_mode) and FileIdentity.of(found).name == described)


def _place(commit: Commit, temporary: str, name: str, dir_fd: int, *, overwrite: bool) -> None:
    """Another process may do the same: the second one finds nothing left to do."""
    if not _is(commit, name, dir_fd):
        with suppress(FileNotFoundError):
            _give_name(commit, temporary, name, dir_fd, overwrite=overwrite)
    with suppress(FileNotFoundError):  # renamed away, or removed by the other process
        os.unlink(temporary, dir_fd=dir_fd)


def _check_same(replaces: tuple[int, int, int] | None, name: str, dir_fd: int) -> None:
    """Refuse to replace a file that was changed or removed since the source was read."""
    found = _found(name, dir_fd)
    if replaces and (not found or FileIdentity.of(found).name != replaces):
        raise TargetExists("The source is another file by now: run the job again when nothing writes to it")


def _give_name(commit: Commit, temporary: str, name: str, dir_fd: int, *, overwrite: bool) -> None:
    if overwrite:
        _check_free(name, dir_fd, overwrite=True)
        _check_same(commit.replaces, name, dir_fd)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        return
    try:
        os.link(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
    except FileExistsError as exc:
        if not _is(commit, name, dir_fd):
            raise TargetExists from exc
