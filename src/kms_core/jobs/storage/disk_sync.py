"""Puts new files of the spool on disk, with their names, before their job is stored or ended.

A file survives a power cut once its content, its folder and each new folder above it were synced (fsync(2)).
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog

from kms_core.payload import files
from kms_core.secure_files import sync_folder
from kms_protocol.errors import SpoolUnavailable

_UNSYNCED: Final = (
    "The disk of uploads and results failed ({}), so what was sent is not kept: send it again; the operator "
    "finds more in the log of the kernel"
)
_log = structlog.get_logger(__name__)


class DiskSync:
    """Syncs files of the spool; does nothing unless ``enabled``. Safe for threads and across forks."""

    def __init__(self, directory: Path, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._names = GroupSync(lambda: sync_folder(directory))

    def new_file(self, fd: int, folder_fd: int) -> None:
        """Return once a new file, its folder and the name of that in the spool are on disk.

        Each thread syncs its own file, which the kernel does side by side; the spool itself is synced once
        for all that wait. After an error the file must be thrown away: a later fsync of it may succeed
        although its pages are lost. Raises SpoolFull, SpoolUnavailable.
        """
        if self._enabled:
            with disk_errors():
                os.fsync(fd)
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
