"""The spool in a directory: ``<spool>/<folder>/<name>`` on a disk that all processes share, 0600 in 0700.

``GroupSync`` makes the writes of several threads durable by one sync of the disk.
"""

import errno
import math
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from kms_core.jobs.storage.blob_store import SpoolNote, WriteBlob
from kms_core.payload import files
from kms_core.payload.files import FileRange
from kms_protocol.errors import RecordRefused, ResultExpired, SpoolUnavailable
from kms_protocol.whole_files import sync_folder

# Plain files in a folder that others may write to: no link is followed, no pipe waited for.
#
# All functions raise ResultExpired where the folder or the file is gone, and RecordRefused where something
# else than a plain file in a real folder is in its place, or may not be touched.

_IN_PLACE: Final = frozenset(
    (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENXIO, errno.EACCES, errno.EPERM)
)
"""The errors of the kernel where a name holds no plain file of the service."""
_UNSYNCED: Final = (
    "The disk of uploads and results failed ({}), so what was sent is not kept: send it again; the operator "
    "finds more in the log of the kernel"
)
_log = structlog.get_logger(__name__)


class NewFile(NamedTuple):
    """Descriptors of an open file and of its folder."""

    fd: int
    folder_fd: int


@contextmanager
def create(folder: Path, name: str) -> Iterator[NewFile]:
    """A new file (0600); removed again if the block fails, and so is its folder, unless that holds more."""
    with ExitStack() as stack:
        with disk_errors(), _refusing():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            at = _folder_fd(folder, stack)
            _unlink(name, at)  # left by a crash in the middle of this very attempt
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(name, flags, 0o600, dir_fd=at)
            stack.callback(os.close, fd)
        try:
            yield NewFile(fd, at)
        except BaseException:
            _unlink(name, at)
            with suppress(OSError):
                folder.rmdir()
            raise


