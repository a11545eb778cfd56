"""``kms migrate``: re-encrypts ciphertexts of Vault's transit engine and of AWS KMS, one on each line.

A line is decrypted by the other system and encrypted by the service, which then decrypts the result: it is
written only if that returns the same plaintext. An invalid line does not stop the others. A system that does
not answer stops the run, and the next run continues after the written lines.
"""

import binascii
import contextlib
import fcntl
import functools
import hashlib
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Generic, Literal, TypeVar

import click
import msgspec
from msgspec import UNSET
from msgspec.structs import fields, replace

from kms_cli import terminal
from kms_cli.connection import connect
from kms_cli.options import PATH, STDIO, C, context_of, context_option, key_option, placed
from kms_cli.session import global_options
from kms_client import Client
from kms_client.requests import coded_error
from kms_client.settings import check_encrypted
from kms_core.backends.aws.settings import AwsKmsSection, check_endpoint
from kms_core.backends.circuit_breaker import RetryingCaller, RetryPolicy
from kms_core.backends.vault import client as vault
from kms_core.backends.vault.settings import TransitSection
from kms_core.backends.vault.transit import DAMAGED
from kms_core.http_client import Busy, Unreachable
from kms_core.observability import logs
from kms_core.sections import check_address
from kms_protocol import errors, wire
from kms_protocol.context import Context
from kms_protocol.errors import EXIT_BAD_DATA, Conflict, InvalidRequest, KmsError
from kms_protocol.units import size_text
from kms_protocol.wire import KeyId

MAX_REPORTED: Final = 50
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_RECORD_START: Final = b'{"line":'
BATCH_LINES: Final = 100
LINE_BYTES: Final = 64 * 1024 * 1024
GIVE_UP_AFTER: Final = 20  # failures of the other system in a row
AWS_TIMEOUT_S: Final = 10.0


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
            terminal.record(counts)
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
    if path.exists() and not path.is_file():
        raise InvalidRequest(f"{path} is no plain file: name another, or leave out --output for stdout")
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


class NotTheSame(KmsError):
    """A ciphertext that the service decrypts to another plaintext."""

    code = "not_verified"
    summary = "The service decrypted the ciphertext to another plaintext: it was not written"


# -- input -------------------------------------------------------------------------------------------


