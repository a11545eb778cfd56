"""A value made from files, made again when they change, without delaying the caller for large ones."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from kms_protocol.errors import KmsError

AGAIN_S: Final = 60.0
_SMALL_BYTES: Final = 256 * 1024
_T = TypeVar("_T")

Stamp = tuple[tuple[int, ...], ...]


def stamp_of(paths: Sequence[Path]) -> Stamp:
    """A value that changes with the files: device, inode, size and time of each. Raises OSError."""
    found = (path.stat() for path in paths)
    return tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found)


class Reloaded(Generic[_T]):
    """The value of some files. Safe in several threads.

    Files of up to 256 KiB in total are read by the thread that finds them changed; larger ones by a thread
    of their own, while callers get the value read before. Files that cannot be used leave the value as it
    is: they are tried again when they change, and once a minute.
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
        """``done`` and ``failed`` are told of each later reading. ``clock`` gives seconds.

        Raises what ``read`` does for files that cannot be used: OSError, ValueError or KmsError.
        """
        self._paths = tuple(paths)
        self._read, self._done, self._failed, self._clock = read, done, failed, clock
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self._tried = self._stamp()
        self._failed_at: float | None = None
        self._value = read()

    def current(self) -> _T:
        """The value that was read last, after looking whether the files have changed."""
        stamp = self._stamp()
        if self._is_due(stamp):
            with self._lock:
                reader = self._begin(stamp) if self._is_due(stamp) else None
            if reader is not None and sum(one[2] for one in stamp or ()) <= _SMALL_BYTES:
                reader.join()
        return self._value

    def _stamp(self) -> Stamp | None:
        """None while a file is missing."""
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
