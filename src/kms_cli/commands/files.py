"""``kms encrypt-file``, ``decrypt-file``: through the job API, and into place whole or not at all."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, Unpack

import click

from kms_cli import terminal
from kms_cli.atomic_file import placed
from kms_cli.options import callback_option, context_option, force_option, key_option, priority_option
from kms_cli.progress import Meter
from kms_cli.remote_service import connect
from kms_cli.session import session
from kms_client import Client
from kms_client.problems import failure
from kms_client.requests import JobOptions
from kms_core.age import armor
from kms_protocol.errors import JobCancelled, KmsError, NotACiphertext
from kms_protocol.wire import ContextIn, JobOut

SUFFIX: Final = ".enc"
AGE_START: Final = b"age-encryption.org/"
LOOK_BYTES: Final = 2048

source_argument = click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
output_option = click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path))


class JobFailed(KmsError):
    """An ending that only jobs have."""

    def __init__(self, detail: str, code: str) -> None:
        super().__init__(detail)
        self.hint = terminal.HINTS.get(code, "")


@dataclass(frozen=True, slots=True)
class Transfer:
    """One file on its way through the service."""

    kind: Literal["encrypt", "decrypt"]
    source: Path
    target: Path
    force: bool
    context: ContextIn
    key_id: str | None
    options: JobOptions


@click.command("encrypt-file", short_help="Encrypt a file.")
@source_argument
@output_option
@context_option
@key_option
@priority_option
@callback_option
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
    """Encrypt SOURCE, of any size, into SOURCE.enc or --output. SOURCE stays as it is."""
    target = output or source.with_name(source.name + SUFFIX)
    _run(Transfer("encrypt", source, target, force, context, key_id, options))


@click.command("decrypt-file", short_help="Decrypt a file.")
@source_argument
@output_option
@context_option
@key_option
@priority_option
@callback_option
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
    """Decrypt SOURCE, of any size, into the name without .enc or --output, readable by you alone."""
    if output is None:
        if source.suffix != SUFFIX or source.name == SUFFIX:
            raise click.UsageError(f'"{source.name}" does not end in {SUFFIX}: name the result with --output')
        output = source.with_suffix("")
    _run(Transfer("decrypt", source, output, force, context, key_id, options))


def _run(transfer: Transfer) -> None:
    with (
        transfer.source.open("rb") as file,
        placed(transfer.target, overwrite=transfer.force) as target,
        connect() as kms,
        Meter() as meter,
    ):
        upload = kms.upload_encrypt if transfer.kind == "encrypt" else kms.upload_decrypt
        accepted = upload(
            file if transfer.kind == "encrypt" else _ciphertext(file, transfer.source),
            context=transfer.context,
            key_id=transfer.key_id,
            progress=lambda done, total: meter.show("sending", done, total),
            **transfer.options,
        )
        job = ended(kms, accepted.job_id, meter)
        size = kms.download(
            job.job_id, target, progress=lambda done, total: meter.show("receiving", done, total)
        )
    done = {
        "source": str(transfer.source),
        "output": str(transfer.target),
        "bytes": size,
        "job_id": job.job_id,
    }
    if session().as_json:
        terminal.record(done, as_json=True)
    else:
        terminal.say(f"{transfer.kind}ed {transfer.source} to {transfer.target} ({terminal.size(size)})")


def _ciphertext(file: BinaryIO, path: Path) -> BinaryIO:
    """The age file; out of its armor, if it is in one."""
    start = file.read(LOOK_BYTES)
    file.seek(0)
    if start.startswith(AGE_START):
        return file
    if start.lstrip().startswith(armor.BEGIN):
        return io.BufferedReader(armor.ArmorReader(file))
    raise NotACiphertext(f"{path} is not an age file")


def ended(kms: Client, job_id: str, meter: Meter) -> JobOut:
    """The job when it has succeeded. Raises what made it fail; Ctrl-C cancels it."""
    job = followed(kms, job_id, meter)
    require_success(job)
    return job


def followed(kms: Client, job_id: str, meter: Meter) -> JobOut:
    """The job when it has ended, however that was; Ctrl-C cancels it."""

    def show(job: JobOut) -> None:
        meter.show(job.state, job.progress.bytes_done, job.progress.bytes)

    try:
        return kms.wait(job_id, progress=show)
    except (KeyboardInterrupt, SystemExit):
        with contextlib.suppress(KmsError):
            kms.cancel(job_id)
        raise


def require_success(job: JobOut) -> None:
    """Raise what a failed or cancelled job means."""
    if job.state == "cancelled":
        raise JobCancelled
    if job.state != "failed":
        return
    match job.error.code if job.error else "internal":
        case "items_failed" as code:
            progress = job.progress
            raise JobFailed(f"{progress.items_failed} of {progress.items} items were refused", code)
        case "attempts_exhausted" as code:
            raise JobFailed(f"The job was given up, attempts: {job.attempt}", code)
        case "record_refused" as code:
            raise JobFailed("The job's record is not as the service wrote it", code)
        case code:
            raise failure(code)
