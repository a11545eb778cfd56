"""``kms encrypt-file``, ``decrypt-file``: small files by one call, others by jobs, and pipes by file keys.

A pipe is encrypted and decrypted here: the service only wraps and unwraps its file key.
"""

import contextlib
import os
import shlex
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, Unpack, cast

import click

from kms_cli import age_files, terminal
from kms_cli.age_files import InputStream
from kms_cli.connection import connect
from kms_cli.options import (
    STDIO,
    C,
    SourceName,
    callback_option,
    context_option,
    deadline_options,
    force_option,
    is_stdout,
    key_option,
    output_option,
    priority_option,
    report_written,
    source_argument,
    writing,
)
from kms_client import Client
from kms_client.requests import JobOptions, UnexpectedAnswer, job_error
from kms_core.age import stream
from kms_core.age.header import FILE_KEY_BYTES, render_stanza
from kms_core.envelope import binding
from kms_protocol.errors import DecryptFailed, Forbidden, KmsError, TooLarge, Unavailable
from kms_protocol.units import KiB, MiB
from kms_protocol.wire import ContextIn, JobOut

Kind = Literal["encrypt", "decrypt"]
SUFFIX: Final = ".age"
SUFFIXES: Final = (SUFFIX, ".enc")  # the second: of files that callers name so
SMALL_BYTES: Final = {"encrypt": MiB, "decrypt": MiB + 64 * KiB}
"""Sources that one call takes, unless the settings of the service say less."""


class TransferOptions(JobOptions):
    """Options of both commands."""

    context: ContextIn
    key_id: str | None


def _transfer_options(command: C) -> C:
    command = key_option(priority_option(callback_option(deadline_options(force_option(command)))))
    return output_option(context_option(command))


@click.command("encrypt-file")
@source_argument
@_transfer_options
def encrypt_file_command(
    source: Path, output: Path | None, *, force: bool, **options: Unpack[TransferOptions]
) -> None:
    """Encrypt SOURCE, of any size, to SOURCE.age or --output. SOURCE is not changed.

    A file of up to 1 MiB takes one call; a larger one, and any with options of jobs, a job. The SOURCE - is
    stdin, and its output is stdout. A pipe is encrypted here, under a file key that the service wraps, which
    needs the scope wrap; with options of jobs it is sent to the service.
    """
    if output is None and source == STDIO:
        terminal.refuse_binary()
    elif output is None:
        output = source.with_name(source.name + SUFFIX)
    _run("encrypt", source, output, options, force=force)


