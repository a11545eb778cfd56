"""``kms encrypt-file``, ``decrypt-file``: files of any size through the job API."""

import contextlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, Unpack, cast

import click

from kms_cli import terminal
from kms_cli.age_file import streams
from kms_cli.options import (
    STDIO,
    callback_option,
    context_option,
    deadline_options,
    force_option,
    is_stdout,
    key_option,
    name_of,
    output_option,
    priority_option,
    source_argument,
    writing,
)
from kms_cli.session import connect, meter, printed_as_json
from kms_client import Client
from kms_client.problems import failure
from kms_client.requests import JobOptions
from kms_core.age import armor
from kms_protocol.errors import JobCancelled, KmsError, NotACiphertext
from kms_protocol.units import size_text
from kms_protocol.wire import ContextIn, JobOut

SUFFIX: Final = ".age"
SUFFIXES: Final = (SUFFIX, ".enc")  # the second is that of 0.1 and 0.2.0
AGE_START: Final = b"age-encryption.org/"
LOOK_BYTES: Final = 2048


class JobFailed(KmsError):
    """A failure that only jobs have."""

    def __init__(self, detail: str, code: str) -> None:
        super().__init__(detail)
        self.hint = terminal.HINTS.get(code, "")


@dataclass(frozen=True, slots=True)
class Transfer:
    """One file to convert by a job of the service. A target of None is stdout by default."""

    kind: Literal["encrypt", "decrypt"]
    source: Path
    target: Path | None
    force: bool
    context: ContextIn
    key_id: str | None
    options: JobOptions


@click.command("encrypt-file")
@source_argument
@output_option
@context_option
@key_option
@priority_option
@callback_option
@deadline_options
@force_option
def encrypt_file_command(
    source: Path,
    output: Path | None,
    context: ContextIn,
    key_id: str | None,
    *,
    force: bool,
    **options: Unpack[JobOptions],
) -> None:
    """Encrypt SOURCE, of any size, to SOURCE.age or --output. SOURCE is not changed.

    The SOURCE - is stdin, and its output is stdout.
    """
    if output is None and source == STDIO:
        terminal.refuse_binary()
    elif output is None:
        output = source.with_name(source.name + SUFFIX)
    _run(Transfer("encrypt", source, output, force, context, key_id, options))


@click.command("decrypt-file")
@source_argument
@output_option
@context_option
@key_option
@priority_option
@callback_option
@deadline_options
@force_option
def decrypt_file_command(
    source: Path,
    output: Path | None,
    context: ContextIn,
    key_id: str | None,
    *,
    force: bool,
    **options: Unpack[JobOptions],
) -> None:
    """Decrypt SOURCE, of any size, to its name without .age or --output, readable only by you.

    The SOURCE - is stdin, and its output is stdout. Nothing is written before the last byte is verified.
    """
    if output is None and source != STDIO:
        if source.suffix not in SUFFIXES:
            raise click.UsageError(f'"{source.name}" does not end in {SUFFIX}: name the output with --output')
        output = source.with_suffix("")
    _run(Transfer("decrypt", source, output, force, context, key_id, options))


def _run(transfer: Transfer) -> None:
    on_stdout = is_stdout(transfer.target)
    with connect() as kms, meter(on_stdout=on_stdout) as line:
        job, size = _placed(transfer, kms, line)
        _release(kms, job)
    source = name_of(transfer.source)
    done = {"source": source, "output": str(transfer.target), "bytes": size, "job_id": job.job_id}
    if not on_stdout and not printed_as_json(done):
        target = terminal.printable(str(transfer.target))
        terminal.say(f"{transfer.kind}ed {terminal.printable(source)} to {target} ({size_text(size)})")


def _placed(transfer: Transfer, kms: Client, line: terminal.Meter) -> tuple[JobOut, int]:
    """Return the job that made the target, which is in place then, and its size in bytes."""
    with (
        streams.source(transfer.source) as source,
        writing(transfer.target, overwrite=transfer.force) as target,
    ):
        upload = kms.upload_encrypt if transfer.kind == "encrypt" else kms.upload_decrypt
        accepted = upload(
            cast(
                "BinaryIO",
                source.stream if transfer.kind == "encrypt" else _ciphertext(source.stream, transfer),
            ),
            context=transfer.context,
            key_id=transfer.key_id,
            progress=lambda done, total: line.show("sending", done, total),
            **transfer.options,
        )
        job = ended(kms, accepted.job_id, line)
        try:
            size = kms.download(
                job.job_id, target, progress=lambda done, total: line.show("receiving", done, total)
            )
            target.flush()
        except (BrokenPipeError, terminal.BinaryOutput):
            _release(kms, job)
            raise
        except (KeyboardInterrupt, SystemExit, OSError):
            output = shlex.quote(str(transfer.target or STDIO))
            terminal.say(f"the result is kept: `kms job result {job.job_id} -o {output}`")
            raise
    return job, size


def _release(kms: Client, job: JobOut) -> None:
    with contextlib.suppress(KmsError):  # an older service releases no results
        kms.release(job.job_id)


def _ciphertext(stream: io.RawIOBase, transfer: Transfer) -> io.IOBase:
    """Return the age file, without its armor if it has one. Raises NotACiphertext."""
    start = streams.exactly(stream, LOOK_BYTES)
    if stream.seekable():
        stream.seek(-len(start), io.SEEK_CUR)
    else:
        stream = streams.Joined(start, stream)
    if start.startswith(AGE_START):
        return stream
    if start.lstrip().startswith(armor.BEGIN):
        return io.BufferedReader(armor.ArmorReader(cast("io.BufferedReader", stream)))
    raise NotACiphertext(f"{name_of(transfer.source)} is not an age file")


def ended(kms: Client, job_id: str, line: terminal.Meter) -> JobOut:
    """Wait until the job succeeds. Raises the error that it failed with; Ctrl-C cancels the job."""
    job = followed(kms, job_id, line)
    require_success(job)
    return job


def followed(kms: Client, job_id: str, line: terminal.Meter) -> JobOut:
    """Wait until the job ends in any state; Ctrl-C cancels the job."""

    def show(job: JobOut) -> None:
        line.show(job.state, job.progress.bytes_done, job.progress.bytes)

    try:
        return kms.wait(job_id, progress=show)
    except (KeyboardInterrupt, SystemExit):
        with contextlib.suppress(KmsError):
            kms.cancel(job_id)
        raise


def require_success(job: JobOut) -> None:
    """Raise the error of a failed or cancelled job."""
    if job.state == "cancelled":
        raise JobCancelled
    if job.state != "failed":
        return
    match job.error.code if job.error else "internal":
        case "items_failed" as code:
            progress = job.progress
            raise JobFailed(f"{progress.items_failed} of {progress.items} items failed", code)
        case "attempts_exhausted" as code:
            raise JobFailed(f"The job used up its attempts ({job.attempt})", code)
        case "record_refused" as code:
            raise JobFailed("The stored record of the job was changed", code)
        case code:
            raise failure(code)
