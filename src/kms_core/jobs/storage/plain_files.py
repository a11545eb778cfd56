"""Plain files in a folder that others may write to: no link is followed, no pipe waited for.

All functions raise ResultExpired where the folder or the file is gone, and RecordRefused where something else
than a plain file in a real folder is in its place, or may not be touched.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from kms_core.payload import files
from kms_protocol.errors import RecordRefused, ResultExpired

_IN_PLACE: Final = frozenset(
    (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENXIO, errno.EACCES, errno.EPERM)
)
"""The errors of the kernel where a name holds no plain file of the service."""


class NewFile(NamedTuple):
    """Descriptors of an open file and of its folder."""

    fd: int
    folder_fd: int


@contextmanager
def create(folder: Path, name: str) -> Iterator[NewFile]:
    """A new file (0600); removed again if the block fails, and so is its folder, unless that holds more."""
    with ExitStack() as stack:
        with files.full_disk_as_error(), _refusing():
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


def names(folder: Path) -> list[str]:
    """Names in a folder. Raises ResultExpired, RecordRefused."""
    with ExitStack() as stack:
        return os.listdir(_folder_fd(folder, stack))


def remove(folder: Path, name: str) -> None:
    """Take a name out of its folder, if it is there. Raises ResultExpired, RecordRefused."""
    with ExitStack() as stack:
        _unlink(name, _folder_fd(folder, stack))


def remove_folder(folder: Path) -> bool:
    """Remove a folder and all in it; whether it is gone."""
    with suppress(RecursionError):  # folders in folders that others made
        shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)


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
