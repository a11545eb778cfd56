"""The audit trail: one JSON line per operation, appended before the result leaves; knows no plaintext.

A record holds who, what, which key, sizes, the outcome and how long it took; of a context only the keys.
If a line cannot be written, AuditUnavailable is raised and the result is withheld.
"""

import os
import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

import msgspec

from kms_core.errors import AuditUnavailable

request_id: Final[ContextVar[str]] = ContextVar("request_id", default="")
job_id: Final[ContextVar[str]] = ContextVar("job_id", default="")


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One operation. ``result`` is ``ok`` or an error code."""

    time: str
    operation: str
    principal: str
    tenant: str
    credential: str
    request_id: str = ""
    job_id: str = ""
    key_id: str = ""
    key_version: str = ""
    backend: str = ""
    origin: str = ""
    context_keys: tuple[str, ...] = ()
    bytes_in: int = 0
    bytes_out: int = 0
    result: str = ""
    duration_us: int = 0


def now() -> str:
    """RFC 3339 in UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Audit(Protocol):
    """Where records go."""

    def append(self, record: Record) -> None:
        """Store the record. Raises AuditUnavailable if it may not be there afterwards."""


class JsonLines:
    """A file of one JSON object per line, one ``write`` each, shared by the processes of one machine.

    A torn last line (a crash or a full disk in the middle of a write) is closed before the next record,
    whichever process writes that one, never fused with it; a file that was moved or deleted is noticed and
    begun anew. Readers pass over empty lines: two processes may close the same torn line.
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self._path = path
        self._fsync = fsync
        self._lock = threading.Lock()
        self._fd = -1
        self._identity = (0, 0)

    def append(self, record: Record) -> None:
        line = msgspec.json.encode(record) + b"\n"
        try:
            with self._lock:
                fd = self._open()
                self._close_torn_line(fd)
                if os.write(fd, line) != len(line):  # the disk filled up in the middle of the line
                    raise AuditUnavailable("The audit file cannot be written (the disk is full)")
                if self._fsync:
                    os.fdatasync(fd)
        except OSError as exc:
            raise AuditUnavailable(f"The audit file cannot be written ({exc.strerror})") from exc

    def _open(self) -> int:
        if self._fd >= 0 and self._still_there():
            return self._fd
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        found = os.fstat(fd)
        self._fd, self._identity = fd, (found.st_dev, found.st_ino)
        return fd

    def _still_there(self) -> bool:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    @staticmethod
    def _close_torn_line(fd: int) -> None:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")
