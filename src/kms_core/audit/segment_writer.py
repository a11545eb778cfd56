"""The writer of a segment of an audit log: whole lines, on disk before they count."""

import errno
import fcntl
import os
import threading
from contextlib import suppress
from pathlib import Path


class SegmentFile:
    """A new segment, written by this process only: whole lines, one sync for the lines of several threads.

    ``trouble`` is the reason why no further line may be written. Lines are written where the previous line of
    this process ended, so bytes that another program or a full disk left there never begin a line.
    """

    def __init__(self, path: Path) -> None:
        """Create the file. A lock on it shows readers that its process lives.

        A file that root creates belongs to the owner of the folder, since the service reads all chains.
        Raises OSError; FileExistsError if the name exists.
        """
        self.path = path
        self.size = 0
        self.trouble = ""
        self._name = str(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(self._fd, owner.st_uid, owner.st_gid)
        with suppress(OSError):  # a file system without locks: readers then take this process for dead
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(self._fd)
        self._identity = (found.st_dev, found.st_ino)
        self._turn = threading.Lock()
        self._synced = 0
        self._closed = False

    def is_ours(self) -> bool:
        """True if the name still leads to the file, with the size that it should have. One system call."""
        if self.trouble:
            return False
        try:
            found = os.stat(self._name)  # noqa: PTH116 -- for every record: pathlib doubles the cost
        except OSError:
            self.trouble = "vanished"
            return False
        if (found.st_dev, found.st_ino) != self._identity:
            self.trouble = "vanished"
        elif found.st_size != self.size:
            self.trouble = "disturbed"
        return not self.trouble

    def append(self, line: bytes) -> None:
        """Append a line. Raises OSError, and removes the part that was written, or sets ``trouble``."""
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
        """Return once the first ``size`` bytes are on disk. Threads that wait share one call of the kernel.

        Raises OSError. After a failed sync the kernel may mark lost pages as clean, so the file is given up.
        """
        with self._turn:
            if self._synced >= size:
                return
            if self.trouble == "unsynced" or self._closed:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            target = self.size
            try:
                os.fdatasync(self._fd)
            except BaseException:
                self.trouble = "unsynced"
                raise
            self._synced = target

    def finish(self, *, sync: bool) -> None:
        """Close the file after its last line. Raises OSError if lines may not be on disk."""
        try:
            if sync:
                self.sync(self.size)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is; waiting calls of ``sync`` fail."""
        with self._turn:
            if not self._closed:
                self._closed = True
                with suppress(OSError):
                    os.close(self._fd)
            self.trouble = self.trouble or "closed"

    def leave_to_parent(self) -> None:
        """Close the descriptor in a forked process, where the lock may be held by a thread of the parent."""
        os.close(self._fd)