class _CiphertextName(SourceName):
    """The name of an encrypted file. In place of a missing NAME.enc it takes NAME.age."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401  # click's own
        found = Path(value).with_suffix(SUFFIX)
        if Path(value).suffix == ".enc" and found.is_file() and not os.path.lexists(value):
            terminal.say(f"note: there is no {value}, so this decrypts {found}")
            value = str(found)
        return super().convert(value, param, ctx)


@click.command("decrypt-file")
@click.argument("source", metavar="SOURCE", type=_CiphertextName())
@_transfer_options
def decrypt_file_command(
    source: Path, output: Path | None, *, force: bool, **options: Unpack[TransferOptions]
) -> None:
    """Decrypt SOURCE, of any size, to its name without .age or --output, readable only by you.

    A file of up to 1 MiB takes one call; a larger one, and any with options of jobs, a job. The SOURCE - is
    stdin, and its output is stdout. A pipe is decrypted here, chunk by verified chunk, under a file key that
    the service unwraps, which needs the scope unwrap; with options of jobs it is sent to the service.
    """
    if output is None and source != STDIO:
        if source.suffix not in SUFFIXES:
            raise click.UsageError(f'"{source.name}" does not end in {SUFFIX}: name the output with --output')
        output = source.with_suffix("")
    _run("decrypt", source, output, options, force=force)


def _run(kind: Kind, source: Path, target: Path | None, options: TransferOptions, *, force: bool) -> None:
    """Convert one file. A target of None is stdout by default."""
    on_stdout, job = is_stdout(target), None
    with connect() as kms, terminal.Meter(on_stdout=on_stdout) as line:
        with age_files.source(source) as opened, writing(target, overwrite=force) as file:
            left: InputStream | None = opened
            by_job = any(map(options.get, JobOptions.__annotations__))
            if (on_stdout or source == STDIO) and not by_job:
                convert = _seal if kind == "encrypt" else _open
                left = convert(kms, opened, file, options, line)
            if left and not by_job and _is_small(kind, opened):
                left = _convert_by_call(kms, kind, left, file, options)
            if left:
                job = _convert_by_job(kms, kind, left, line, options)
                _receive(kms, job, line, target, file)
        if job:
            _release(kms, job)
    report_written(f"{kind}ed", source, target, **({"job_id": job.job_id} if job else {}))


# -- pipes: the service has the file key, and this process the payload -------------------------------


def _seal(
    kms: Client, opened: InputStream, file: BinaryIO, options: TransferOptions, line: terminal.Meter
) -> InputStream | None:
    """Encrypt a stream under a new file key. Return what is left: all of it if the token lacks ``wrap``."""
    file_key = os.urandom(FILE_KEY_BYTES)
    try:
        wrap = kms.wrap(file_key, context=options["context"], key_id=options["key_id"]).stanza
    except Forbidden:
        _say_uploaded("wrap")
        return opened
    padded, opened = age_files.is_large(opened)
    try:
        begun = age_files.for_wrapped(wrap, file_key, padded=padded)
    except (DecryptFailed, TooLarge) as exc:
        raise UnexpectedAnswer from exc
    age_files.seal(begun, opened, file, age_files.with_progress(line, "encrypting", opened.size))
    return None


def _open(
    kms: Client, opened: InputStream, file: BinaryIO, options: TransferOptions, line: terminal.Meter
) -> InputStream | None:
    """Decrypt a stream, chunk by chunk.

    Return what is left: all of it if the token lacks ``unwrap``, or the file has no stanzas of a service.
    """
    sealed = age_files.read(opened)
    if binding.read(sealed.head.stanzas) is None:
        return sealed.whole
    stanzas = b"".join(map(render_stanza, sealed.head.stanzas))
    try:
        file_key = kms.unwrap(
            stanzas, context=options["context"], key_id=options["key_id"], nonce=sealed.head.nonce
        ).file_key
    except Forbidden:
        _say_uploaded("unwrap")
        return sealed.whole
    except TooLarge:
        return sealed.whole
    sealed.head.check_mac(file_key)
    progress = age_files.with_progress(line, "decrypting", opened.size)
    age_files.release(sealed, stream.payload_key(file_key, sealed.head.nonce), file, progress)
    return None


def _say_uploaded(operation: str) -> None:
    terminal.say(
        f"the token lacks `{operation}`: the service works on the stream, as far as its spool has room"
    )


# -- small files: one call of the service -------------------------------------------------------------


def _is_small(kind: Kind, opened: InputStream) -> bool:
    is_file = stat.S_ISREG(os.fstat(opened.stream.fileno()).st_mode)
    return is_file and (opened.size or 0) <= SMALL_BYTES[kind]


def _convert_by_call(
    kms: Client, kind: Kind, left: InputStream, file: BinaryIO, options: TransferOptions
) -> InputStream | None:
    """Convert a small file. Return what is left: all of it if the service takes less in one call."""
    content = (left if kind == "encrypt" else age_files.unarmored(left)).stream.readall()
    context, key_id = options["context"], options["key_id"]
    try:
        if kind == "encrypt":
            made = kms.encrypt(content, context=context, key_id=key_id).ciphertext
        else:
            made = kms.decrypt(content, context=context, key_id=key_id).plaintext
    except TooLarge:
        return InputStream(age_files.Joined(content, left.stream), None)
    file.write(made)
    return None


# -- files: a job of the service -----------------------------------------------------------------------


def _convert_by_job(
    kms: Client, kind: Kind, opened: InputStream, line: terminal.Meter, options: TransferOptions
) -> JobOut:
    """Send a file and wait for its job. Raises the error of a job that does not succeed."""
    sent = opened if kind == "encrypt" else age_files.unarmored(opened)
    upload = kms.upload_encrypt if kind == "encrypt" else kms.upload_decrypt
    accepted = upload(cast("BinaryIO", sent.stream), progress=partial(line.show, "sending"), **options)
    job = followed(kms, accepted.job_id, line, owned=True)
    require_success(job)
    return job


def _receive(kms: Client, job: JobOut, line: terminal.Meter, target: Path | None, file: BinaryIO) -> None:
    """Write the result of a job."""
    try:
        kms.download(job.job_id, file, progress=partial(line.show, "receiving"))
        file.flush()
    except (BrokenPipeError, terminal.BinaryOutput):
        _release(kms, job)
        raise
    except (KeyboardInterrupt, SystemExit, OSError):
        output = shlex.quote(str(target or STDIO))
        terminal.say(f"the result is kept: `kms job result {job.job_id} -o {output}`")
        raise


def _release(kms: Client, job: JobOut) -> None:
    with contextlib.suppress(KmsError):  # the file is written: the result expires by itself
        kms.release(job.job_id)


def followed(
    kms: Client, job_id: str, line: terminal.Meter, timeout_s: float | None = None, *, owned: bool = False
) -> JobOut:
    """Wait until the job ends in any state. Ctrl-C cancels an owned one, and leaves any other.

    Reports what became of the job if the wait ends before, by Ctrl-C or because the service is away.
    """
    try:
        return kms.wait(job_id, timeout_s=timeout_s, progress=shown_in(line))
    except (KeyboardInterrupt, SystemExit, Unavailable) as exc:
        with contextlib.suppress(KmsError):
            if owned and not isinstance(exc, Unavailable):
                kms.cancel(job_id)
                terminal.say(f"cancelled job {job_id}")
                raise
        then = f"`kms job wait {job_id}` waits on, `kms job cancel {job_id}` cancels it"
        terminal.say(f"the wait ended, not job {job_id}: {then}")
        raise


def shown_in(line: terminal.Meter) -> Callable[[JobOut], None]:
    """Return what shows the progress of a job in ``line``: its items if there are several, else its bytes."""

    def show(job: JobOut) -> None:
        done = job.progress
        if done.items > 1:
            line.show(job.state, done.items_done, done.items, "items")
        else:
            line.show(job.state, done.bytes_done, done.bytes)

    return show


def require_success(job: JobOut) -> None:
    """Raise the error of a failed or cancelled job, as the service explains it."""
    if error := job_error(job):
        raise error
