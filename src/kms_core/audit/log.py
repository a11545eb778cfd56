"""The writer of the audit log: one chain for each process, in segments of its own.

A process never writes to a segment of another: a torn last line stays the end of its segment. The next record
detects that a segment was deleted, moved, truncated or written to by another program; the chain then goes on
in the next segment, whose first line has the reason.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Final

import msgspec
import structlog

from kms_core.audit import COUNTED, OK, AuditRecord, chain, noted, segments
from kms_core.audit.chain import ChainHead, LineClock
from kms_core.audit.keys import Concealer, Signer
from kms_core.audit.segment_writer import SegmentFile
from kms_core.observability import metrics
from kms_core.settings.model import AuditSection
from kms_protocol import __version__
from kms_protocol.context import Context
from kms_protocol.errors import AuditUnavailable
from kms_protocol.units import MiB
from kms_protocol.whole_files import sync_folder

FORMAT: Final = 1
_MINUTE_S: Final = 60
_DAY_S: Final = 24 * 3600
_ENOUGH_BYTES: Final = 64 * 1024
_GROUP_LINES: Final = 100  # that may wait in a group: a killed process loses these and their results
_MOST_FAILED: Final = 10
_OF_ITEMS: Final[dict[str, object]] = {
    "key_id": "",
    "key_version": "",
    "backend": "",
    "origin": "",
    "wrap_key": "",
    "file_id": "",
    "new_file_id": "",
    "stanzas": "",
    "context": {},
    "new_context": {},
}
"""The fields in which items of one batch may differ, and their values in a summary where they do."""
_encode: Final = msgspec.json.encode
_log = structlog.get_logger(__name__)


class _Writing(nullcontext[None]):
    """Raises AuditUnavailable in place of an OSError. A class: a generator makes nine calls."""

    def __exit__(self, *raised: object) -> None:
        exc = raised[1]
        if isinstance(exc, OSError):
            raise AuditUnavailable(f"The audit log cannot be written ({exc.strerror})") from exc


_WRITING: Final = _Writing()


class _Group:
    """The records of one batch or part of a job, which one thread appends and which are written together.

    Those that wait are encoded; ``failed`` is the error of an earlier write. The first 10 failed items have a
    record each, the others one for each operation and result, with their number as ``count``: so a batch of
    such items, which costs its sender little, takes little disk space.
    """

    __slots__ = ("_failures", "failed", "summaries", "waiting")

    def __init__(self) -> None:
        self.waiting: list[bytes] = []
        self.failed: AuditUnavailable | None = None
        self.summaries: dict[tuple[str, str], AuditRecord] = {}
        self._failures = 0

    def sums_up(self, record: AuditRecord) -> bool:
        """Add a failure above the bound to a summary; False for any other record, which is to be written."""
        if record.result == OK:
            return False
        self._failures += 1
        if self._failures <= _MOST_FAILED:
            return False
        kind = record.operation, record.result
        if kind in self.summaries:
            _add(self.summaries[kind], record)
        else:
            self.summaries[kind] = msgspec.structs.replace(record, count=1)
        return True


def _add(summary: AuditRecord, record: AuditRecord) -> None:
    """Add sizes and durations of an item; fields that differ between items are emptied."""
    for name, nothing in _OF_ITEMS.items():
        if getattr(summary, name) != getattr(record, name):
            setattr(summary, name, nothing)
    summary.count += 1
    summary.bytes_in += record.bytes_in
    summary.duration_us += record.duration_us


class AuditLog:
    """The chain of this process. The first record creates its first segment. Safe in several threads."""

    rotate_bytes = 64 * MiB
    """A segment of this size is followed by the next one."""

    def __init__(
        self,
        section: AuditSection,
        role: str,
        concealer: Concealer,
        signer: Signer,
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """``role`` begins the names of segments: ``api``, ``worker``. ``clock`` gives ns since the epoch."""
        self.folder = section.path
        self._section = section
        self._syncs = section.durability == "fsync"
        self._concealer = concealer
        self._role = role
        self._signer = signer
        self._line_time = LineClock(clock)
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._begin()

    def _begin(self) -> None:
        """Begin a new chain, without a segment yet."""
        self._pid = os.getpid()
        self._chain = ""
        self._file: SegmentFile | None = None
        self._opened, self._why = "", "started"
        self._number, self._seq, self._head = 0, -1, chain.ZERO
        self._unsigned, self._unsigned_since = 0, 0.0
        self._refused, self._refused_since = 0, ""
        self._opened_at, self._goes_on = 0.0, False
        self.last_signed = b""
        """The last signed line, with its newline; empty before the first."""

    # -- records ------------------------------------------------------------------------------------

    def conceal(self, tenant: str, context: Context) -> Mapping[str, str]:
        return self._concealer.conceal(tenant, context)

    def append(self, record: AuditRecord) -> str:
        group: _Group | None = getattr(self._thread, "group", None)
        if group is None or record.stage:  # an effect must not come before its intent
            return self._write([_encode(record)[1:-1]], sync=self._syncs)
        if group.sums_up(record):
            return COUNTED
        group.waiting.append(_encode(record)[1:-1])
        if len(group.waiting) >= _GROUP_LINES:
            self._hand_over(group)
        return ""

    @contextmanager
    def together(self) -> Iterator[None]:
        group = self._thread.group = _Group()
        try:
            yield
        finally:
            self._thread.group = None
            self._end(group)

    def _hand_over(self, group: _Group) -> None:
        waiting, group.waiting = group.waiting, []
        try:
            self._write(waiting, sync=False)
        except AuditUnavailable as exc:
            group.failed = exc
            raise

    def _end(self, group: _Group) -> None:
        """Write the rest of a group, which fails as a whole: the caller may go on after a failed record."""
        with metrics.AUDIT_EVENTS.labels("failed").count_exceptions(AuditUnavailable):
            for record in group.summaries.values():
                group.waiting.append(_encode(record)[1:-1])
                metrics.AUDIT_RECORD.inc()
            if group.waiting:
                self._hand_over(group)
            if group.failed:
                raise AuditUnavailable(group.failed.detail) from group.failed
            file = self._file
            if self._syncs and file is not None:
                with _WRITING:
                    file.sync(file.size)

    def _write(self, records: list[bytes], *, sync: bool) -> str:
        """Write lines by one system call, all or none; the id of the last."""
        with _WRITING:
            with self._lock:
                try:
                    file = self._ready()
                    self._put(file, *records)
                except OSError:
                    self._refused += len(records)
                    self._refused_since = self._refused_since or self._line_time()[0].decode()
                    raise
                name, size = f"{self._chain}:{self._seq}", file.size
                if self._unsigned >= self._section.checkpoint_lines or size >= self.rotate_bytes:
                    self._checkpoint_or_rotate(file)
            if sync:
                file.sync(size)
        note = noted.get()
        if note is not None:
            note.audit_id = name
        return name

    def check(self) -> None:
        """Raise AuditUnavailable while records cannot be written; retries a failed write first."""
        with _WRITING:
            with self._lock:
                self._ready()
            room = os.statvfs(self.folder)
        if room.f_bavail * room.f_frsize < _ENOUGH_BYTES:
            raise AuditUnavailable("The audit log cannot be written (its disk is full)")

    # -- checkpoints and segments ---------------------------------------------------------------------

    def checkpoint_if_due(self) -> None:
        """Sign lines that were unsigned for long enough, and begin a new segment each day. Never raises."""
        with suppress(OSError):
            heads: dict[str, ChainHead] = {}
            if self._is_due():  # read other chains before any thread has to wait for the lock
                recent = time.time() - 2 * self._section.checkpoint_s - _MINUTE_S
                heads = segments.chain_heads(self.folder, self._signer.known, but=self._chain, since=recent)
            with self._lock:
                file = self._file
                if file is None or self._pid != os.getpid() or not file.is_ours():
                    return
                if self._is_due():
                    self._sign(file, chain.CHECKPOINT, heads)
                if time.monotonic() - self._opened_at >= _DAY_S:
                    self._rotate(file)

    def _is_due(self) -> bool:
        return self._unsigned > 0 and time.monotonic() - self._unsigned_since >= self._section.checkpoint_s

    def begin(self) -> None:
        """Begin the chain before its first record. Its signed line vouches for the ends of all other chains.

        Raises AuditUnavailable.
        """
        with _WRITING, self._lock:
            self._sign(self._ready(), chain.CHECKPOINT, {})

    def record_removal(self, before: str, files: int) -> None:
        """Record that segments opened up to a time will be removed now. Raises AuditUnavailable."""
        fields = {"kind": chain.RETIRED, "before": before, "files": files}
        with _WRITING, self._lock:
            file = self._ready()
            self._put(file, _encode(fields)[1:-1])
            self._sign(file, chain.CHECKPOINT, {})

    def close(self) -> None:
        """Append the closing line, at a clean stop; never raises. A later record begins a further segment."""
        with suppress(OSError), self._lock:
            if self._pid != os.getpid():
                return
            if self._goes_on:  # the last segment is full, and has no closing line
                self._ready()
            file, self._file = self._file, None
            if file is None:
                return
            try:
                if file.is_ours():
                    self._sign(file, chain.CLOSED, self._other_heads())
            finally:
                file.finish(sync=self._syncs)

    def _checkpoint_or_rotate(self, file: SegmentFile) -> None:
        """The record is written already, so an error is ignored: the next record tries again."""
        with suppress(OSError):
            if self._unsigned >= self._section.checkpoint_lines:
                self._sign(file, chain.CHECKPOINT, {})
            if file.size >= self.rotate_bytes:
                self._rotate(file)

    def _rotate(self, file: SegmentFile) -> None:
        self._sign(file, chain.ROTATED, {})
        self._file, self._goes_on = None, True
        file.finish(sync=self._syncs)

    # -- lines, under the lock ------------------------------------------------------------------------

    def _ready(self) -> SegmentFile:
        if self._pid != os.getpid():  # a fork: the chain and its file are the parent's
            if self._file is not None:
                self._file.leave_to_parent()
            self._begin()
        file = self._file
        if file is None or not file.is_ours():
            file = self._open(file)
        if self._refused:
            fields = {"kind": chain.RESUMED, "refused": self._refused, "since": self._refused_since}
            self._put(file, _encode(fields)[1:-1])
            self._refused, self._refused_since = 0, ""
        return file

    def _open(self, before: SegmentFile | None) -> SegmentFile:
        """Create the next segment of the chain, or the first of a new one."""
        if before is not None:
            self._file, self._why = None, before.trouble
            before.abandon()
            _log.error("audit.file_lost", path=str(before.path), reason=before.trouble)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._chain = self._chain or self._new_name()
        file = SegmentFile(segments.path_of(self.folder, self._chain, self._number + 1))
        try:
            opened = self._put(file, self._opening())
        except OSError:
            with suppress(OSError):
                file.path.unlink()
            file.abandon()
            raise
        self._file, self._opened, self._number, self._why = file, opened, self._number + 1, "continued"
        self._opened_at, self._goes_on = time.monotonic(), False
        if self._syncs:
            self._sync_folder(file)
        return file

    def _sync_folder(self, file: SegmentFile) -> None:
        """Sync the name of a new segment: a power cut could lose it, with its lines."""
        try:
            sync_folder(self.folder)
        except OSError:
            file.trouble = "unsynced"
            raise

    def _opening(self) -> bytes:
        fields: dict[str, object] = {
            "kind": chain.OPEN,
            "version": FORMAT,
            "segment": self._number + 1,
            "reason": self._why,
            "service": __version__,
            "public_key": self._signer.public.hex(),
        }
        if self._number:
            fields |= {"previous": self._head.hex(), "previous_opened": self._opened}
        else:
            fields["heads"] = self._other_heads()
        return _encode(fields)[1:-1]

    def _other_heads(self) -> dict[str, ChainHead]:
        return segments.chain_heads(self.folder, self._signer.known, but=self._chain)

    def _new_name(self) -> str:
        at, _ = self._line_time()
        return f"{self._role}-{at.decode().replace('-', '').replace(':', '')}-{self._pid}"

    def _stamp(self) -> tuple[bytes, bytes]:
        """The time of the next line, and the fields of a line that follow its number."""
        at, clock = self._line_time()
        return at, b',"chain":"%b","time":"%b",%b' % (self._chain.encode(), at, clock)

    def _put(self, file: SegmentFile, *records: bytes) -> str:
        """Append lines with the same time; that time."""
        at, begin = self._stamp()
        head, lines = self._head, []
        for seq, fields in enumerate(records, start=self._seq + 1):
            line, head = chain.seal(head, b'{"seq":%d%b%b' % (seq, begin, fields))
            lines.append(line)
        file.append(b"".join(lines))
        self._seq, self._head = self._seq + len(lines), head
        if not self._unsigned:
            self._unsigned_since = time.monotonic()
        self._unsigned += len(lines)
        return at.decode()

    def _sign(self, file: SegmentFile, kind: str, heads: dict[str, ChainHead]) -> None:
        """Append a signed line, which vouches for all lines before it and for the given heads."""
        _, begin = self._stamp()
        fields = {
            "kind": kind,
            "previous": self._head.hex(),
            "opened": self._opened,
            "heads": heads,
            "key": self._signer.key_id,
        }
        unsigned = b'{"seq":%d%b%b' % (self._seq + 1, begin, _encode(fields)[1:-1])
        signature = self._signer.sign(chain.LABEL + unsigned)
        line, head = chain.seal(self._head, b'%b%b%b"' % (unsigned, chain.SIGNATURE, signature))
        file.append(line)
        self._seq, self._head, self._unsigned = self._seq + 1, head, 0
        self.last_signed = line
