"""Age files opened with keys at hand, without a service; knows no command line and no key file.

Native stanzas and scrypt are read by our own code; files with ssh stanzas go to pyrage, once their header
is vetted and known to be small, since pyrage parses headers in quadratic time.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, cast

import pyrage

from kms_cli.age_file.keys import Identities
from kms_cli.age_file.streams import InputStream, Joined, OutputStream, exactly
from kms_core.age import armor, header, scrypt, stream
from kms_core.age.header import FILE_LIMITS, Header
from kms_core.age.x25519 import NoMatch
from kms_core.envelope import binding, sealing
from kms_core.payload import parallel, streaming
from kms_core.payload.files import FileRange, FileWriter
from kms_core.payload.parallel import ParallelOptions
from kms_core.payload.ranges import RangeReader
from kms_core.settings.model import LimitsSection
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed, TooLarge

LIMITS: Final = LimitsSection()
_AGE: Final = b"age-encryption.org/"
_SSH: Final = "ssh-"
_START_BYTES: Final = FILE_LIMITS.header_bytes + header.NONCE_BYTES


class NotForThese(DecryptFailed):
    """No identity or passphrase opens the file, or its header was changed."""

    hint = '"kms inspect FILE" shows what it was sealed for'


class NotAsBound(DecryptFailed):
    """The file is bound to another context or origin, or its header was changed."""

    hint = "give the --context it was sealed with, and no other; --break-glass opens it without a check"


class Damaged(DecryptFailed):
    """The header is authentic, the payload is not. What was released of it is genuine, and not all."""

    summary = "The file is damaged: it was cut or changed after it was sealed"
    hint = "get it again from where it was sealed"


class HeaderTooLarge(TooLarge):
    """Above what is read here, be it genuine or not."""

    hint = "if you trust the file, the age command opens it"


@dataclass(frozen=True, slots=True)
class AgeFile:
    """An age file out of its armor, its header read. ``extent`` is the payload, if in a regular file."""

    head: Header
    extent: FileRange | None
    start: bytes = field(repr=False)
    rest: io.RawIOBase = field(repr=False)

    @property
    def whole(self) -> Joined:
        """The file from its first byte on; it passes by once, as ``payload`` does."""
        return Joined(self.start, self.rest)

    @property
    def payload(self) -> Joined:
        """The file from its first chunk on."""
        return Joined(self.start[self.head.payload_offset :], self.rest)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a file must be bound to. Without ``checked`` any context and origin will do."""

    context: Context = field(default_factory=Context, repr=False)
    checked: bool = True


@dataclass(frozen=True, slots=True)
class PlaintextRange:
    """A range of the plaintext in bytes; up to the end without a length."""

    offset: int = 0
    length: int | None = None


def read(given: InputStream) -> AgeFile:
    """Read a header, armored or not. Raises NotACiphertext, HeaderTooLarge, DecryptFailed."""
    start, rest, extent = exactly(given.stream, _START_BYTES), given.stream, given.extent
    if not start.startswith(_AGE):
        rest, extent = armor.ArmorReader(cast("io.BufferedIOBase", Joined(start, rest))), None
        start = exactly(rest, _START_BYTES)
    try:
        head = header.parse(start, FILE_LIMITS)
    except TooLarge as exc:
        raise HeaderTooLarge(exc.detail) from exc
    at = head.payload_offset
    payload = extent and extent.tail(at)
    return AgeFile(head, payload, start, rest)


def needs_passphrase(head: Header) -> bool:
    """Whether it is a passphrase file; DecryptFailed if its stanza is not alone."""
    return scrypt.stanza_of(head.stanzas) is not None


def by_passphrase(head: Header, passphrase: str, max_work_factor: int) -> bytes:
    """The payload key. Raises NotForThese if the passphrase is wrong, DecryptFailed above the work factor."""
    try:
        file_key = scrypt.unwrap(head.stanzas[0], passphrase, max_work_factor)
    except NoMatch:
        raise NotForThese("The passphrase is wrong") from None
    except MemoryError:
        raise NotForThese("The passphrase's work factor asks for more memory than there is") from None
    head.check_mac(file_key)
    return stream.payload_key(file_key, head.nonce)


