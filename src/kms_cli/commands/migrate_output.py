"""Output of ``kms migrate``: the counts that all its commands show, and the records of migrated lines."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from kms_cli import terminal
from kms_cli.options import placed
from kms_cli.session import session
from kms_protocol import wire
from kms_protocol.errors import EXIT_BAD_DATA, Conflict, InvalidRequest, KmsError

MAX_REPORTED: Final = 50
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_RECORD_START: Final = b'{"line":'


@dataclass(slots=True)
class MigrationReport:
    """The number of lines, or files, by outcome."""

    lines: int = 0
    moved: int = 0
    already_there: int = 0
    failed: int = 0

    def fail(self, where: str, error: KmsError) -> None:
        """Count a failure, and print the first 50."""
        self.failed += 1
        if self.failed <= MAX_REPORTED:
            terminal.say(f"{where}: {error.code}: {terminal.plain(error.detail)}")
        if self.failed == MAX_REPORTED:
            terminal.say("further failures are only counted")

    def show(self, *, dry_run: bool, on_stdout: bool) -> int:
        """Print the counts, as a message if stdout has the ciphertexts. Return the exit code."""
        counts = asdict(self)
        if dry_run:
            counts["would_move"] = counts.pop("moved")
        if on_stdout:
            terminal.record(counts, as_json=session().as_json)
        else:
            terminal.say(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
        return EXIT_BAD_DATA if self.failed else 0


class MovedRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A migrated ciphertext. ``source`` is the SHA-256 of its line; the service gives the last three."""

    line: int
    reference: str | None = None
    source: str
    ciphertext: bytes = b""  # msgspec writes and reads bytes as base64
    key_id: str = ""
    key_version: str = ""


class Lines:
    """Output as one line of JSON for each record. ``done`` has the ``source`` of those in the file."""

    def __init__(self, file: BinaryIO, done: Iterable[str] = ()) -> None:
        self._file, self._done = file, set(done)

    def has(self, record: MovedRecord) -> bool:
        """Return whether its line was migrated before."""
        return record.source in self._done

    def put(self, records: Sequence[MovedRecord]) -> None:
        """Write records to disk."""
        self._file.writelines(msgspec.json.encode(record) + b"\n" for record in records)
        self._done.update(record.source for record in records)
        self._file.flush()
        if self._file.seekable():
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def continued(path: Path) -> Iterator[Lines]:
    """Open a file that may have records, and remove an incomplete last one.

    Raises InvalidRequest for a file of something else, Conflict while another run writes it.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Conflict(f"Another run is writing {path}") from exc
        done: list[str] = []
        for number, line in enumerate(file, start=1):
            start = line.strip(b"\0")[: len(_RECORD_START)]  # a power cut may leave zeros
            if not line.endswith(b"\n") and _RECORD_START.startswith(start):
                file.seek(-len(line), os.SEEK_END)
                break
            try:
                done.append(msgspec.json.decode(line, type=MovedRecord).source)
            except wire.NOT_JSON as exc:
                raise InvalidRequest(
                    f"Line {number} of {path} was not written by this command: name another file"
                ) from exc
        file.truncate()
        yield Lines(file, done)


class Folder:
    """Output as a file for each record, named by its reference or the number of its line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: dict[Path, str] = {}

    def has(self, record: MovedRecord) -> bool:
        """Return whether its file exists. Raises InvalidRequest for a name that is invalid or taken."""
        path = self._path(record)
        if self._sources.setdefault(path, record.source) != record.source:
            raise InvalidRequest("Another line has this reference")
        return path.exists()

    def put(self, records: Sequence[MovedRecord]) -> None:
        """Write records to disk."""
        for record in records:
            with placed(self._path(record), overwrite=False) as file:
                file.write(record.ciphertext)

    def _path(self, record: MovedRecord) -> Path:
        name = record.reference or f"line-{record.line}"
        if not _NAME.fullmatch(name):
            raise InvalidRequest("A reference that names a file may only contain letters, digits and _ . -")
        return self._folder / f"{name}.age"
