"""Wrap keys: a server wraps one random 32-byte key, and that key seals the file keys of many files.

Each file key is sealed under HKDF(wrap key, fresh 32-byte salt) with the AAD that the server would have
got, so tenant, key, version and context stay authenticated for each file. A wrap key serves one tenant,
key id and version, for at most 2^20 files and for the time that its user gives, counted from its wrap or
unwrap and never from a use. Wrap keys are in memory only and never leave the service in clear.

A wrap key that this process made seals files, and opens none until the server has unwrapped it as well: so
credentials that may only encrypt cannot decrypt with what is in memory.
"""

import hashlib
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from kms_core.backends.batching import SingleFlight
from kms_core.envelope.binding import WRAP_KEY_INFO, KeyRef
from kms_protocol.context import length_prefixed

KEY_BYTES: Final = 32
MOST_FILES: Final = 2**20
MOST_OPENED: Final = 4096
SOON_S: Final = 1.0
"""A key that ends within this time is not ``ready``: its call may have to ask the server."""
_NAME_HEX: Final = 32
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while a machine is suspended


def boot_time_s() -> float:
    """Seconds since the start of the machine."""
    return time.clock_gettime(_CLOCK)


@lru_cache(maxsize=MOST_OPENED)
def wrap_key_name(wrapped: bytes) -> str:
    """The name of a wrap key in audit records: the first 32 hex digits of SHA-256 of its wrapped form."""
    return hashlib.sha256(wrapped).hexdigest()[:_NAME_HEX]


@lru_cache(maxsize=1024)
def aad_of(key: KeyRef) -> bytes:
    """The AAD of a wrap key: names only, since the files bind their contexts."""
    names = (key.tenant, key.key_id, key.backend, key.version)
    return length_prefixed(WRAP_KEY_INFO, *(name.encode() for name in names))


@dataclass(slots=True)
class WrapKey:
    """A wrap key in use until ``until`` (seconds of the clock), and the number of files that it sealed."""

    secret: bytes = field(repr=False)
    wrapped: bytes
    until: float
    files: int = 0


class WrapKeys:
    """The wrap keys of one process, or of one run of a job. Safe in several threads.

    ``owner`` is the number of their user (see ``owner``), whose keys are dropped together. A forked child
    begins without keys.
    """

    def __init__(
        self,
        most_opened: int = MOST_OPENED,
        *,
        most_files: int = MOST_FILES,
        clock: Callable[[], float] = boot_time_s,
    ) -> None:
        self._most_opened, self._most_files, self._clock = most_opened, most_files, clock
        self._owners = itertools.count()
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._sealing: dict[tuple[int, KeyRef], WrapKey] = {}
        self._opened: OrderedDict[tuple[int, KeyRef, bytes], WrapKey] = OrderedDict()
        self._flights: SingleFlight[WrapKey] = SingleFlight()

    def owner(self) -> int:
        """A number for a new user."""
        return next(self._owners)

    def drop(self, owner: int) -> None:
        """Forget all keys of a user."""
        self._check_process()
        with self._lock:
            self._sealing = {name: held for name, held in self._sealing.items() if name[0] != owner}
            for name in [name for name in self._opened if name[0] == owner]:
                del self._opened[name]

    def sealing(self, owner: int, key: KeyRef, life_s: float, wrap: Callable[[bytes], bytes]) -> WrapKey:
        """The key in use, or a new one, which ``wrap`` has wrapped; counts one file. Raises as ``wrap``."""
        self._check_process()
        name = owner, key
        while True:
            with self._lock:
                held = self._sealing.get(name)
                if held and held.files < self._most_files and self._clock() < held.until:
                    held.files += 1
                    return held
            made = self._flights.run(name, lambda: self._make(name, life_s, wrap))
            with self._lock:
                if made.files < self._most_files:
                    made.files += 1
                    return made

    def _make(self, name: tuple[int, KeyRef], life_s: float, wrap: Callable[[bytes], bytes]) -> WrapKey:
        secret, until, cache = os.urandom(KEY_BYTES), self._clock() + life_s, self._sealing
        made = WrapKey(secret, wrap(secret), until)
        with self._lock:
            if cache is self._sealing:  # else the keys were dropped: this one is for the calls that wait
                self._sealing[name] = made
        return made

    def opened(
        self, owner: int, key: KeyRef, wrapped: bytes, life_s: float, unwrap: Callable[[], bytes]
    ) -> bytes:
        """The secret of a wrapped key, from memory or from the server by ``unwrap``. Raises as ``unwrap``."""
        self._check_process()
        name = owner, key, wrapped
        with self._lock:
            held = self._opened.get(name)
            if held and self._clock() < held.until:
                self._opened.move_to_end(name)
                return held.secret
        return self._flights.run(name, lambda: self._open(name, life_s, unwrap)).secret

    def _open(self, name: tuple[int, KeyRef, bytes], life_s: float, unwrap: Callable[[], bytes]) -> WrapKey:
        until, cache = self._clock() + life_s, self._sealing
        made = WrapKey(unwrap(), name[2], until)
        with self._lock:
            if cache is self._sealing:
                self._opened[name] = made
                while len(self._opened) > self._most_opened:
                    self._opened.popitem(last=False)
        return made

    def is_ready(self, owner: int, key: KeyRef, wrapped: bytes | None = None) -> bool:
        """Return whether ``opened``, or ``sealing`` if ``wrapped`` is None, needs no server for a second."""
        self._check_process()
        with self._lock:
            held = self._opened.get((owner, key, wrapped)) if wrapped else self._sealing.get((owner, key))
            return bool(held and held.files < self._most_files - 1000 and self._clock() + SOON_S < held.until)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            self._begin()
