"""Moving ciphertexts into this service: open a line where it is from, seal it, open that again, keep it.

Knows neither Vault nor AWS: who opens a line is a ``MigrationSource``. A bad line stops no other; a peer that
does not answer stops all, and the next run goes on where this one ended.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final, Literal, Protocol

from msgspec import UNSET, UnsetType

from kms_cli import terminal
from kms_cli.migrate.output import MovedRecord, Output
from kms_client import Client
from kms_client.problems import failure
from kms_core.http_client import Busy, Unreachable
from kms_protocol.errors import (
    BackendUnavailable,
    DecryptFailed,
    InvalidRequest,
    KmsError,
    TooLarge,
    Unavailable,
)
from kms_protocol.wire import BatchItem, BatchResult, ContextIn

BATCH_LINES: Final = 100
BATCH_BYTES: Final = 512 * 1024  # of plaintext: a body of the service's API holds four times as much
LINE_BYTES: Final = 64 * 1024 * 1024
MOST_TOLD: Final = 50
GIVE_UP_AFTER: Final = 20  # lines in a row that the source has trouble with: it is the source, not the lines


@dataclass(frozen=True, slots=True)
class TargetFields:
    """What a line says of its place here. ``reference`` is the caller's own name for it, if there is one."""

    reference: str | None
    context: ContextIn
    key_id: str | None


class MigrationSource(Protocol):
    """Where ciphertexts are now."""

    def read(self, text: bytes) -> tuple[TargetFields, Callable[[], bytes]]:
        """One line, and what opens it. Raises InvalidRequest.

        Opening raises DecryptFailed, Unreachable and Busy (after tries enough), BackendUnavailable.
        """


@dataclass(frozen=True, slots=True)
class KnownPlaintext:
    """A line whose plaintext is known. ``source`` is the SHA-256 of the line as it stands."""

    line: int
    source: str
    wanted: TargetFields
    plaintext: bytes = field(repr=False, default=b"")

    @property
    def name(self) -> str:
        return self.wanted.reference or f"line-{self.line}"


@dataclass(slots=True)
class MigrationReport:
    """How many lines there were, and how they ended."""

    lines: int = 0
    moved: int = 0
    already_there: int = 0
    failed: int = 0

    def fail(self, where: str, error: KmsError) -> None:
        """Count, and tell on stderr as long as that helps."""
        self.failed += 1
        if self.failed <= MOST_TOLD:
            terminal.say(f"{where}: {error.code}: {terminal.plain(error.detail)}")
        if self.failed == MOST_TOLD:
            terminal.say("further failures are counted only")


class Move:
    """One run. Without a client it is a rehearsal: everything is opened, and nothing is sealed or kept."""

    def __init__(self, source: MigrationSource, client: Client | None, output: Output) -> None:
        self.report = MigrationReport()
        self._source = source
        self._client = client
        self._output = output
        self._waiting: list[KnownPlaintext] = []
        self._in_a_row = 0

    def run(self, lines: Iterable[bytes]) -> None:
        """Raises Unavailable where source or service do not answer; what was done by then is kept."""
        try:
            for number, text in enumerate(map(bytes.strip, lines), start=1):
                if text:
                    self._line(number, text)
        except (Unreachable, Busy):
            with suppress(Unavailable):  # the source is away, but the service may not be
                self._flush()
            raise
        self._flush()

    def _line(self, number: int, text: bytes) -> None:
        self.report.lines += 1
        try:
            wanted, open_ = self._source.read(text)
            entry = KnownPlaintext(number, hashlib.sha256(text).hexdigest(), wanted)
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

    def _take(self, entry: KnownPlaintext) -> None:
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
        for entry, outcome in sealed_and_verified(self._client, batch):
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
    """What the service opens is not what it sealed."""

    code = "not_verified"
    summary = "The service gave back something else than it was given: nothing was kept"


def sealed_and_verified(
    client: Client, batch: Sequence[KnownPlaintext]
) -> Iterator[tuple[KnownPlaintext, MovedRecord | KmsError]]:
    """Seal each entry, open it by the ciphertext alone, and compare. Raises what concerns all of them."""
    asked = [
        BatchItem(plaintext=entry.plaintext, context=entry.wanted.context, key_id=entry.wanted.key_id)
        for entry in batch
    ]
    good: list[tuple[KnownPlaintext, BatchResult]] = []
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
    """One for each item. A body above the limit of the service is halved, as long as that helps."""
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


def _record(entry: KnownPlaintext, result: BatchResult) -> MovedRecord:
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
    """The lines of all inputs; none, or ``-``, is stdin. Raises InvalidRequest for a line without end."""
    for path in inputs or (Path("-"),):
        if path == Path("-"):
            yield from _lines(stdin)
            continue
        with path.open("rb") as file:
            yield from _lines(file)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(LINE_BYTES):
        if len(line) == LINE_BYTES:
            raise InvalidRequest(
                f"A line is above {terminal.size(LINE_BYTES)}: expected one ciphertext a line"
            )
        yield line
