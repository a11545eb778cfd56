"""Migrates ciphertexts: decrypts a line at its source, encrypts it with the service, verifies it, writes it.

A ``MigrationSource`` decrypts lines. An invalid line does not stop the others; a peer that does not answer
stops the run, and the next run continues after the written lines. Output is lines of JSON, or a file each.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final, Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from kms_cli import terminal
from kms_cli.options import placed
from kms_client import Client
from kms_client.problems import failure
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import (
    BackendUnavailable,
    Conflict,
    DecryptFailed,
    InvalidRequest,
    KmsError,
    TooLarge,
    Unavailable,
)
from kms_protocol.units import size_text
from kms_protocol.wire import BatchItem, BatchResult, ContextIn

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
SUFFIX: Final = ".age"


class MovedRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A migrated ciphertext. ``source`` is the SHA-256 of its line."""

    line: int
    reference: str | None = None
    source: str
    ciphertext: bytes  # msgspec writes and reads bytes as base64
    key_id: str
    key_version: str


class _Done(msgspec.Struct):
    source: str


class Output(Protocol):
    """A destination of records."""

    def has(self, name: str, source: str) -> bool:
        """Return whether an earlier run wrote this one. Raises InvalidRequest for an invalid name."""

    def put(self, name: str, record: MovedRecord) -> None:
        """Write a record."""

    def flush(self) -> None:
        """Write all records to disk."""


class Lines:
    """Output as one line of JSON for each record."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._done: set[str] = set()

    @classmethod
    def continued(cls, path: Path) -> "Lines":
        """Open a file that may contain records. Raises InvalidRequest, Conflict if another run writes it."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        file = os.fdopen(handle, "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            file.close()
            raise Conflict(f"Another run is writing {path}") from exc
        lines = cls(file)
        lines._read_done(path)
        return lines

    def has(self, name: str, source: str) -> bool:
        del name
        return source in self._done

    def put(self, name: str, record: MovedRecord) -> None:
        del name
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._done.add(record.source)

    def flush(self) -> None:
        self._file.flush()
        if self._file.seekable():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _read_done(self, path: Path) -> None:
        """Read the records in the file, and remove an incomplete last line."""
        complete_bytes = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self._done.add(msgspec.json.decode(line, type=_Done).source)
            except msgspec.DecodeError as exc:
                raise InvalidRequest(
                    f"Line {number} of {path} was not written by this command: name another file"
                ) from exc
            complete_bytes += len(line)
        self._file.seek(complete_bytes)
        self._file.truncate()


class OutputFolder:
    """Output as a file for each record, named by its reference or the number of its line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str, source: str) -> bool:
        del source
        return self._path(name).exists()

    def put(self, name: str, record: MovedRecord) -> None:
        with placed(self._path(name), overwrite=False) as file:
            file.write(record.ciphertext)

    def flush(self) -> None:
        """Each file is complete and on disk when it appears."""

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidRequest("A reference that names a file may only contain letters, digits and _ . -")
        return self._folder / f"{name}{SUFFIX}"


BATCH_LINES: Final = 100
BATCH_BYTES: Final = 512 * 1024  # of plaintext, a quarter of the limit of a request body
LINE_BYTES: Final = 64 * 1024 * 1024
MAX_REPORTED: Final = 50
GIVE_UP_AFTER: Final = 20  # failures of the source in a row


@dataclass(frozen=True, slots=True)
class TargetFields:
    """The target of a line in the service. ``reference`` is the caller's name for it, if any."""

    reference: str | None
    context: ContextIn
    key_id: str | None


class MigrationSource(Protocol):
    """A system that decrypts its ciphertexts."""

    def read(self, text: bytes) -> tuple[TargetFields, Callable[[], bytes]]:
        """Parse a line. Return its target, and a function that decrypts it. Raises InvalidRequest.

        The function raises DecryptFailed, BackendUnavailable, and Unreachable or Busy after its retries.
        """


@dataclass(frozen=True, slots=True)
class DecryptedLine:
    """A decrypted line. ``source`` is the SHA-256 of the line."""

    line: int
    source: str
    wanted: TargetFields
    plaintext: bytes = field(repr=False, default=b"")

    @property
    def name(self) -> str:
        return self.wanted.reference or f"line-{self.line}"


@dataclass(slots=True)
class MigrationReport:
    """The number of lines by outcome."""

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


