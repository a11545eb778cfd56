"""The open file of a writer: whole lines or none, watched for other hands, synced once for many."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self


class SegmentFile:
    """A new file that this process alone writes to. ``trouble`` says why it must not be written to any more.

    Lines go where the last one of ours ended, so that what another hand has put there, or left of a line on
    a full disk, is never the beginning of ours.
    """

    def __init__(self, path: Path, fd: int, sync: Callable[[int], None] = os.fdatasync) -> None:
        self.path = path
        self.size = 0
        self.trouble = ""
        self._name = str(path)
        self._fd = fd
        self._sync = sync
        found = os.fstat(fd)
        self._identity = (found.st_dev, found.st_ino)
        self._turn = threading.Condition()
        self._syncing = False
        self._synced = 0
        self._closed = False

    @classmethod
    def create(cls, path: Path, *, sync: Callable[[int], None] = os.fdatasync) -> Self:
        """Raises OSError, FileExistsError if the name is taken. The lock tells readers that we live.

        What root makes is for whoever has the folder: the service reads the chains of all.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)
        with suppress(OSError):  # a file system without locks: readers then take us for dead
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(path, fd, sync)

    def is_ours(self) -> bool:
        """Whether the name still leads to the file, as we left it. One call of the kernel, on every line."""
        if self.trouble:
            return False
        try:
            found = os.stat(self._name)  # noqa: PTH116 -- this is asked for every record: pathlib costs as much again
        except OSError:
            self.trouble = "vanished"
            return False
        if (found.st_dev, found.st_ino) != self._identity:
            self.trouble = "vanished"
        elif found.st_size != self.size:
            self.trouble = "disturbed"
        return not self.trouble

    def append(self, line: bytes) -> None:
        """All of the line, or OSError and none of it; where not even that can be had, ``trouble``."""
        whole = False
        try:
            whole = os.pwrite(self._fd, line, self.size) == len(line)
        finally:
            if not whole:
                self._take_back()
        if not whole:  # the disk filled up in the middle of the line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += len(line)

    def _take_back(self) -> None:
        try:
            os.ftruncate(self._fd, self.size)
        except OSError:
            self.trouble = "torn"

    def sync(self, size: int) -> None:
        """Return once the first ``size`` bytes are on disk. Whoever comes meanwhile shares one call.

        Raises OSError. After a failed sync the kernel may call lost pages clean: the file is given up.
        """
        with self._turn:
            while self._syncing and self._synced < size:
                self._turn.wait()
            if self._synced >= size:
                return
            if self.trouble == "unsynced" or self._closed:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._syncing, target = True, self.size
        done = False
        try:
            self._sync(self._fd)
            done = True
        finally:
            with self._turn:
                self._syncing = False
                if done:
                    self._synced = target
                else:
                    self.trouble = "unsynced"
                self._turn.notify_all()

    def finish(self, *, sync: bool) -> None:
        """No more lines. Raises OSError if they may not be on disk."""
        try:
            if sync:
                self.sync(self.size)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close it as it is. Lines that wait for the disk are not there."""
        with self._turn:
            while self._syncing:
                self._turn.wait()
            if not self._closed:
                self._closed = True
                with suppress(OSError):
                    os.close(self._fd)
            self.trouble = self.trouble or "closed"

    def leave_to_parent(self) -> None:
        """In a forked child: give back the descriptor; a thread of the parent may hold the lock."""
        os.close(self._fd)
