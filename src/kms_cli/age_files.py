"""Encrypts and decrypts age files with local age keys, without a service; reads age key files.

Passphrases and SSH keys are left to stock ``age``.
"""

import contextlib
import io
import os
import re
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import click

from kms_cli import terminal
from kms_cli.options import STDIO
from kms_core.age import armor, header, mlkem768x25519, stream
from kms_core.age.armor import VERSION_LINE, ArmorWriter
from kms_core.age.header import FILE_KEY_BYTES, FILE_LIMITS, Header, Stanza, is_age_file
from kms_core.age.recipients import Identity, Recipient, key_lines, parse_identity, parse_recipient
from kms_core.age.x25519 import NoMatch
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import DEFAULT_KEY_ID, DEFAULT_TENANT, KeyRef, version_of
from kms_core.envelope.sealing import PAD_FROM_BYTES, Sealing
from kms_core.payload import parallel, streaming
from kms_core.payload.files import FileRange, FileWriter, source_changed_error
from kms_core.payload.parallel import ParallelOptions
from kms_core.payload.streaming import RangeReader
from kms_core.secure_files import in_shell, open_to_others
from kms_protocol import small_files
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed, InvalidRequest, NotACiphertext, TooLarge
from kms_protocol.wire import KEY_ID_PATTERN

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LOOK_BYTES: Final = 2048
START_BYTES: Final = FILE_LIMITS.header_bytes + header.NONCE_BYTES
"""The most bytes before the chunks of a file."""
BACKEND: Final = "age"
_PEM: Final = "-----BEGIN "
_PLUGIN_RECIPIENT: Final = re.compile(
    r"age1[^1]+1"
)  # Bech32 data has no 1, so the name of a plugin precedes it


@dataclass(frozen=True, slots=True)
class InputStream:
    """An input. ``file_range`` is its remainder in a regular file, which threads can read."""

    stream: io.RawIOBase
    file_range: FileRange | None

    @property
    def size(self) -> int | None:
        return self.file_range.size if self.file_range else None


class Joined(io.RawIOBase):
    """A stream with the bytes that were read ahead of it."""

    def __init__(self, ahead: bytes, rest: io.RawIOBase) -> None:
        super().__init__()
        self._ahead = memoryview(ahead)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._rest.fileno()

    def readinto(self, buffer: "WriteableBuffer", /) -> int | None:
        if not self._ahead:
            return self._rest.readinto(buffer)
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._ahead))
        target[:size], self._ahead = self._ahead[:size], self._ahead[size:]
        return size


@contextlib.contextmanager
def source(path: Path) -> Iterator[InputStream]:
    """Open an input; ``-`` is stdin. An empty file is read as a pipe, since files in /proc have size 0."""
    if path == STDIO and sys.stdin.isatty():
        terminal.say("reading from the terminal, end with Ctrl-D")
    with io.FileIO(sys.stdin.fileno(), closefd=False) if path == STDIO else io.FileIO(str(path)) as stream:
        status = os.fstat(stream.fileno())
        at = stream.tell() if stat.S_ISREG(status.st_mode) else 0
        whole = stat.S_ISREG(status.st_mode) and status.st_size > at
        yield InputStream(stream, FileRange(stream.fileno(), status.st_size - at, at) if whole else None)


def unarmored(given: InputStream) -> InputStream:
    """Return the age file in an input, without its armor if it has one. Raises NotACiphertext."""
    start, rest = exactly(given.stream, LOOK_BYTES), given.stream
    if given.file_range:
        rest.seek(-len(start), io.SEEK_CUR)
    else:
        rest = Joined(start, rest)
    if start.startswith(VERSION_LINE):
        return InputStream(rest, given.file_range)
    if not start.lstrip().startswith(armor.BEGIN):
        raise NotACiphertext("Neither an age file nor an armored one")
    return InputStream(armor.ArmorReader(rest), None)


def new_file(target: BinaryIO) -> FileWriter | None:
    """Return the file of an output, which threads can write; None for stdout, pipes and devices."""
    is_file = isinstance(target, io.BufferedWriter) and stat.S_ISREG(os.fstat(target.fileno()).st_mode)
    return FileWriter(target.fileno()) if is_file else None


def exactly(stream: io.RawIOBase, size_bytes: int) -> bytes:
    """Read ``size_bytes``, fewer at the end. Raises BlockingIOError for a stream in non-blocking mode."""
    parts: list[bytes] = []
    while size_bytes:
        part = stream.read(size_bytes)
        if part is None:
            raise BlockingIOError("the stream is not in blocking mode")
        if not part:
            break
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)