class Migration:
    """One run. Without a client it is a dry run, which decrypts all lines and writes nothing."""

    def __init__(self, source: MigrationSource, client: Client | None, output: Output) -> None:
        self.report = MigrationReport()
        self._source = source
        self._client = client
        self._output = output
        self._waiting: list[DecryptedLine] = []
        self._in_a_row = 0

    def run(self, lines: Iterable[bytes]) -> None:
        """Migrate lines. Raises Unavailable if source or service do not answer; earlier results are kept."""
        try:
            for number, text in enumerate(map(bytes.strip, lines), start=1):
                if text:
                    self._line(number, text)
        except (Unreachable, Busy):
            with suppress(Unavailable):  # the service may answer although the source does not
                self._flush()
            raise
        self._flush()

    def _line(self, number: int, text: bytes) -> None:
        self.report.lines += 1
        try:
            wanted, open_ = self._source.read(text)
            entry = DecryptedLine(number, hashlib.sha256(text).hexdigest(), wanted)
            if self._output.has(entry.name, entry.source):
                self.report.already_there += 1
                return
            entry = replace(entry, plaintext=self._opened(open_))
        except (Unreachable, Busy):
            raise
        except KmsError as exc:
            self.report.fail(f"line {number}", exc)
        else:
            self._take(entry)

    def _opened(self, open_: Callable[[], bytes]) -> bytes:
        try:
            plaintext = open_()
        except (Unreachable, Busy):
            raise
        except BackendUnavailable as exc:
            self._in_a_row += 1
            if self._in_a_row >= GIVE_UP_AFTER:
                raise Unreachable(f"{exc.detail} (of {GIVE_UP_AFTER} lines in a row)") from exc
            raise
        except DecryptFailed:
            self._in_a_row = 0
            raise
        self._in_a_row = 0
        return plaintext

    def _take(self, entry: DecryptedLine) -> None:
        if self._client is None:
            self.report.moved += 1
            return
        size = sum(len(each.plaintext) for each in self._waiting)
        if len(self._waiting) >= BATCH_LINES or size + len(entry.plaintext) > BATCH_BYTES:
            self._flush()
        self._waiting.append(entry)

    def _flush(self) -> None:
        batch, self._waiting = self._waiting, []
        if self._client is None or not batch:
            return
        away: Unavailable | None = None
        for entry, outcome in encrypted_and_verified(self._client, batch):
            if isinstance(outcome, MovedRecord):
                self._output.put(entry.name, outcome)
                self.report.moved += 1
            elif isinstance(outcome, Unavailable):
                away = outcome
            else:
                self.report.fail(f"line {entry.line}", outcome)
        self._output.flush()
        if away:
            raise away


class NotTheSame(KmsError):
    """A ciphertext that the service decrypts to another plaintext."""

    code = "not_verified"
    summary = "The service decrypted the ciphertext to another plaintext: it was not written"


def encrypted_and_verified(
    client: Client, batch: Sequence[DecryptedLine]
) -> Iterator[tuple[DecryptedLine, MovedRecord | KmsError]]:
    """Encrypt each entry, decrypt its ciphertext, and compare. Raises errors that concern all entries."""
    asked = [
        BatchItem(plaintext=entry.plaintext, context=entry.wanted.context, key_id=entry.wanted.key_id)
        for entry in batch
    ]
    good: list[tuple[DecryptedLine, BatchResult]] = []
    for entry, result in zip(batch, _results(client, "encrypt", asked), strict=True):
        if isinstance(result, KmsError):
            yield entry, result
        else:
            good.append((entry, result))
    again = [
        BatchItem(ciphertext=_bytes(result.ciphertext), context=entry.wanted.context)
        for entry, result in good
    ]
    for (entry, result), opened in zip(good, _results(client, "decrypt", again), strict=True):
        if isinstance(opened, KmsError):
            yield entry, opened
        elif opened.plaintext != entry.plaintext:
            yield entry, NotTheSame()
        else:
            yield entry, _record(entry, result)


def _results(
    client: Client, operation: Literal["encrypt", "decrypt"], items: Sequence[BatchItem]
) -> Sequence[BatchResult | KmsError]:
    """Return a result for each item. A batch above the limit of the service is split in halves."""
    if not items:
        return []
    try:
        results = client.batch(operation, items).results
    except TooLarge as exc:
        half = len(items) // 2
        if not half:
            return [exc]
        return [*_results(client, operation, items[:half]), *_results(client, operation, items[half:])]
    return [result if result.error is UNSET else failure(result.error.code) for result in results]


def _record(entry: DecryptedLine, result: BatchResult) -> MovedRecord:
    return MovedRecord(
        line=entry.line,
        reference=entry.wanted.reference,
        source=entry.source,
        ciphertext=_bytes(result.ciphertext),
        key_id=str(result.key_id),
        key_version=str(result.key_version),
    )


def _bytes(given: bytes | UnsetType) -> bytes:
    return b"" if given is UNSET else given


def lines_of(inputs: Sequence[Path], stdin: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of all inputs; none, or ``-``, is stdin. Raises InvalidRequest above 64 MiB a line."""
    for path in inputs or (Path("-"),):
        if path == Path("-"):
            yield from _lines(stdin)
            continue
        with path.open("rb") as file:
            yield from _lines(file)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(LINE_BYTES):
        if len(line) == LINE_BYTES:
            raise InvalidRequest(f"A line exceeds {size_text(LINE_BYTES)}: expected one ciphertext a line")
        yield line