def by_identities(head: Header, identities: Identities, demand: Demand) -> bytes:
    """The payload key, after header MAC, context and origin. Raises NotForThese, NotAsBound."""
    bound = binding.read(head) if demand.checked else None
    if bound is not None:
        file_key = _bound_file_key(head, identities, identities.ref(bound.key_version, bound.key_id), demand)
        return stream.payload_key(file_key, head.nonce)
    if demand.context:
        raise NotAsBound("The file is bound to no context: open it without --context")
    keys = [identities.ref(version) for version in identities.native]
    try:
        file_key, _ = sealing.foreign_file_key(head, identities, keys)
    except DecryptFailed as exc:
        raise NotForThese("None of the identities opens the file, or its header is damaged") from exc
    return stream.payload_key(file_key, head.nonce)


def _bound_file_key(head: Header, identities: Identities, key: binding.KeyRef, demand: Demand) -> bytes:
    if key.version not in identities.native:
        raise NotForThese(f"The file names key version {key.version}, which none of the identities is")
    try:
        file_key = sealing.file_key_of(head, identities, key, context=demand.context)
    except NoMatch as exc:
        raise NotForThese("None of the identities opens the file") from exc
    except DecryptFailed as exc:
        raise NotAsBound from exc
    limit = demand.context.not_after()
    if limit is not None and datetime.now(UTC) > limit:
        raise NotAsBound("The time that its context sets in not_after is over")
    return file_key


# -- the payload -------------------------------------------------------------------------------------


def release(sealed: AgeFile, key: bytes, target: OutputStream, pace: ParallelOptions) -> None:
    """Write the plaintext; only genuine chunks and in order to a pipe. Raises Damaged."""
    with _damaged():
        if sealed.extent and target.fd is not None:
            parallel.open_file(key, sealed.extent, FileWriter(target.fd), pace=pace)
        else:
            streaming.open_pipe(key, sealed.payload, target.writer, pace)


def release_part(extent: FileRange, key: bytes, target: OutputStream, part: PlaintextRange) -> None:
    """Write a range, touching only its chunks and the last one; nothing beyond the end. Raises Damaged."""
    with _damaged():
        reader = RangeReader(key, extent.read_at, extent.size)
        stop = None if part.length is None else part.offset + part.length
        for slab in reader.slabs(part.offset, stop):
            target.writer.write(slab)


@contextmanager
def _damaged() -> Iterator[None]:
    try:
        yield
    except DecryptFailed as exc:
        raise Damaged from exc


# -- what only pyrage opens --------------------------------------------------------------------------


def is_for_ssh(head: Header, demand: Demand) -> bool:
    """Whether an ssh key may open it. pyrage cannot check what binds a file, so a bound one is not for it."""
    is_bound = demand.checked and binding.read(head) is not None
    return not is_bound and any(stanza.type.startswith(_SSH) for stanza in head.stanzas)


def release_by_ssh(sealed: AgeFile, identities: Identities, target: OutputStream) -> None:
    """As ``release``. Raises HeaderTooLarge above 8 KiB of header, NotForThese, Damaged."""
    if sealed.head.size > LIMITS.pyrage_header_bytes:
        raise HeaderTooLarge(
            f"The header is above {LIMITS.pyrage_header_bytes} bytes, the limit for ssh identities"
        )
    try:
        pyrage.decrypt_io(sealed.whole, target.writer, list(identities.ssh))
    except pyrage.DecryptError as exc:
        raise NotForThese("None of the ssh keys opens the file, or its header is damaged") from exc
    except OSError as exc:
        if exc.errno is None:  # pyrage's own: what fails below it has a number
            raise Damaged from exc
        raise