def with_progress(meter: terminal.Meter, label: str, total_bytes: int | None) -> ParallelOptions:
    """Return options that show progress in ``meter``. Threads may report it."""
    lock = threading.Lock()
    done_bytes = 0

    def advance(size_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += size_bytes
            meter.show(label, done_bytes, total_bytes)

    return ParallelOptions(progress=advance)


@dataclass(frozen=True, slots=True)
class Identities:
    """Private keys with the interface of a backend (``sealing.Wrapper``).

    ``native`` is by key version, in the order of the files; the last one encrypts.
    """

    native: Mapping[str, Identity] = field(default_factory=dict, repr=False)

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        """Return a native stanza. The AAD is ignored: the origin stanza binds it."""
        del aad
        return self._named(key).recipient.wrap(file_key)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        """Return the 16-byte file key. Raises NoMatch for an unknown version or a stanza of another key."""
        if stanza.type == binding.WRAP:
            return binding.open_age_wrap(self._named(key).secret, stanza, key, aad)
        return self._named(key).unwrap(stanza)

    def origin_key(self, key: KeyRef) -> bytes:
        """Return the MAC key of the origin stanza."""
        return binding.origin_key(self._named(key).secret)

    def _named(self, key: KeyRef) -> Identity:
        if key.backend != BACKEND or key.version not in self.native:
            raise NoMatch
        return self.native[key.version]


def identities(paths: Iterable[Path]) -> Identities:
    """Read age identity files. Raises InvalidRequest, naming the invalid line."""
    native: dict[str, Identity] = {}
    for path in paths:
        text = _text(path)
        if is_age_file(text.encode()):
            raise InvalidRequest(
                f"{path} is itself encrypted: run `age -d -o KEYFILE {path}` and use KEYFILE"
            )
        if text.startswith(_PEM):
            raise InvalidRequest(f"{path} is no age key; SSH keys: `age -d -i {in_shell(path)}`")
        for identity in parse_identities(path, text):
            version = version_of(identity.recipient)
            native.pop(version, None)  # the last one encrypts
            native[version] = identity
        if open_to_others(path):
            terminal.say(f"warning: {path} can be read by others: run chmod 600 {in_shell(path)}")
    return Identities(native)


def recipients(given: Iterable[str], paths: Iterable[Path]) -> list[Recipient]:
    """Read recipients, each once. Raises InvalidRequest, and UsageError for a post-quantum mix."""
    found = [_recipient(text, "-r") for text in given]
    for path in paths:
        listed = [_recipient(line, f"Line {number} of {path}") for number, line in key_lines(_text(path))]
        if not listed:
            raise InvalidRequest(f"{path} contains no recipient")
        found += listed
    if len({isinstance(recipient, mlkem768x25519.HybridRecipient) for recipient in found}) > 1:
        raise click.UsageError(
            "post-quantum and classic recipients do not mix: the file would be as weak as the classic ones",
        )
    return list({str(recipient): recipient for recipient in found}.values())


def check_key_id(key_id: str | None) -> None:
    """Raise InvalidRequest for an option that is given and no key id."""
    if key_id is not None and not re.fullmatch(KEY_ID_PATTERN, key_id):
        raise InvalidRequest("A key id is 1 to 80 of A-Z a-z 0-9 _ . -")


def _text(path: Path) -> str:
    try:
        return small_files.text(path)
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"{path} is not text") from exc


def parse_identities(path: Path, text: str) -> list[Identity]:
    """Read the content of an age identity file. Raises InvalidRequest, naming the invalid line."""
    found = []
    for number, line in key_lines(text):
        try:
            found.append(parse_identity(line))
        except ValueError as exc:
            raise InvalidRequest(f"Line {number} of {path} is not an age identity ({exc})") from exc
    if not found:
        raise InvalidRequest(f"{path} contains no identity")
    return found


def _recipient(text: str, where: str) -> Recipient:
    try:
        return parse_recipient(text)
    except ValueError as exc:
        if _PLUGIN_RECIPIENT.match(text):
            raise InvalidRequest(f"{where} is a plugin recipient: use `age -r`") from exc
        raise InvalidRequest(f"{where} is not an age recipient ({exc})") from exc


