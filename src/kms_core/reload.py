"""Values read from files, and read again when the files change."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from kms_protocol.errors import KmsError

AGAIN_S: Final = 60.0
SMALL_BYTES: Final = 256 * 1024
"""The size of files up to which callers wait for a new reading."""
_T = TypeVar("_T")

Stamp = tuple[tuple[int, ...], ...]


def stamp_of(paths: Sequence[Path]) -> Stamp:
    """A value that changes when one of the files does. Raises OSError."""
    return tuple(stamp_of_stat(path.stat()) for path in paths)


def stamp_of_stat(found: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size in bytes, and times of the last write and change (ns) of a file.

    A new file may have the inode of a removed one, and the time of the last write that a copy preserves. The
    kernel alone sets the time of the last change.
    """
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def reason_of(exc: Exception) -> str:
    """Return why a file could not be read, without its name."""
    return str(exc.strerror or exc) if isinstance(exc, OSError) else str(exc)


class Reloaded(Generic[_T]):
    """A value read from files. Safe in several threads.

    A caller that finds them changed waits for files of up to 256 KiB in total; larger ones are read in the
    background, while callers get the previous value. While files cannot be used, the previous value stays:
    they are read again when they change, and once a minute.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], _T],
        *,
        done: Callable[[_T], None],
        failed: Callable[[Exception], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``done`` and ``failed`` are called after each later read. ``clock`` gives seconds.

        Raises as ``read`` for files that cannot be used: OSError, ValueError or KmsError.
        """
        self._paths = tuple(paths)
        self._read, self._done, self._failed, self._clock = read, done, failed, clock
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self._tried = self._stamp()
        self._failed_at: float | None = None
        self._value = read()

    def current(self) -> _T:
        """The current value; checks whether the files have changed."""
        stamp = self._stamp()
        if self._is_due(stamp):
            with self._lock:
                reader = self._begin(stamp) if self._is_due(stamp) else None
            if reader is not None and sum(one[2] for one in stamp or ()) <= SMALL_BYTES:
                reader.join()
        return self._value

    def _stamp(self) -> Stamp | None:
        """The stamp of the files; None while one is missing."""
        try:
            return stamp_of(self._paths)
        except OSError:
            return None

    def _is_due(self, stamp: Stamp | None) -> bool:
        if self._reader is not None and self._reader.is_alive():
            return False
        failed_at = self._failed_at
        return stamp != self._tried or (failed_at is not None and self._clock() - failed_at >= AGAIN_S)

    def _begin(self, stamp: Stamp | None) -> threading.Thread:
        self._tried = stamp
        self._reader = threading.Thread(target=self._run, name="reload", daemon=True)
        self._reader.start()
        return self._reader

    def _run(self) -> None:
        try:
            self._value = self._read()
        except (OSError, ValueError, KmsError) as exc:
            self._failed_at = self._clock()
            self._failed(exc)
        else:
            self._failed_at = None
            self._done(self._value)
