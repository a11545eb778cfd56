"""``kms encrypt-file``, ``decrypt-file``: files of any size through the job API."""

import contextlib
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, Literal, Unpack, cast

import click

from kms_cli import age_files, terminal
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
from kms_client.requests import JobOptions, failure
from kms_protocol.errors import JobCancelled, KmsError
from kms_protocol.units import size_text
from kms_protocol.wire import ContextIn, JobOut

SUFFIX: Final = ".age"
SUFFIXES: Final = (SUFFIX, ".enc")  # the second is that of 0.1 and 0.2.0


class JobFailed(KmsError):
    """A failure that only jobs have."""

    def __init__(self, detail: str, code: str) -> None:
        super().__init__(detail)
        self.hint = terminal.HINTS.get(code, "")


class TransferOptions(JobOptions):
    """Options of both commands."""

    context: ContextIn
    key_id: str | None


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
    source: Path, output: Path | None, *, force: bool, **options: Unpack[TransferOptions]
) -> None:
    """Encrypt SOURCE, of any size, to SOURCE.age or --output. SOURCE is not changed.

    The SOURCE - is stdin, and its output is stdout.
    """
    if output is None and source == STDIO:
        terminal.refuse_binary()
    elif output is None:
        output = source.with_name(source.name + SUFFIX)
    _run("encrypt", source, output, options, force=force)


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
    source: Path, output: Path | None, *, force: bool, **options: Unpack[TransferOptions]
) -> None:
    """Decrypt SOURCE, of any size, to its name without .age or --output, readable only by you.

    The SOURCE - is stdin, and its output is stdout. Nothing is written before the last byte is verified.
    """
    if output is None and source != STDIO:
        if source.suffix not in SUFFIXES:
            raise click.UsageError(f'"{source.name}" does not end in {SUFFIX}: name the output with --output')
        output = source.with_suffix("")
    _run("decrypt", source, output, options, force=force)


def _run(
    kind: Literal["encrypt", "decrypt"],
    source: Path,
    target: Path | None,
    options: TransferOptions,
    *,
    force: bool,
) -> None:
    """Convert one file by a job of the service. A target of None is stdout by default."""
    on_stdout = is_stdout(target)
    with connect() as kms, meter(on_stdout=on_stdout) as line:
        with age_files.source(source) as opened, writing(target, overwrite=force) as file:
            sent = opened if kind == "encrypt" else age_files.unarmored(opened)
            upload = kms.upload_encrypt if kind == "encrypt" else kms.upload_decrypt
            accepted = upload(
                cast("BinaryIO", sent.stream),
                progress=partial(line.show, "sending"),
                **options,
            )
            job = followed(kms, accepted.job_id, line)
            require_success(job)
            size = _receive(kms, job, line, target, file)
        _release(kms, job)
    name = name_of(source)
    done = {"source": name, "output": str(target), "bytes": size, "job_id": job.job_id}
    if not on_stdout and not printed_as_json(done):
        output = terminal.printable(str(target))
        terminal.say(f"{kind}ed {terminal.printable(name)} to {output} ({size_text(size)})")


def _receive(kms: Client, job: JobOut, line: terminal.Meter, target: Path | None, file: BinaryIO) -> int:
    """Write the result of a job. Return its size in bytes."""
    try:
        size = kms.download(job.job_id, file, progress=partial(line.show, "receiving"))
        file.flush()
    except (BrokenPipeError, terminal.BinaryOutput):
        _release(kms, job)
        raise
    except (KeyboardInterrupt, SystemExit, OSError):
        output = shlex.quote(str(target or STDIO))
        terminal.say(f"the result is kept: `kms job result {job.job_id} -o {output}`")
        raise
    return size


def _release(kms: Client, job: JobOut) -> None:
    with contextlib.suppress(KmsError):  # an older service releases no results
        kms.release(job.job_id)


def followed(kms: Client, job_id: str, line: terminal.Meter) -> JobOut:
    """Wait until the job ends in any state; Ctrl-C cancels the job."""
    try:
        return kms.wait(job_id, progress=shown_in(line))
    except (KeyboardInterrupt, SystemExit):
        with contextlib.suppress(KmsError):
            kms.cancel(job_id)
        raise


def shown_in(line: terminal.Meter) -> Callable[[JobOut], None]:
    """Return what shows the progress of a job in ``line``."""
    return lambda job: line.show(job.state, job.progress.bytes_done, job.progress.bytes)


def require_success(job: JobOut) -> None:
    """Raise the error of a failed or cancelled job."""
    if job.state == "cancelled":
        raise JobCancelled
    if job.state != "failed":
        return
    code = job.error.code if job.error else "internal"
    details = {
        "items_failed": f"{job.progress.items_failed} of {job.progress.items} items failed",
        "attempts_exhausted": f"The job used up its attempts ({job.attempt})",
        "record_refused": "The stored record of the job was changed",
    }
    raise JobFailed(details[code], code) if code in details else failure(code)