class NotForThese(DecryptFailed):
    """No identity or passphrase decrypts the file, or its header was changed."""

    hint = "`kms inspect FILE` shows what it was encrypted for"


class NotAsBound(DecryptFailed):
    """The file is bound to another context or origin, or its header was changed."""

    hint = "give exactly the --context it was encrypted with; --break-glass skips the check"


class Damaged(DecryptFailed):
    """An authentic header and a damaged payload. The written plaintext is authentic but incomplete."""

    summary = "The file is damaged: it was truncated or changed after it was encrypted"
    hint = "restore it from its source"


class HeaderTooLarge(TooLarge):
    """A header above the limit, valid or not."""

    hint = "if you trust the file, decrypt it with the age command"


@dataclass(frozen=True, slots=True)
class AgeFile:
    """An age file without armor, with its parsed header.

    ``payload`` is the rest of it, which can be read once; ``file_range`` the same in a regular file.
    ``whole`` is the file from its first byte, to be read in place of ``payload``.
    """

    head: Header
    payload: Joined
    file_range: FileRange | None
    whole: InputStream


@dataclass(frozen=True, slots=True)
class RequiredBinding:
    """The context that a file must be bound to. Without ``checked``, context and origin are not checked.

    ``tenant`` is bound too; without ``checked`` only files without native stanzas need it.
    """

    context: Context = field(default_factory=Context, repr=False)
    checked: bool = True
    tenant: str = DEFAULT_TENANT


def read(given: InputStream) -> AgeFile:
    """Read a header, armored or not. Raises NotACiphertext, HeaderTooLarge, DecryptFailed."""
    given = unarmored(given)
    start = exactly(given.stream, START_BYTES)
    try:
        head = header.parse(start, FILE_LIMITS)
    except TooLarge as exc:
        raise HeaderTooLarge(exc.detail) from exc
    at = head.payload_offset
    payload_range = given.file_range and given.file_range.tail(at)
    whole = InputStream(Joined(start, given.stream), None)
    return AgeFile(head, Joined(start[at:], given.stream), payload_range, whole)


def by_identities(head: Header, identities: Identities, required: RequiredBinding) -> bytes:
    """Return the payload key after checking MAC, context and origin. Raises NotForThese, NotAsBound."""
    if any(stanza.type == sealing.SCRYPT for stanza in head.stanzas):
        raise NotForThese("The file is encrypted with a passphrase: use `age -d`")
    bound = binding.read(head.stanzas) if required.checked else None
    if bound is not None:
        key = KeyRef(required.tenant, bound.key_id, bound.key_version, BACKEND)
        file_key = _bound_file_key(head, identities, key, required)
        return stream.payload_key(file_key, head.nonce)
    if required.context:
        raise NotAsBound("The file is not bound to a context: leave out --context")
    keys = [KeyRef(DEFAULT_TENANT, DEFAULT_KEY_ID, version, BACKEND) for version in identities.native]
    try:
        if any(stanza.args[:2] == (binding.WRAP, BACKEND) for stanza in head.stanzas):
            file_key = _unchecked_file_key(head, identities, required.tenant)
        else:
            file_key, _ = sealing.foreign_file_key(head, identities, keys)
    except NotForThese:
        raise
    except DecryptFailed as exc:
        raise NotForThese("None of the identities decrypts the file, or its header is damaged") from exc
    return stream.payload_key(file_key, head.nonce)


def _unchecked_file_key(head: Header, identities: Identities, tenant: str) -> bytes:
    """Unwrap a file that has no native stanza and check its MAC only. Raises DecryptFailed, NotForThese."""
    bound = binding.read(head.stanzas)
    wraps = [wrap for wrap in bound.wraps if wrap.backend == BACKEND] if bound else []
    if not bound or not wraps:
        raise DecryptFailed
    key = KeyRef(tenant, wraps[0].key_id, wraps[0].version, BACKEND)
    try:
        return sealing.unwrap_unchecked(head, identities, key, bound)
    except NoMatch:
        raise
    except DecryptFailed as exc:
        raise NotForThese(f"The file is not of the tenant {tenant} (--tenant), or was changed") from exc


def _bound_file_key(head: Header, identities: Identities, key: KeyRef, required: RequiredBinding) -> bytes:
    if key.version not in identities.native:
        raise NotForThese(
            f"The file names key version {key.version}, and none of the identities is this version"
        )
    try:
        file_key = sealing.unwrap_file(head, identities, key, context=required.context).file_key
    except NoMatch as exc:
        raise NotForThese("None of the identities decrypts the file") from exc
    except DecryptFailed as exc:
        raise NotAsBound from exc
    limit = required.context.not_after()
    if limit is not None and datetime.now(UTC) > limit:
        raise NotAsBound("The time of not_after in its context has passed")
    return file_key