class SourceLine(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A line of input: a ciphertext, what it needs, and the name, context and key of its result.

    A field without a value has that of the option of its name.
    """

    reference: str | None = None
    context: wire.ContextIn = msgspec.field(name="new_context", default=None)
    key_id: KeyId | None = msgspec.field(name="new_key_id", default=None)

    def parameters(self, *names: str) -> dict[str, object]:
        """Return the fields of these names in JSON that are not empty, with bytes in base64."""
        document = msgspec.to_builtins(self)
        return {name: document[name] for name in names if document[name]}


L = TypeVar("L", bound=SourceLine)


def read_line(text: bytes, shape: type[L], options: Mapping[str, object]) -> L:
    """Read JSON, or only a ciphertext. Raises InvalidRequest, which does not quote the line."""
    name = next(each.encode_name for each in fields(shape) if each.required)
    defaults = {each.encode_name: options.get(each.name) for each in fields(shape)}
    try:
        document = text if text.startswith(b"{") else msgspec.json.encode({name: text.decode("ascii")})
        given = msgspec.json.decode(document, type=dict[str, object])
        known = {key: value for key, value in given.items() if value is not None}
        return msgspec.convert(defaults | known, shape)
    except wire.NOT_JSON as exc:
        reason = str(exc) if isinstance(exc, msgspec.ValidationError) else "it is not JSON, nor ASCII"
        raise InvalidRequest(f"Expected a ciphertext, or JSON with {name}: {reason}") from exc


def lines_of(inputs: Sequence[Path]) -> Iterator[bytes]:
    """Yield the lines of all inputs; none, or ``-``, is stdin. Raises InvalidRequest above 64 MiB a line."""
    for path in inputs or (STDIO,):
        with contextlib.nullcontext(sys.stdin.buffer) if path == STDIO else path.open("rb") as file:
            while line := file.readline(LINE_BYTES):
                if len(line) == LINE_BYTES:
                    raise InvalidRequest(f"A line exceeds {size_text(LINE_BYTES)}: expected a ciphertext")
                yield line


# -- migration ---------------------------------------------------------------------------------------

Item = tuple[MovedRecord, wire.BatchItem]


@dataclass(slots=True)
class Migration(Generic[L]):
    """One run. ``decrypt`` raises DecryptFailed, BackendUnavailable, and Unreachable and Busy after retries.

    Without a client it is a dry run, which decrypts all lines and writes nothing.
    """

    read: Callable[[bytes], L]
    decrypt: Callable[[L], bytes]
    client: Client | None
    output: Lines | Folder
    meter: terminal.Meter
    report: MigrationReport = field(default_factory=MigrationReport)
    stopped: errors.Unavailable | None = None

    def run(self, lines: Iterable[bytes]) -> None:
        """Migrate lines. Raises Unavailable if source or service do not answer; earlier results are kept."""
        items = self._decrypted(lines)
        while self.stopped is None and (batch := list(itertools.islice(items, BATCH_LINES))):
            if self.client is None:
                self.report.moved += len(batch)
            else:
                self._encrypt(self.client, batch)
        if self.stopped is not None:
            raise self.stopped

    def _decrypted(self, lines: Iterable[bytes]) -> Iterator[Item]:
        """Decrypt the lines that are not in the output, up to an error that ends the run (``stopped``)."""
        in_a_row = 0
        for number, text in enumerate(map(bytes.strip, lines), start=1):
            if not text:
                continue
            self.report.lines += 1
            self.meter.show("migrating", self.report.lines, None, "lines")
            try:
                line, source = self.read(text), hashlib.sha256(text).hexdigest()
                record = MovedRecord(line=number, reference=line.reference, source=source)
                if self.output.has(record):
                    self.report.already_there += 1
                    continue
                plaintext = self.decrypt(line)
            except (Unreachable, Busy) as exc:
                self.stopped = exc
                return
            except KmsError as exc:
                in_a_row = in_a_row + 1 if isinstance(exc, errors.BackendUnavailable) else 0
                if in_a_row == GIVE_UP_AFTER:
                    self.stopped = Unreachable(f"{exc.detail} (of {GIVE_UP_AFTER} lines in a row)")
                    return
                self.report.fail(f"line {number}", exc)
            else:
                in_a_row = 0
                yield record, wire.BatchItem(plaintext=plaintext, context=line.context, key_id=line.key_id)

    def _encrypt(self, client: Client, batch: Sequence[Item]) -> None:
        """Encrypt, decrypt the ciphertexts, and write those that return the same plaintext.

        ``stopped`` is set if the service cannot process some now.
        """
        made: list[Item] = []
        good: list[MovedRecord] = []
        sealed = _processed(client, "encrypt", [item for _, item in batch])
        for (record, item), found in zip(batch, sealed, strict=True):
            if isinstance(found, KmsError):
                self._fail(record, found)
            else:
                key = {"key_id": found.key_id, "key_version": found.key_version}
                made.append((replace(record, ciphertext=found.ciphertext, **key), item))
        again = [wire.BatchItem(ciphertext=record.ciphertext, context=item.context) for record, item in made]
        for (record, item), found in zip(made, _processed(client, "decrypt", again), strict=True):
            if isinstance(found, KmsError):
                self._fail(record, found)
            elif found.plaintext != item.plaintext:
                self._fail(record, NotTheSame())
            else:
                good.append(record)
        self.output.put(good)
        self.report.moved += len(good)

    def _fail(self, record: MovedRecord, error: KmsError) -> None:
        if isinstance(error, errors.Unavailable):
            self.stopped = error
        else:
            self.report.fail(f"line {record.line}", error)


def _processed(
    client: Client, operation: Literal["encrypt", "decrypt"], items: Sequence[wire.BatchItem]
) -> list[wire.BatchResult | KmsError]:
    """Return the results of the service, or the errors of single lines, in their order.

    A batch above the limit of the service is sent item by item.
    """
    try:
        results = client.batch(operation, items).results if items else []
    except errors.TooLarge as exc:
        if len(items) == 1:
            return [exc]
        return [_processed(client, operation, [each])[0] for each in items]
    return [each if each.error is UNSET else coded_error(each.error.code) for each in results]


def migrate(shape: type[L], decrypt: Callable[[L], bytes], given: Mapping[str, Any]) -> int:
    """Migrate the inputs and show the report. Return the exit code. Raises Unavailable after the report."""
    output, folder, dry_run = given["output"], given["output_dir"], given["dry_run"]
    if output and folder:
        raise click.UsageError("give --output or --output-dir, not both")
    caller = RetryingCaller("migrate", RetryPolicy())
    with contextlib.ExitStack() as stack:
        client = None if dry_run else stack.enter_context(connect())
        target: Lines | Folder = Folder(folder) if folder else Lines(sys.stdout.buffer)
        if output and not dry_run:
            target = stack.enter_context(continued(output))
        read = functools.partial(read_line, shape=shape, options=given)
        with_report = bool(dry_run or output or folder)
        line = stack.enter_context(terminal.Meter(on_stdout=not with_report))
        moving = Migration(
            read, lambda each: caller.call("unwrap", lambda: decrypt(each)), client, target, line
        )
        try:
            moving.run(lines_of(given["inputs"]))
        finally:
            line.erase()
            code = moving.report.show(dry_run=dry_run, on_stdout=with_report)
    return code


def line_options(command: C) -> C:
    """Add the options of the commands that migrate lines."""
    folder = click.Path(path_type=Path, file_okay=False, exists=True)
    appended = "Append lines of JSON to this file, and skip lines that it contains."
    each = "Write a file for each ciphertext: REFERENCE.age, or line-NUMBER.age."
    for option in (
        key_option,
        context_option,
        click.option("--dry-run", is_flag=True, help="Decrypt all lines; encrypt and write nothing."),
        click.option("--output-dir", type=folder, help=each),
        click.option("--output", "-o", type=PATH, help=appended),
        click.argument("inputs", nargs=-1, type=PATH),
    ):
        command = option(command)
    return command


# -- transit -----------------------------------------------------------------------------------------


class TransitLine(SourceLine, kw_only=True):
    """An item of the ``batch_input`` of transit."""

    ciphertext: str
    vault_context: bytes | None = msgspec.field(name="context", default=None)
    associated_data: bytes | None = None
    key: str | None = None


class _PlaintextAnswer(msgspec.Struct):
    plaintext: bytes


def base64(text: str) -> bytes:
    """Return the value of an option in base64."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as exc:
        raise click.BadParameter("expected base64") from exc


@click.command("transit")
@click.option("--vault-address", required=True, help="https://host:port of the server.")
@click.option("--vault-token-file", required=True, type=PATH, help="File that holds a token for it.")
@click.option("--vault-namespace", help="Namespace of the mount.")
@click.option("--vault-ca-file", type=PATH, help="Trust only the certificate authorities in this file.")
@click.option("--mount", default="transit", show_default=True, help="Path of the engine.")
@click.option("--key", help="Name of the key in transit.")
@click.option("--vault-context", type=base64, help="Context of a derived key, in base64.")
@click.option("--associated-data", type=base64, help="Associated data, in base64.")
@line_options
def transit_command(**given: Any) -> int:  # noqa: ANN401 -- click's own
    """Decrypt ciphertexts with transit, encrypt them with the service, and verify each by decrypting it.

    Each line of INPUTS, or of stdin, is a ciphertext (vault:v1:…), or a JSON object with ciphertext and
    optionally context and associated_data (base64, as in transit's batch_input), key, reference, new_context,
    new_key_id. --context and --key-id are those of the service, for lines without new_context or new_key_id.
    """
    _show_warnings()
    Context.parse(given["context"])
    check_address("--vault-address", given["vault_address"], in_prod=False)
    if not global_options().allow_http:
        check_encrypted(given["vault_address"])
    names = ("address", "token_file", "namespace", "ca_file")
    section = TransitSection(**{name: given[f"vault_{name}"] for name in names})
    engine = vault.connect(section, "vault", strict=False)
    mount = vault.path_of(given["mount"], "--mount")
    return migrate(TransitLine, lambda line: _by_transit(engine, mount, line), given)


def _show_warnings() -> None:
    """Show warnings of the other system's backend on stderr, in place of the progress line."""
    logs.configure("warn", json=False)
    logging.root.handlers[0].addFilter(lambda _: terminal.Meter.erase() is None)


def _by_transit(engine: vault.VaultClient, mount: str, line: TransitLine) -> bytes:
    if line.key is None:
        raise InvalidRequest("There is no key: give --key, or key in the line")
    path = f"{mount}/decrypt/{vault.path_of(line.key, 'The name of a transit key')}"
    answer = engine.call("POST", path, line.parameters("ciphertext", "context", "associated_data"))
    if answer.ok:
        return answer.read(vault.EngineAnswer[_PlaintextAnswer]).data.plaintext
    text = vault.said(answer)
    if any(word in text for word in DAMAGED):
        raise errors.DecryptFailed
    enable = f"bao secrets enable -path={mount} transit"
    raise engine.engine_error(answer, mount, enable) or errors.BackendUnavailable(
        f"{engine.server.where} rejects it at {path}: check the key, and its context if it is derived"
    )


# -- AWS KMS -----------------------------------------------------------------------------------------


class AwsLine(SourceLine, kw_only=True):
    """The parameters of Decrypt. Its context is that of the service too, unless another is given."""

    ciphertext_blob: bytes = msgspec.field(name="CiphertextBlob")
    encryption_context: dict[str, str] | None = msgspec.field(name="EncryptionContext", default=None)
    aws_key: str | None = msgspec.field(name="KeyId", default=None)

    def __post_init__(self) -> None:
        if self.context is None:
            self.context = self.encryption_context


class _DecryptAnswer(msgspec.Struct, rename="pascal"):
    plaintext: bytes


@click.command("aws")
@click.option("--region", help="Region of the keys.")
@click.option("--profile", help="Profile of ~/.aws/config.")
@click.option("--endpoint-url", help="Address instead of that of the region.")
@click.option("--aws-ca-file", type=PATH, help="Trust only the certificate authorities in this file.")
@click.option("--aws-key", help="Required key of the ciphertexts: its ARN, id or alias.")
@click.option("--encryption-context", callback=context_of, help="Context in AWS, written as --context.")
@line_options
def aws_command(**given: Any) -> int:  # noqa: ANN401 -- click's own
    """Decrypt ciphertexts with AWS KMS, encrypt them with the service, and verify each by decrypting it.

    Each line of INPUTS, or of stdin, is a CiphertextBlob in base64, or a JSON object with CiphertextBlob and
    optionally EncryptionContext, KeyId, reference, new_context, new_key_id. Without --context or new_context,
    the encryption context of AWS becomes the context in the service.
    """
    from kms_core.backends.aws.client import AwsKmsClient  # noqa: PLC0415 -- botocore is optional

    _show_warnings()
    Context.parse(given["context"])
    given["encryption_context"] = dict(Context.parse(given["encryption_context"]).pairs) or None
    if given["endpoint_url"]:
        check_endpoint("--endpoint-url", given["endpoint_url"], in_prod=False)
    named = {name: given[name] for name in ("region", "endpoint_url", "profile")}
    kms = AwsKmsClient(AwsKmsSection(**named, ca_file=given["aws_ca_file"], timeout_s=AWS_TIMEOUT_S))

    def decrypt(line: AwsLine) -> bytes:
        asked = line.parameters("CiphertextBlob", "EncryptionContext", "KeyId")
        return kms.ask("Decrypt", asked, _DecryptAnswer).plaintext

    return migrate(AwsLine, decrypt, given)
