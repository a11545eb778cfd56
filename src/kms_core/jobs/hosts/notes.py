"""Notes of live hosts in one hash of Redis, which others compare with their own; and marks in the spool.

Any user of this Redis can write a note. So a note can prevent a start or a rotation, and permits nothing.
"""

import hashlib
import re
import socket
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, cast

import msgspec
import redis

from kms_core.jobs.storage.blob_store import BlobStore
from kms_core.jobs.store.errors import redis_errors
from kms_core.jobs.store.keys import PREFIX
from kms_protocol.errors import RecordRefused, ResultExpired, SpoolFull, SpoolUnavailable

LIVE_S: Final = 10.0
"""A host whose note is older counts as gone."""
INSTALL: Final = f"{PREFIX}install"
HOSTS: Final = f"{PREFIX}hosts"
_NEW: Final = f"{PREFIX}install:new"
FORGET_S: Final = 86_400.0
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_ID_CHARS: Final = 16
_IDS: Final = re.compile(r"[A-Za-z0-9-]{1,64}")  # in the names of marks
_SHOWN_CHARS: Final = 80
ID: Final = "install"
_FOLDER: Final = "hosts"
_HOST: Final = "host-"
_MOST_BYTES: Final = 256
_MOST_USERS: Final = 100
_FAILS: Final = (OSError, RecordRefused, SpoolFull, SpoolUnavailable)


class HostNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """Facts that a host publishes about itself. ``seen`` is in seconds of Redis's clock.

    ``clock_s``: its clock is so many seconds ahead of Redis's. ``missing``: ids of hosts whose mark is not in
    its spool. ``key_places``: where it has its key files, by key id. ``shared``: what must be the same on all
    hosts, by name. ``serving`` is false until it has compared itself with the others.
    """

    id: str
    name: str
    seen: float
    serving: bool = True
    clock_s: float = 0.0
    missing: tuple[str, ...] = ()
    key_places: dict[str, str] = {}
    shared: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Host:
    """A machine, with one state directory and one spool: all processes on these are one host."""

    id: str
    name: str

    @classmethod
    def here(cls, state_dir: Path, spool_dir: Path) -> Self:
        name = socket.gethostname()
        return cls(digest(name, _boot_id(), _place(state_dir), _place(spool_dir)), name[:_SHOWN_CHARS])


def digest(*parts: str) -> str:
    """16 hexadecimal digits that stand for these texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_ID_CHARS]


def key_place(private: Path | str) -> str:
    """Names the directory of a key file: equal where two processes read the same file on one machine.

    A document in a store, given as its URL, is the same on all machines.
    """
    if isinstance(private, str):
        return digest(private)
    return digest(_boot_id(), _place(private.resolve().parent))


def _place(folder: Path) -> str:
    """Device and inode of a directory, the same in all containers that mount it; empty if it is missing."""
    with suppress(OSError):
        found = folder.stat()
        return f"{found.st_dev:x}.{found.st_ino:x}"
    return ""


def _boot_id() -> str:
    with suppress(OSError):  # not Linux
        return _BOOT_ID.read_text().strip()
    return ""


class HostNotes:
    """The hash in Redis. All methods raise JobsUnavailable."""

    def __init__(self, client: redis.Redis, clock: Callable[[], float] = time.time) -> None:
        self._redis = client
        self._clock = clock

    def now(self) -> tuple[float, float]:
        """The time of Redis, and the seconds that this machine's clock is ahead of it."""
        with redis_errors():
            before = self._clock()
            begun = time.monotonic()
            seconds, micros = self._redis.time()
            half_s = (time.monotonic() - begun) / 2
        at = seconds + micros / 1e6
        return at, before + half_s - at

    def install_id(self) -> str | None:
        """The install id in Redis."""
        with redis_errors():
            found = cast("bytes | None", self._redis.get(INSTALL))
        return found.decode(errors="replace")[:_SHOWN_CHARS] if found else None

    def offer_install_id(self, install_id: str) -> None:
        """Write the install id, unless there is one."""
        with redis_errors():
            self._redis.set(INSTALL, install_id, nx=True)

    def note_new_redis(self) -> None:
        """Note for a day that this Redis was empty when it met a spool that had an id."""
        with redis_errors():
            self._redis.set(_NEW, 1, ex=int(FORGET_S))

    def is_new_redis(self) -> bool:
        """Return whether that was noted."""
        with redis_errors():
            return bool(self._redis.exists(_NEW))

    def jobs(self) -> int:
        """The number of open jobs, and of those whose results are kept."""
        with redis_errors():
            return int(self._redis.zcard(f"{PREFIX}open")) + int(self._redis.zcard(f"{PREFIX}ended"))

    def write(self, note: HostNote) -> None:
        field = note.id if note.serving else f"{note.id} starting"
        with redis_errors():
            self._redis.hset(HOSTS, field, msgspec.json.encode(note).decode())

    def withdraw(self, host: Host) -> None:
        """Take back the note of a start."""
        with redis_errors():
            self._redis.hdel(HOSTS, f"{host.id} starting")

    def live(self, now: float) -> dict[str, HostNote]:
        """The notes of live hosts, by id. ``now`` is Redis's time."""
        found: dict[str, HostNote] = {}
        for note in filter(None, map(_decoded, self._all().values())):
            if abs(now - note.seen) <= LIVE_S and (note.serving or note.id not in found):
                found[note.id] = note
        return found

    def known(self) -> dict[str, str]:
        """The names of all hosts that wrote notes within a day, by id."""
        return {note.id: note.name for note in map(_decoded, self._all().values()) if note}

    def forget_old(self, now: float) -> None:
        """Delete notes that were not renewed for a day, and junk."""
        notes = ((field, _decoded(raw)) for field, raw in self._all().items())
        old = [field for field, note in notes if note is None or not abs(now - note.seen) <= FORGET_S]
        if old:
            with redis_errors():
                self._redis.hdel(HOSTS, *old)

    def _all(self) -> Mapping[bytes, bytes]:
        with redis_errors():
            return cast("dict[bytes, bytes]", self._redis.hgetall(HOSTS))