# -- the payload -------------------------------------------------------------------------------------


def release(sealed: AgeFile, key: bytes, target: BinaryIO, options: ParallelOptions) -> None:
    """Write the plaintext; to a pipe only authenticated chunks, in order. Raises Damaged."""
    file = new_file(target)
    with damaged_errors():
        if sealed.file_range and file:
            parallel.open_file(key, sealed.file_range, file, options)
        else:
            streaming.open_pipe(key, sealed.payload, target, options)


def release_part(
    file_range: FileRange, key: bytes, target: BinaryIO, offset: int, length: int | None
) -> None:
    """Write a range of the plaintext, without a length up to the end. Raises Damaged.

    Only its chunks and the last one are read.
    """
    stop = None if length is None else offset + length
    with damaged_errors():
        target.writelines(RangeReader(key, file_range).slabs(offset, stop))


@contextlib.contextmanager
def damaged_errors() -> Iterator[None]:
    """Convert DecryptFailed, of a payload whose header is authentic, to Damaged."""
    try:
        yield
    except DecryptFailed as exc:
        raise Damaged from exc


# -- encryption ---------------------------------------------------------------------------------------


def for_recipients(recipients: Sequence[Recipient]) -> Sealing:
    """Begin an age file for recipients. Raises InvalidRequest if its header would exceed 256 KiB."""
    file_key = os.urandom(FILE_KEY_BYTES)
    stanzas = [recipient.wrap(file_key) for recipient in recipients]
    begun = Sealing(header.render(stanzas, file_key), os.urandom(header.NONCE_BYTES), file_key)
    if len(begun.header) > FILE_LIMITS.header_bytes or len(recipients) > FILE_LIMITS.stanzas:
        raise InvalidRequest(f"{len(recipients)} recipients exceed the limit of a header")
    return begun


def for_service(identities: Identities, key_id: str, context: Context, *, padded: bool) -> Sealing:
    """Begin a file as the Age backend of the service does, with the last of these identities.

    Raises InvalidContext for an invalid ``not_after``.
    """
    context.not_after()  # raises now rather than at decryption
    key = KeyRef(DEFAULT_TENANT, key_id, list(identities.native)[-1], BACKEND)
    return sealing.begin([(identities, key)], context, padded=padded)


def for_wrapped(wrap: bytes, file_key: bytes, *, padded: bool) -> Sealing:
    """Begin a file whose 16-byte file key a service wrapped as ``wrap``, a stanza as text.

    The stanzas of a bundle stand for themselves, as in files that the service writes. Raises DecryptFailed
    and TooLarge for what is no stanza.
    """
    stanzas = header.unbundled(header.parse_stanzas(wrap, FILE_LIMITS), FILE_LIMITS)
    return sealing.with_stanzas(stanzas, file_key, os.urandom(header.NONCE_BYTES), padded=padded)


def seal_armored(begun: Sealing, given: InputStream, target: BinaryIO, options: ParallelOptions) -> None:
    """Write head and payload in ASCII armor."""
    writer = ArmorWriter(target)
    writer.write(begun.head)
    streaming.seal_pipe(begun.payload_key, given.stream, writer, options)
    writer.finish()


def seal(begun: Sealing, given: InputStream, target: BinaryIO, options: ParallelOptions) -> None:
    """Write head and payload, by threads between files. Raises InvalidRequest if the source changes."""
    file = new_file(target)
    if given.file_range and file:
        parallel.seal_file(begun.payload_key, given.file_range, file, begun.head, options)
        return
    target.write(begun.head)
    size_bytes = streaming.seal_pipe(begun.payload_key, given.stream, target, options)
    if given.size is not None and size_bytes < given.size:
        raise source_changed_error()


def is_large(given: InputStream) -> tuple[bool, InputStream]:
    """Return whether an input has 1 MiB or more, which pads the header, and the input to read from."""
    if given.file_range:
        return given.file_range.size >= PAD_FROM_BYTES, given
    ahead = exactly(given.stream, PAD_FROM_BYTES)
    return len(ahead) >= PAD_FROM_BYTES, InputStream(Joined(ahead, given.stream), None)
