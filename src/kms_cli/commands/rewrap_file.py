"""``kms rewrap-file``: a new header by the service. The payload is copied on this machine, never sent."""

import contextlib
import io
import os
from pathlib import Path
from typing import BinaryIO, Final, Unpack

import click

from kms_cli import age_files, terminal
from kms_cli.age_files import InputStream
from kms_cli.connection import connect
from kms_cli.options import (
    STDIO,
    OutputExists,
    context_of,
    context_option,
    force_option,
    is_stdout,
    key_option,
    name_of,
    output_option,
    source_argument,
    writing,
)
from kms_client.requests import RewrapOptions, UnexpectedAnswer
from kms_core.age import header
from kms_core.age.armor import BEGIN
from kms_core.age.header import FILE_LIMITS, Header
from kms_core.envelope import binding
from kms_core.payload.files import FileRange, copied_in_kernel
from kms_core.secure_files import keep_access
from kms_protocol.errors import BadInput, DecryptFailed, InvalidRequest, NotACiphertext
from kms_protocol.wire import EncryptOut

COPY_BYTES: Final = 1024 * 1024


@click.command(
    "rewrap-file",
    epilog="Example: kms rewrap-file --context env=dev --new-context env=prod -o new.age old.age",
)
@source_argument
@output_option
@context_option
@click.option("--new-context", callback=context_of, help="Bind this context instead of the old one.")
@key_option
@force_option
def rewrap_file_command(
    source: Path, output: Path | None, *, force: bool, **options: Unpack[RewrapOptions]
) -> None:
    """Rewrap SOURCE under the current version of its key, or under --key-id.

    Only the header is sent to the service. The payload is not changed: anyone who could read the old file can
    read the new one. Without --output, --force replaces SOURCE.

    The SOURCE - is stdin, and its output is stdout.
    """
    in_place = output is None and source != STDIO
    if in_place and not force:
        raise OutputExists(f"Without --output the result would replace {source}")
    if in_place:
        output = source.resolve()
    elif output is None:
        terminal.refuse_binary()
    with age_files.source(source) as opened:
        start = age_files.exactly(opened.stream, age_files.START_BYTES)
        old = _header(source, start)
        with connect() as kms:
            answer = kms.rewrap(start[: old.payload_offset], **options)
        new = _checked(answer, old)
        with (
            writing(output, overwrite=force) as target,
            terminal.Meter(on_stdout=is_stdout(output)) as line,
        ):
            if in_place:
                with contextlib.suppress(PermissionError):  # this user may not be its owner
                    keep_access(target.fileno(), os.fstat(opened.stream.fileno()))
            target.write(answer.ciphertext[: new.size])
            copy_payload(opened, start[old.size :], target, line)
    if output and output != STDIO:
        _report(source, output, answer)


def _header(source: Path, start: bytes) -> Header:
    try:
        return header.parse(start, FILE_LIMITS)
    except NotACiphertext as exc:
        if not start.startswith(BEGIN):
            raise
        name = name_of(source)
        raise NotACiphertext(f"{name} is armored: only a binary file has a header to replace") from exc


def _checked(answer: EncryptOut, old: Header) -> Header:
    """Return the new header. Raises UnexpectedAnswer unless it fits the payload and the named key."""
    try:
        new = header.parse(answer.ciphertext, FILE_LIMITS)
        bound = binding.read(new.stanzas)
    except (DecryptFailed, BadInput) as exc:
        raise UnexpectedAnswer("The answer of the service is not a header") from exc
    fits = new.nonce == old.nonce and new.payload_offset == len(answer.ciphertext)
    if not fits or bound is None or (bound.key_id, bound.key_version) != (answer.key_id, answer.key_version):
        raise UnexpectedAnswer("The answer of the service is the header of another file")
    return new


def copy_payload(source: InputStream, ahead: bytes, target: BinaryIO, line: terminal.Meter) -> None:
    """Write the payload, of which ``ahead`` was read; between files in the kernel.

    Some file systems then share its extents. Raises InvalidRequest if a file changes.
    """
    fd, done = source.stream.fileno(), 0
    before = os.fstat(fd)
    rest: io.RawIOBase = age_files.Joined(ahead, source.stream)
    if source.file_range and isinstance(target, io.BufferedWriter):
        rest = source.stream
        begin = rest.seek(-len(ahead), io.SEEK_CUR)
        target.flush()
        for copied in copied_in_kernel(FileRange(fd, before.st_size - begin, begin), target.fileno()):
            done += copied
            line.show("copying", done, source.size)
        rest.seek(begin + done)
    while part := age_files.exactly(rest, COPY_BYTES):
        done += target.write(part)
        line.show("copying", done, source.size)
    after = os.fstat(fd)
    if source.file_range and (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InvalidRequest("The source changed while it was copied; try again when no program writes to it")


def _report(source: Path, target: Path, answer: EncryptOut) -> None:
    key = {"key_id": answer.key_id, "key_version": answer.key_version, "backend": answer.backend}
    if not terminal.printed_as_json({"source": name_of(source), "output": str(target), **key}):
        terminal.say(
            f"rewrapped {name_of(source)} to {target} (key {answer.key_id}, version {answer.key_version})"
        )