@contextmanager
def open_(folder: Path, name: str) -> Iterator[int]:
    """A file, to be read. Raises ResultExpired if it is gone, RecordRefused if it is a link, a pipe, …."""
    with ExitStack() as stack:
        with _refusing():
            at = _folder_fd(folder, stack)
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # or a pipe would hang us
            fd = os.open(name, flags, dir_fd=at)
            stack.callback(os.close, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RecordRefused
        yield fd


def _folder_fd(folder: Path, stack: ExitStack) -> int:
    with _refusing():
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    stack.callback(os.close, fd)
    return fd


def _unlink(name: str, folder: int) -> None:
    with _refusing(), suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns errors for missing files and unexpected file types into errors of the service."""
    try:
        yield
    except FileNotFoundError as exc:
        raise ResultExpired from exc
    except OSError as exc:
        if exc.errno in _IN_PLACE:
            raise RecordRefused from exc
        raise


# Puts new files of the spool on disk, with their names, before their job is stored or ended.
#
# A file survives a power cut once its content, its folder and each new folder above it were synced
# (fsync(2)).


class DiskSync:
    """Syncs files of the spool; does nothing unless ``enabled``. Safe for threads and across forks."""

    def __init__(self, directory: Path, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._names = GroupSync(lambda: sync_folder(directory))

    def content(self, fd: int) -> None:
        """Return once the bytes of a file are on disk.

        After an error the file must be thrown away: a later fsync of it may succeed although its pages are
        lost. Raises SpoolFull, SpoolUnavailable.
        """
        if self._enabled:
            with disk_errors():
                os.fsync(fd)

    def names(self, folder_fd: int) -> None:
        """Return once the names in a folder, and the name of that in the spool, are on disk.

        Each thread syncs its own file and folder, which the kernel does side by side; the spool itself is
        synced once for all that wait. Raises SpoolFull, SpoolUnavailable.
        """
        if self._enabled:
            with disk_errors():
                os.fsync(folder_fd)
                self._names.wait()


class GroupSync:
    """Calls ``sync`` once for all threads that wait while an earlier call is under way."""

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._one_at_a_time = threading.Lock()
        self._begun = self._failed = 0  # numbers of the last call, and of the last one that failed
        self._errno = 0

    def wait(self) -> None:
        """Return after a call of ``sync`` that began after this one. Raises OSError, if that call failed."""
        if self._pid != os.getpid():  # the threads that hold the lock are the parent's
            self._begin()
        before = self._begun
        with self._one_at_a_time:
            if self._begun == before:
                self._call()
            if self._failed > before:
                raise OSError(self._errno, os.strerror(self._errno))

    def _call(self) -> None:
        self._begun += 1
        before, self._failed, self._errno = self._failed, self._begun, errno.EIO  # but for success
        try:
            self._sync()
            self._failed = before
        except OSError as exc:
            self._errno = exc.errno or errno.EIO


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise SpoolFull for a full disk or quota, and SpoolUnavailable for other errors of the spool's disk."""
    try:
        with files.full_disk_as_error():
            yield
    except OSError as exc:
        name = errno.errorcode.get(exc.errno or 0, "an error")
        _log.error("spool.disk_failed", error=name)
        raise SpoolUnavailable(_UNSYNCED.format(name)) from exc


_USAGE_CACHE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class SpoolFolder:
    """A directory as ``BlobStore``."""

    path: Path
    sync: DiskSync
    usage_cache_s: float = _USAGE_CACHE_S
    is_remote: bool = False
    is_away: bool = False
    is_refused: bool = False

    @contextmanager
    def create(self, folder: str, name: str, declared_bytes: int = 0) -> Iterator[WriteBlob]:
        del declared_bytes  # the kernel holds what is written
        with create(self.path / folder, name) as file:

            def write(data: memoryview, position: int) -> None:
                with disk_errors():
                    files.write_all(file.fd, data, position)

            yield write
            self.sync.content(file.fd)
            self.sync.names(file.folder_fd)

    @contextmanager
    def open(self, folder: str, name: str) -> Iterator[FileRange]:
        with open_(self.path / folder, name) as fd:
            yield FileRange(fd, os.fstat(fd).st_size)

    def put(self, folder: str, name: str, data: bytes, *, durable: bool) -> None:
        written = f"{name}.tmp" if durable else name
        with create(self.path / folder, written) as file, disk_errors():
            files.write_all(file.fd, memoryview(data), 0)
            if durable:
                self.sync.content(file.fd)  # the name is never that of a note that may be lost
                os.rename(written, name, src_dir_fd=file.folder_fd, dst_dir_fd=file.folder_fd)
                self.sync.names(file.folder_fd)

    def get(self, folder: str, name: str, most_bytes: int) -> SpoolNote:
        with open_(self.path / folder, name) as fd:
            return SpoolNote(os.pread(fd, most_bytes, 0), os.fstat(fd).st_mtime)

    def names(self, folder: str, young_s: float = math.inf) -> list[str]:
        del young_s  # to read them takes little time
        with ExitStack() as stack:
            return os.listdir(_folder_fd(self.path / folder, stack))

    def remove(self, folder: str, name: str) -> None:
        with ExitStack() as stack:
            _unlink(name, _folder_fd(self.path / folder, stack))

    def remove_folder(self, folder: str) -> bool:
        with suppress(RecursionError):  # folders in folders that others made
            shutil.rmtree(self.path / folder, ignore_errors=True)
        return not os.path.lexists(self.path / folder)

    def folders(self, older_than_s: float) -> Iterator[str]:
        limit = time.time() - older_than_s
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process has removed it
                    if entry.stat(follow_symlinks=False).st_mtime < limit:
                        yield entry.name

    def sweep(self) -> None:
        """Nothing: each file has its name from the beginning."""

    def used_bytes(self) -> int:
        """Bytes of all files below; those deleted during the count, or unreadable, count as 0."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                with suppress(OSError):
                    total += Path(folder, name).lstat().st_size
        return total

    def free_bytes(self) -> int:
        with disk_errors():
            return shutil.disk_usage(self.path).free
