"""Files that jobs name by ``file://``: opened once beneath an allowed root, put in place once. Knows no job.

Every path is walked from its root by directory descriptors, a component at a time and without following
symbolic links (docs/design.md), so what was checked is what is used. A target appears complete or not at all:
``prepare`` makes a temporary file beside it, ``settle`` describes it in plain data, and ``finish`` puts it
in place from that description, in any process and any number of times (docs/design.md, Jobs).
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final, NamedTuple, Self

from kms_core.jobs.file_patterns import TAG, TEMPORARY, parse_file_url
from kms_core.jobs.model import CommitGone
from kms_protocol.errors import (
    ConfigurationError,
    InvalidRequest,
    PathRefused,
    SpoolFull,
    TargetExists,
    Unavailable,
)

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SOURCE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # no FIFO waits
_TEMPORARY: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
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

    SpoolFull for a full disk or quota, PathRefused for what the caller can mend, else Unavailable.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            raise SpoolFull("The disk or quota of the target has no room for this") from exc
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
        """Inode, size and mtime, as ``Placement.replaces`` has it."""
        return self.inode, self.size_bytes, self.mtime_ns


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source, open for reading at offset 0; closed by its ``with`` block."""

    fd: int
    identity: FileIdentity

    @property
    def size_bytes(self) -> int:
        return self.identity.size_bytes

    def check_unchanged(self) -> None:
        """Raises InvalidRequest if the file was written to since it was opened; ask after the last read."""
        if FileIdentity.of(os.fstat(self.fd)) != self.identity:
            raise InvalidRequest(
                "The source changed while it was read: run the job again when it is complete"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)


@dataclass(frozen=True, slots=True)
class Placement:
    """A target about to appear, in plain data: all that ``Roots.finish`` needs, in whatever process.

    ``mtime_ns`` tells a file from a later one of the same size that was given its inode; 0: not recorded.
    ``replaces`` (inode, size, mtime) is the file whose name it takes, and no other's.
    """

    url: str
    temporary: str
    inode: int
    size_bytes: int
    mtime_ns: int = 0
    replaces: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class TemporaryFile:
    """A temporary file (0600) beside its target, open for writing; its ``with`` block closes and keeps it."""

    url: str
    temporary: str
    dir_fd: int
    fd: int

    def settle(self, mark: Callable[[int], object]) -> Placement:
        """Make what was written durable and describe it; nothing may be written afterwards.

        ``mark`` marks the open file as it is; again if making it durable has changed its time, as on NFS.
        """
        with file_errors():
            marked = None
            while marked != (found := os.fstat(self.fd)).st_mtime_ns:
                marked = found.st_mtime_ns
                mark(self.fd)
                os.fsync(self.fd)
            os.fsync(self.dir_fd)
        return Placement(self.url, self.temporary, found.st_ino, found.st_size, found.st_mtime_ns)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        with file_errors(), suppress(FileNotFoundError):
            os.unlink(self.temporary, dir_fd=self.dir_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)
        os.close(self.dir_fd)


