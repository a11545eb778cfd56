"""``kms rewrap-file``: a new header through the service; the payload is copied here and never sent."""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final, TypedDict, Unpack

import click

from kms_cli import terminal
from kms_cli.atomic_file import OutputExists, placed
from kms_cli.options import context_of, context_option, force_option, key_option
from kms_cli.progress import Meter
from kms_cli.remote_service import connect
from kms_cli.session import session
from kms_client.problems import UnexpectedAnswer
from kms_core.age import header
from kms_core.age.armor import BEGIN
from kms_core.age.header import FILE_LIMITS, Header
from kms_core.envelope import binding
from kms_core.payload import disk
from kms_protocol.errors import BadInput, DecryptFailed, InvalidRequest, NotACiphertext
from kms_protocol.wire import ContextIn, EncryptOut

STEP_BYTES: Final = 64 * 1024 * 1024
PIECE_BYTES: Final = 1024 * 1024
NOT_BY_KERNEL: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


class Rewrap(TypedDict):
    """What ``kms rewrap-file`` is given."""

    source: Path
    output: Path | None
    context: ContextIn
    new_context: ContextIn
    key_id: str | None
    force: bool


@click.command(
    "rewrap-file",
    short_help="Move a file to the current key, another, or another context.",
    epilog="Example: kms rewrap-file --context env=dev --new-context env=prod -o new.enc old.enc",
)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here."
)
@context_option
@click.option("--new-context", callback=context_of, help="Bind this instead; without it the old one stays.")
@key_option
@force_option
def rewrap_file_command(**given: Unpack[Rewrap]) -> None:
    """Give SOURCE a new header, under the current version of its key or under --key-id.

    Only the header is sent to the service. The payload stays as it is, and whoever could read the old file
    can read the new one. Without --output, --force puts the result in the place of SOURCE.
    """
    source = given["source"]
    if given["output"] is None and not given["force"]:
        raise OutputExists(f"Without --output the result would replace {source}")
    target = given["output"] or source.resolve()
    with source.open("rb", buffering=0) as file:
        old = _head(source, file.fileno())
        answer = _asked(os.pread(file.fileno(), old.payload_offset, 0), given)
        new = _checked(answer, old)
        with placed(target, overwrite=given["force"]) as written, Meter() as meter:
            if given["output"] is None:
                _keep_access(file.fileno(), written.fileno())
            _write(file.fileno(), written, old, answer.ciphertext[: new.size], meter=meter)
    _report(source, target, answer)


def _head(source: Path, fd: int) -> Header:
    try:
        return header.read(fd, FILE_LIMITS)
    except NotACiphertext as exc:
        if os.pread(fd, len(BEGIN), 0) == BEGIN:
            raise NotACiphertext(f"{source} is armored: only a binary file has a header to replace") from exc
        raise


def _asked(head: bytes, given: Rewrap) -> EncryptOut:
    with connect() as kms:
        return kms.rewrap(
            head, context=given["context"], new_context=given["new_context"], key_id=given["key_id"]
        )


def _checked(answer: EncryptOut, old: Header) -> Header:
    """The new header. UnexpectedAnswer unless it is one of the same payload, for the key that was named."""
    try:
        new = header.parse(answer.ciphertext, FILE_LIMITS)
        bound = binding.read(new)
    except (DecryptFailed, BadInput) as exc:
        raise UnexpectedAnswer("The service answered with something that is not a header") from exc
    fits = new.nonce == old.nonce and new.payload_offset == len(answer.ciphertext)
    if not fits or bound is None or (bound.key_id, bound.key_version) != (answer.key_id, answer.key_version):
        raise UnexpectedAnswer("The service answered with the header of another file")
    return new


def _write(fd: int, written: BinaryIO, old: Header, new: bytes, *, meter: Meter) -> None:
    """The new header and what follows the old one. Raises InvalidRequest if the source changes meanwhile."""
    before = os.fstat(fd)
    total = before.st_size - old.size
    target_fd, done = written.fileno(), 0
    disk.write_all(target_fd, memoryview(new), 0)
    while done < total:
        copied = _copy(fd, target_fd, total - done, old.size + done, len(new) + done)
        if not copied:
            break
        done += copied
        meter.show("copying", done, total)
    after = os.fstat(fd)
    if done < total or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InvalidRequest("The source changed while it was copied; try again when nothing writes to it")


def _copy(fd: int, target_fd: int, size: int, at: int, target_at: int) -> int:
    """Copy some bytes, inside the kernel (shared, not copied, where the file system can) if it will."""
    try:
        if copied := os.copy_file_range(fd, target_fd, min(size, STEP_BYTES), at, target_at):
            return copied
    except OSError as exc:
        if exc.errno not in NOT_BY_KERNEL:
            raise
    piece = os.pread(fd, min(size, PIECE_BYTES), at)
    disk.write_all(target_fd, memoryview(piece), target_at)
    return len(piece)


def _keep_access(fd: int, target_fd: int) -> None:
    """A file that takes the place of another is for the same users."""
    old = os.fstat(fd)
    with contextlib.suppress(PermissionError):
        os.fchown(target_fd, old.st_uid, old.st_gid)
    os.fchmod(target_fd, stat.S_IMODE(old.st_mode))


def _report(source: Path, target: Path, answer: EncryptOut) -> None:
    if session().as_json:
        key = {"key_id": answer.key_id, "key_version": answer.key_version, "backend": answer.backend}
        terminal.record({"source": str(source), "output": str(target), **key}, as_json=True)
    else:
        terminal.say(f"rewrapped {source} to {target} (key {answer.key_id}, version {answer.key_version})")
