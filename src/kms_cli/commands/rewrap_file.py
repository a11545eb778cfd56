"""``kms rewrap-file``: a new header by the service. The payload is copied on this machine, never sent."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, TypedDict, Unpack

import click

from kms_cli import terminal
from kms_cli.age_file import streams
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
    placed,
    source_argument,
    writing,
)
from kms_cli.session import connect, meter, printed_as_json
from kms_client.problems import UnexpectedAnswer
from kms_core.age import header
from kms_core.age.armor import BEGIN
from kms_core.age.header import FILE_LIMITS, Header
from kms_core.envelope import binding
from kms_core.payload import files
from kms_protocol.errors import BadInput, DecryptFailed, InvalidRequest, NotACiphertext
from kms_protocol.wire import ContextIn, EncryptOut

KERNEL_COPY_BYTES: Final = 64 * 1024 * 1024
COPY_BYTES: Final = 1024 * 1024
NO_KERNEL_COPY: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


class Rewrap(TypedDict):
    """Options of ``kms rewrap-file``."""

    source: Path
    output: Path | None
    context: ContextIn
    new_context: ContextIn
    key_id: str | None
    force: bool


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
def rewrap_file_command(**given: Unpack[Rewrap]) -> None:
    """Rewrap SOURCE under the current version of its key, or under --key-id.

    Only the header is sent to the service. The payload is not changed: anyone who could read the old file can
    read the new one. Without --output, --force replaces SOURCE.

    The SOURCE - is stdin, and its output is stdout.
    """
    source = given["source"]
    if STDIO in {source, given["output"]}:
        _piped(source, given)
        return
    if given["output"] is None and not given["force"]:
        raise OutputExists(f"Without --output the result would replace {source}")
    target = given["output"] or source.resolve()
    with source.open("rb", buffering=0) as file:
        old = _head(source, file.fileno())
        answer = _rewrapped(os.pread(file.fileno(), old.payload_offset, 0), given)
        new = _checked(answer, old)
        with placed(target, overwrite=given["force"]) as written, meter() as line:
            if given["output"] is None:
                _keep_access(file.fileno(), written.fileno())
            _write(file.fileno(), written, old, answer.ciphertext[: new.size], line=line)
    _report(source, target, answer)


def _piped(source: Path, given: Rewrap) -> None:
    """Rewrap a stream, or to stdout. The payload is copied as it arrives."""
    if given["output"] is None:
        terminal.refuse_binary()
    with streams.source(source) as opened:
        start = streams.exactly(opened.stream, FILE_LIMITS.header_bytes + header.NONCE_BYTES)
        with _armor_named(name_of(source), start):
            old = header.parse(start, FILE_LIMITS)
        answer = _rewrapped(start[: old.payload_offset], given)
        new, to_stdout = _checked(answer, old), is_stdout(given["output"])
        with writing(given["output"], overwrite=given["force"]) as target, meter(on_stdout=to_stdout) as line:
            target.write(answer.ciphertext[: new.size])
            rest, done = streams.Joined(start[old.size :], opened.stream), 0
            while part := streams.exactly(rest, COPY_BYTES):
                done += target.write(part)
                line.show("copying", done, opened.size)
    if given["output"] and not to_stdout:
        _report(source, given["output"], answer)


def _head(source: Path, fd: int) -> Header:
    with _armor_named(name_of(source), os.pread(fd, len(BEGIN), 0)):
        return header.read(fd, FILE_LIMITS)


@contextlib.contextmanager
def _armor_named(name: str, start: bytes) -> Iterator[None]:
    try:
        yield
    except NotACiphertext as exc:
        if start.startswith(BEGIN):
            raise NotACiphertext(f"{name} is armored: only a binary file has a header to replace") from exc
        raise


def _rewrapped(head: bytes, given: Rewrap) -> EncryptOut:
    with connect() as kms:
        return kms.rewrap(
            head, context=given["context"], new_context=given["new_context"], key_id=given["key_id"]
        )


def _checked(answer: EncryptOut, old: Header) -> Header:
    """Return the new header. Raises UnexpectedAnswer unless it fits the payload and the named key."""
    try:
        new = header.parse(answer.ciphertext, FILE_LIMITS)
        bound = binding.read(new)
    except (DecryptFailed, BadInput) as exc:
        raise UnexpectedAnswer("The answer of the service is not a header") from exc
    fits = new.nonce == old.nonce and new.payload_offset == len(answer.ciphertext)
    if not fits or bound is None or (bound.key_id, bound.key_version) != (answer.key_id, answer.key_version):
        raise UnexpectedAnswer("The answer of the service is the header of another file")
    return new


def _write(fd: int, written: BinaryIO, old: Header, new: bytes, *, line: terminal.Meter) -> None:
    """Write the new header and the old payload. Raises InvalidRequest if the source changes."""
    before = os.fstat(fd)
    total = before.st_size - old.size
    target_fd, done = written.fileno(), 0
    files.write_all(target_fd, memoryview(new), 0)
    while done < total:
        copied = _copy(fd, target_fd, total - done, old.size + done, len(new) + done)
        if not copied:
            break
        done += copied
        line.show("copying", done, total)
    after = os.fstat(fd)
    if done < total or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InvalidRequest("The source changed while it was copied; try again when no program writes to it")


def _copy(fd: int, target_fd: int, size: int, at: int, target_at: int) -> int:
    """Copy some bytes, in the kernel if it can (as shared extents on some file systems)."""
    try:
        if copied := os.copy_file_range(fd, target_fd, min(size, KERNEL_COPY_BYTES), at, target_at):
            return copied
    except OSError as exc:
        if exc.errno not in NO_KERNEL_COPY:
            raise
    data = os.pread(fd, min(size, COPY_BYTES), at)
    files.write_all(target_fd, memoryview(data), target_at)
    return len(data)


def _keep_access(fd: int, target_fd: int) -> None:
    """Give the file the owner and mode of the file that it replaces."""
    old = os.fstat(fd)
    with contextlib.suppress(PermissionError):
        os.fchown(target_fd, old.st_uid, old.st_gid)
    os.fchmod(target_fd, stat.S_IMODE(old.st_mode))


def _report(source: Path, target: Path, answer: EncryptOut) -> None:
    key = {"key_id": answer.key_id, "key_version": answer.key_version, "backend": answer.backend}
    if not printed_as_json({"source": name_of(source), "output": str(target), **key}):
        terminal.say(
            f"rewrapped {name_of(source)} to {target} (key {answer.key_id}, version {answer.key_version})"
        )
