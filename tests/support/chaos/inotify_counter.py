"""Counts how often names are given in a directory: each link and each rename, by inotify(7)."""

import ctypes
import os
import select
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import Final, Self

_CREATED: Final = 0x100  # IN_CREATE: a link, or a new file
_MOVED_TO: Final = 0x80  # IN_MOVED_TO: a rename
_HEAD: Final = struct.Struct("iIII")
_READ_BYTES: Final = 1 << 20


class NameCounter:
    """Open for as long as somebody should count. ``count`` is by name; names from before are not in it."""

    def __init__(self, directory: Path) -> None:
        self.count: Counter[str] = Counter()
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(directory), _CREATED | _MOVED_TO) < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._listen, name="name-counter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._stopped)
        self._thread.join()
        for fd in (self._fd, self._stop):
            os.close(fd)

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._fd, self._stop], [], [])
            if self._fd in ready:
                self._take(os.read(self._fd, _READ_BYTES))
            elif ready:
                return

    def _take(self, events: bytes) -> None:
        at = 0
        while at < len(events):
            *_, size = _HEAD.unpack_from(events, at)
            at += _HEAD.size + size
            self.count[events[at - size : at].rstrip(b"\0").decode()] += 1