def _decoded(raw: bytes) -> HostNote | None:
    try:
        found = msgspec.json.decode(raw, type=HostNote)
        return found if _IDS.fullmatch(found.id) and len(found.name) <= _SHOWN_CHARS else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


# -- marks in the spool ------------------------------------------------------------------------------------


class SpoolMarks:
    """The marks of a spool."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def install_id(self) -> str | None:
        """The install id in the spool, empty if there is none; None while the spool does not answer."""
        return self._read(ID)

    def create_id(self, install_id: str) -> None:
        """Write the install id durably, unless there is one."""
        self._create(ID, install_id)

    def lacks_host(self, host_id: str) -> bool | None:
        """Return whether the spool has no mark of a host; None while it does not answer."""
        found = self._read(_host(host_id))
        return None if found is None else not found

    def create_host(self, host_id: str, name: str) -> None:
        """Leave the mark of a host."""
        self._create(_host(host_id), name)

    def renew_host(self, host_id: str, name: str) -> None:
        """Write the mark of a host again. Other installs see by it that the host uses this spool."""
        with suppress(*_FAILS):
            self._blobs.put(_FOLDER, _host(host_id), name.encode(), durable=True)

    def users(self, host_id: str, young_s: float, known: Collection[str]) -> dict[str, str]:
        """Names of hosts, by id, whose marks are at most so much older (s) than that of a host; of a hundred.

        Marks of ``known`` hosts are not read: a bucket takes time for each. Raises SpoolUnavailable,
        RecordRefused; ResultExpired if that host has no mark.
        """
        latest = self._blobs.get(_FOLDER, _host(host_id), _MOST_BYTES).at
        found: dict[str, str] = {}
        for name in self._blobs.names(_FOLDER, young_s):
            other = name.removeprefix(_HOST)
            if other == name or other in known or len(found) >= _MOST_USERS:
                continue
            with suppress(ResultExpired):
                mark = self._blobs.get(_FOLDER, name, _MOST_BYTES)
                if latest - mark.at <= young_s:
                    found[other] = mark.data.decode(errors="replace")
        return found

    def _read(self, name: str) -> str | None:
        """The text of a mark, empty if there is none. None if it cannot be read: other checks report that."""
        try:
            return self._blobs.get(_FOLDER, name, _MOST_BYTES).data.decode(errors="replace")
        except ResultExpired:
            return ""
        except _FAILS:
            return None

    def _create(self, name: str, text: str) -> None:
        """Write the id of the install; concurrent writers write the same id, the one in Redis."""
        with suppress(*_FAILS):
            if not self._read(name):
                self._blobs.put(_FOLDER, name, text.encode(), durable=True)


def _host(host_id: str) -> str:
    return f"{_HOST}{host_id}"