def temporary_name(tag: str) -> str:
    """``tag`` (letters, digits, ``_``, ``-``; at most 64) differs in every attempt of every job."""
    if not TAG.fullmatch(tag):
        raise ValueError("a tag is 1 to 64 letters, digits, _ and -")
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

    def check_directory(self, url: str) -> None:
        """The same for a directory, which ends in a slash and may be a root itself."""
        self._locate(url.removesuffix("/"), itself=True)

    @contextmanager
    def directory(self, url: str) -> Iterator[int]:
        """A descriptor of a directory, which may be a root itself. Raises PathRefused if it is none."""
        root, names = self._locate(url.removesuffix("/"), itself=True)
        with file_errors():
            dir_fd = _walk(root, names)
            try:
                yield dir_fd
            finally:
                os.close(dir_fd)

    def check_room(self, url: str, size_bytes: int) -> None:
        """Raise SpoolFull if the file system of a target has no room for so much, PathRefused."""
        with self._parent(url) as (dir_fd, _):
            _check_room(dir_fd, size_bytes)

    def make_parents(self, url: str) -> None:
        """Make the directories above a target that are missing (0700), each durable before the next."""
        root, (*parents, _) = self._locate(url)
        with file_errors():
            for depth, name in enumerate(parents):
                above = _walk(root, parents[:depth])
                try:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=above)
                        os.fsync(above)
                finally:
                    os.close(above)

    def open_source(self, url: str) -> OpenSource:
        """Open for reading. Raises PathRefused unless it is a regular file with one link, by no symlink."""
        with self._parent(url) as (dir_fd, name):
            fd = os.open(name, _SOURCE, dir_fd=dir_fd)
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                os.close(fd)
                raise PathRefused(_NOT_PLAIN)
        return OpenSource(fd, FileIdentity.of(found))

    def prepare(self, url: str, tag: str, *, overwrite: bool, room_bytes: int = 0) -> TemporaryFile:
        """Make the temporary file of a target. A target may be its job's source with ``overwrite`` only.

        Raises TargetExists, PathRefused (also where ``overwrite`` would replace anything but a regular
        file), SpoolFull, also where there is no room for ``room_bytes``.
        """
        temporary = temporary_name(tag)
        with self._parent(url) as (dir_fd, name):
            _check_free(name, dir_fd, overwrite=overwrite)
            _check_room(dir_fd, room_bytes)
            kept = os.dup(dir_fd)
            try:
                fd = os.open(temporary, _TEMPORARY, 0o600, dir_fd=kept)
            except OSError:
                os.close(kept)
                raise
        return TemporaryFile(url, temporary, kept, fd)

    def finish(self, placement: Placement, *, overwrite: bool) -> None:
        """Put the file in place; once it is there, doing it again changes nothing.

        Raises TargetExists if something else took the name, CommitGone if the temporary file is gone or
        another and the target is not the file described, PathRefused.
        """
        _check_temporary(placement.temporary)
        with self._parent(placement.url) as (dir_fd, name):
            if _is(placement, placement.temporary, dir_fd):
                _place(placement, name, dir_fd, overwrite=overwrite)
            if not _is(placement, name, dir_fd):
                raise CommitGone
            os.fsync(dir_fd)

    def is_placed(self, placement: Placement) -> bool:
        """Return whether the target is the file described. Raises PathRefused, Unavailable."""
        with self._parent(placement.url) as (dir_fd, name):
            return _is(placement, name, dir_fd)

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

    def discard(self, url: str, temporary: str) -> None:
        """Remove the temporary file of a target, if it is there."""
        _check_temporary(temporary)
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
        with file_errors():
            dir_fd = _walk(root, parents)
            try:
                yield dir_fd, name
            finally:
                os.close(dir_fd)


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


def _walk(root: Path, parents: Sequence[str]) -> int:
    fd = os.open(root, DIRECTORY)
    try:
        for name in parents:
            inner = os.open(name, DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = inner
    except OSError:
        os.close(fd)
        raise
    return fd


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


def _check_temporary(name: str) -> None:
    """A description may have rested where others can write: no other file is ever renamed or removed."""
    if not TEMPORARY.fullmatch(name):
        raise PathRefused("This is not the name of a temporary file of the service")


def _is(placement: Placement, name: str, dir_fd: int) -> bool:
    found = _found(name, dir_fd)
    return (
        found is not None
        and stat.S_ISREG(found.st_mode)
        and (found.st_ino, found.st_size) == (placement.inode, placement.size_bytes)
        and placement.mtime_ns in {0, found.st_mtime_ns}
    )


def _place(placement: Placement, name: str, dir_fd: int, *, overwrite: bool) -> None:
    """Another process may do the same: the second one finds nothing left to do."""
    if not _is(placement, name, dir_fd):
        with suppress(FileNotFoundError):
            _give_name(placement, name, dir_fd, overwrite=overwrite)
    with suppress(FileNotFoundError):  # renamed away, or removed by the other process
        os.unlink(placement.temporary, dir_fd=dir_fd)


def _check_same(replaces: tuple[int, int, int] | None, name: str, dir_fd: int) -> None:
    """Refuse to replace a file that was changed or removed since the source was read."""
    found = _found(name, dir_fd)
    if replaces and (not found or (found.st_ino, found.st_size, found.st_mtime_ns) != replaces):
        raise TargetExists("The source is another file by now: run the job again when nothing writes to it")


def _give_name(placement: Placement, name: str, dir_fd: int, *, overwrite: bool) -> None:
    if overwrite:
        _check_free(name, dir_fd, overwrite=True)
        _check_same(placement.replaces, name, dir_fd)
        os.rename(placement.temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        return
    try:
        os.link(placement.temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
    except FileExistsError as exc:
        if not _is(placement, name, dir_fd):
            raise TargetExists from exc
