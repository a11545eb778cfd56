"""Periodic work of an audit log, in a thread: checkpoints, anchors in their sinks, removal of old segments.

No record waits for this work, and the chain is sound without it. Segments are removed in the order in which
they were opened, so one time (the horizon) says which are gone, and the last record of a removal replaces all
earlier ones.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Protocol, cast

import redis
import structlog

from kms_core.audit import chain, segments
from kms_core.audit.chain import ChainLine
from kms_core.audit.keys import Concealer, OpenSealed, PublicKeys, Signer
from kms_core.audit.log import AuditLog
from kms_core.audit.segments import Segment
from kms_core.periodic import PeriodicThread
from kms_core.secure_files import sync_folder, write_all
from kms_core.settings.model import Settings
from kms_protocol.errors import AuditUnavailable

ANCHORS: Final = "kms:audit:anchors"
_MOST_ANCHORS: Final = 100_000
_PAGE: Final = 1_000
_FIELD: Final = "line"
ANCHORS_SUFFIX: Final = ".anchors.jsonl"
Entry = tuple[bytes, dict[bytes, bytes]]
EVERY_S: Final = 1.0
_STOP_S: Final = 2.0
_REMOVE_EVERY_S: Final = 3600.0
_log = structlog.get_logger(__name__)


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


_MARK: Final = b'"kind":"%b"' % chain.RETIRED.encode()  # in a string of a caller, quotes are escaped


def due_segments(folder: Path, keep_days: int, now: datetime) -> tuple[list[Segment], str]:
    """The segments to remove, and the horizon: the time at which the last of them was opened."""
    cutoff = chain.text_of(now - timedelta(days=keep_days))
    opened = [(line.time, segment) for segment in segments.listed(folder) if (line := segment.opening())]
    gone: list[Segment] = []
    horizon = ""
    for opened_at, segment in sorted(opened):
        last = segment.last()
        if last is None or last.time >= cutoff or opened_at >= cutoff or segments.is_live(segment.path):
            break
        gone.append(segment)
        horizon = opened_at
    return gone, horizon


def removal_horizon(folder: Path, keys: PublicKeys) -> str:
    """The horizon of the recorded removals: segments opened up to it may be gone. Empty without a removal.

    Reads the latest segments first, and stops at those older than the newest record of a removal. Unreadable
    segments are left out. Raises OSError if the folder cannot be read.
    """
    newest: ChainLine | None = None
    for segment in sorted(segments.listed(folder), key=_last_time, reverse=True):
        if newest is not None and _last_time(segment) < newest.time:
            break
        found = filter(None, (newest, *_removals(segment.path, keys)))
        newest = max(found, key=lambda line: line.before, default=None)
    return newest.before if newest else ""


def _last_time(segment: Segment) -> str:
    return last.time if (last := segment.last()) else ""


def _removals(path: Path, keys: PublicKeys) -> Iterator[ChainLine]:
    """The signed records of removals in a segment; none if it is gone, empty or unreadable."""
    before = line = b""
    with suppress(OSError):
        for following in segments.lines_of(path):
            if _MARK in line and (found := _signed_removal(before, line, following, keys)):
                yield found
            before, line = line, following


def _signed_removal(before: bytes, line: bytes, following: bytes, keys: PublicKeys) -> ChainLine | None:
    """A line, if the next line signs it: a removal is signed in the same step."""
    signed, head, head_before = keys.signed(following), chain.claimed_head(line), chain.claimed_head(before)
    if signed is None or head is None or head_before is None or not chain.is_sound(head_before, line):
        return None
    return chain.read(line) if chain.from_hex(signed.previous) == head else None


class AuditMaintenance(PeriodicThread):
    """Maintains the log of this process every second. ``stop`` closes its chain."""

    begun: Callable[[], object] | None = None
    """If set, the first round begins the chain and calls this: then an install without calls has anchors."""

    def __init__(
        self,
        audit_log: AuditLog,
        anchors: Sequence[AuditSink] = (),
        keep_days: int = 0,
    ) -> None:
        """``keep_days`` 0 keeps all segments."""
        super().__init__("audit-maintenance", EVERY_S, failed="audit.round_failed")
        self._audit_log = audit_log
        self._sinks = anchors
        self._sent: dict[str, bytes] = {}
        self._away: set[str] = set()
        self._keep_days = keep_days
        self._removed_at = -_REMOVE_EVERY_S

    def stop(self, wait_s: float = _STOP_S) -> None:
        """Close the chain, and wait at most ``wait_s`` seconds for its last anchor to reach the sinks."""
        self._audit_log.close()
        super().stop(wait_s)

    def round(self) -> None:
        if self.begun:
            self._audit_log.begin()
            self.finish()
            self.begun()
            self.begun = None
        self._audit_log.checkpoint_if_due()
        self.finish()
        if self._keep_days and time.monotonic() - self._removed_at >= _REMOVE_EVERY_S:
            self._removed_at = time.monotonic()
            self._remove_old()

    def finish(self) -> None:
        """Send the newest anchor to all sinks."""
        for sink in self._sinks:
            self._send(sink)

    def _send(self, sink: AuditSink) -> None:
        """Send the last signed line to a sink, again each time until the sink takes it.

        It vouches for all lines before it, so that older ones need not be sent. Logs when the sink begins or
        ceases to fail.
        """
        line, works = self._audit_log.last_signed, True
        if line == self._sent.get(sink.name, b""):
            return
        try:
            sink.put(line)
            self._sent[sink.name] = line
        except (OSError, AuditUnavailable):
            works = False
        if works == (sink.name in self._away):
            self._away ^= {sink.name}
            log, event = (_log.info, "audit.place_back") if works else (_log.warning, "audit.place_away")
            log(event, place=sink.name)

    def _remove_old(self) -> None:
        """Remove old segments, and record that before: one that is missing without a record is a problem."""
        gone, horizon = due_segments(self._audit_log.folder, self._keep_days, datetime.now(UTC))
        if not gone:
            return
        self._audit_log.record_removal(horizon, len(gone))
        for segment in gone:
            with suppress(FileNotFoundError):
                segment.path.unlink()
        _log.info("audit.retired", files=len(gone), before=horizon)


def build_audit(
    settings: Settings, role: str, client: redis.Redis | None, open_sealed: OpenSealed
) -> tuple[AuditLog, AuditMaintenance]:
    """Create the keys and the directory of anchors if they do not exist. Raises ConfigurationError.

    ``client`` None: no sink in Redis. ``open_sealed`` opens sealed key files.
    """
    section, strict = settings.kms.audit, settings.is_prod
    concealer = Concealer.at(section.key_path, strict=strict, open_sealed=open_sealed)
    signer = Signer.at(section.signing_key_path, strict=strict, open_sealed=open_sealed)
    audit_log = AuditLog(section, role, concealer, signer)
    return audit_log, AuditMaintenance(audit_log, anchor_sinks(settings, client), section.keep_days)


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
