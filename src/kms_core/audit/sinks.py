"""Sinks of anchors: a Redis stream and a directory, written and read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol, cast

import redis

from kms_core.audit import chain, segments
from kms_core.secure_files import write_all
from kms_core.settings.model import Settings
from kms_protocol.errors import AuditUnavailable
from kms_protocol.whole_files import sync_folder

ANCHORS: Final = "kms:audit:anchors"
_MOST_ANCHORS: Final = 100_000
_PAGE: Final = 1_000
_FIELD: Final = "line"
ANCHORS_SUFFIX: Final = ".anchors.jsonl"
Entry = tuple[bytes, dict[bytes, bytes]]


class AuditSink(Protocol):
    """Stores anchors, in order. ``name``, which no other sink of a log has, is for log and metrics."""

    name: str

    def put(self, line: bytes) -> None:
        """Store a line with its newline. Raises OSError or AuditUnavailable if it may be lost."""


class RedisSink:
    """A Redis stream of bounded length; the oldest entries are dropped."""

    name = "redis"

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def put(self, line: bytes) -> None:
        with _answering():
            self._client.xadd(ANCHORS, {_FIELD: line.rstrip(b"\n")}, maxlen=_MOST_ANCHORS, approximate=True)

    def lines(self) -> list[bytes]:
        """All lines in the stream, oldest first. Raises AuditUnavailable."""
        return list(map(line_of, self.entries()))

    def entries(self, cursor: str = "-") -> list[Entry]:
        """All entries from a cursor (the ``min`` of XRANGE) on, oldest first. Raises AuditUnavailable."""
        found: list[Entry] = []
        with _answering():
            while page := cast("list[Entry]", self._client.xrange(ANCHORS, min=cursor, count=_PAGE)):
                found += page
                cursor = f"({page[-1][0].decode()}"
        return found

    def newest(self, count: int) -> list[Entry]:
        """The last entries, oldest first. Raises AuditUnavailable."""
        with _answering():
            return cast("list[Entry]", self._client.xrevrange(ANCHORS, count=count))[::-1]


def line_of(entry: Entry) -> bytes:
    """The line of an entry; empty if it has none."""
    return entry[1].get(_FIELD.encode(), b"")


@contextmanager
def _answering() -> Iterator[None]:
    """Raise AuditUnavailable with the reason if Redis does not answer."""
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as exc:
        raise AuditUnavailable("Redis refuses this user: check user and password of [kms.redis]") from exc
    except redis.RedisError as exc:
        raise AuditUnavailable("Redis does not answer") from exc


class FolderSink:
    """A directory, best on another disk or host, with a file for each chain. Writes are synced.

    ``unread`` is the reason why the last call of ``lines`` could not read a file; empty if it read all.
    """

    name = "directory"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unread = ""

    def make(self) -> None:
        """Create the directory (0700) if it does not exist. Raises OSError."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, line: bytes) -> None:
        self.make()
        found = chain.read(line.rstrip(b"\n"))
        if found is not None:
            self._append(self.path / f"{found.chain}{ANCHORS_SUFFIX}", line)

    def _append(self, path: Path, line: bytes) -> None:
        """Append durably, on a line of its own; the name of a new file is synced, too.

        A part of a line, for which the disk had no room, is removed again.
        """
        is_new = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            size = os.fstat(fd).st_size
            is_torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            try:
                write_all(fd, b"\n" + line if is_torn else line)
            except OSError:
                os.ftruncate(fd, size)
                raise
            os.fdatasync(fd)
        finally:
            os.close(fd)
        if is_new:
            sync_folder(self.path)

    def lines(self) -> list[bytes]:
        """All lines of all readable files. Raises AuditUnavailable if the directory cannot be listed."""
        found: list[bytes] = []
        self.unread = ""
        for file in files_in(self.path, ".jsonl"):
            try:
                found += segments.lines_of(file)
            except OSError as exc:
                self.unread = self.unread or f"{file} cannot be read ({exc.strerror})"
        return found


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The plain files with a suffix. Raises AuditUnavailable."""
    try:
        with os.scandir(folder) as entries:  # glob takes a folder that may not be listed for an empty one
            named = [entry for entry in entries if entry.name.endswith(suffix)]
            return sorted(folder / entry.name for entry in named if segments.is_file(entry))
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise AuditUnavailable(f"{folder} does not exist: mount or create it") from exc
    except OSError as exc:
        raise AuditUnavailable(f"{folder} cannot be read ({exc.strerror})") from exc


def anchor_sinks(settings: Settings, client: redis.Redis | None) -> list[RedisSink | FolderSink]:
    """The sinks of anchors in the settings, with their directory. ``client`` None: none in Redis."""
    section = settings.kms.audit
    sinks: list[RedisSink | FolderSink] = []
    if client and section.anchor_redis:
        sinks.append(RedisSink(client))
    if section.anchor_dir is not None:
        folder = FolderSink(section.anchor_dir)
        with suppress(OSError):  # the maintenance retries, and logs the failure
            folder.make()
        sinks.append(folder)
    return sinks
