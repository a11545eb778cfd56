"""Encrypts and decrypts age files with local age keys, without a service.

Passphrases and SSH keys are left to stock ``age``.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import BinaryIO, Final

from kms_cli.age_file.keys import BACKEND, Identities
from kms_cli.age_file.streams import InputStream, Joined, exactly, new_file, unarmored
from kms_core.age import header, stream
from kms_core.age.armor import ArmorWriter
from kms_core.age.header import FILE_KEY_BYTES, FILE_LIMITS, Header
from kms_core.age.recipients import Recipient
from kms_core.age.x25519 import NoMatch
from kms_core.envelope import binding, sealing
from kms_core.envelope.sealing import PAD_FROM_BYTES, Sealing
from kms_core.payload import parallel, streaming
from kms_core.payload.files import FileRange
from kms_core.payload.parallel import ParallelOptions
from kms_core.payload.streaming import RangeReader
from kms_protocol.context import Context
from kms_protocol.errors import DecryptFailed, InvalidRequest, TooLarge

_START_BYTES: Final = FILE_LIMITS.header_bytes + header.NONCE_BYTES


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
    """

    head: Header
    payload: Joined
    file_range: FileRange | None


@dataclass(frozen=True, slots=True)
class RequiredBinding:
    """The context that a file must be bound to. Without ``checked``, context and origin are not checked.

    ``tenant`` is bound too; without ``checked`` only files without native stanzas need it.
    """

    context: Context = field(default_factory=Context, repr=False)
    checked: bool = True
    tenant: str = binding.DEFAULT_TENANT


def read(given: InputStream) -> AgeFile:
    """Read a header, armored or not. Raises NotACiphertext, HeaderTooLarge, DecryptFailed."""
    given = unarmored(given)
    start = exactly(given.stream, _START_BYTES)
    try:
        head = header.parse(start, FILE_LIMITS)
    except TooLarge as exc:
        raise HeaderTooLarge(exc.detail) from exc
    at = head.payload_offset
    return AgeFile(head, Joined(start[at:], given.stream), given.file_range and given.file_range.tail(at))


def by_identities(head: Header, identities: Identities, required: RequiredBinding) -> bytes:
    """Return the payload key after checking MAC, context and origin. Raises NotForThese, NotAsBound."""
    if any(stanza.type == sealing.SCRYPT for stanza in head.stanzas):
        raise NotForThese("The file is encrypted with a passphrase: use `age -d`")
    bound = binding.read(head) if required.checked else None
    if bound is not None:
        key = identities.ref(bound.key_version, bound.key_id, required.tenant)
        file_key = _bound_file_key(head, identities, key, required)
        return stream.payload_key(file_key, head.nonce)
    if required.context:
        raise NotAsBound("The file is not bound to a context: leave out --context")
    keys = [identities.ref(version) for version in identities.native]
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
    bound = binding.read(head)
    wraps = [wrap for wrap in bound.wraps if wrap.backend == BACKEND] if bound else []
    if not bound or not wraps:
        raise DecryptFailed
    key = identities.ref(wraps[0].version, wraps[0].key_id, tenant)
    try:
        return sealing.unwrapped(head, identities, key, bound)
    except NoMatch:
        raise
    except DecryptFailed as exc:
        raise NotForThese(f"The file is not of the tenant {tenant} (--tenant), or was changed") from exc


def _bound_file_key(
    head: Header, identities: Identities, key: binding.KeyRef, required: RequiredBinding
) -> bytes:
    if key.version not in identities.native:
        raise NotForThese(
            f"The file names key version {key.version}, and none of the identities is this version"
        )
    try:
        file_key = sealing.file_key_of(head, identities, key, context=required.context)
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
    with _damaged():
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
    with _damaged():
        target.writelines(RangeReader(key, file_range).slabs(offset, stop))


@contextmanager
def _damaged() -> Iterator[None]:
    try:
        yield
    except DecryptFailed as exc:
        raise Damaged from exc


# -- encryption ---------------------------------------------------------------------------------------


def for_recipients(recipients: Sequence[Recipient]) -> Sealing:
    """Begin an age file for recipients. Raises InvalidRequest if its header would exceed 256 KiB."""
    file_key = os.urandom(FILE_KEY_BYTES)
    stanzas = [recipient.wrap(file_key) for recipient in recipients]
    begun = Sealing(header.render(stanzas, file_key), os.urandom(stream.NONCE), file_key)
    if len(begun.header) > FILE_LIMITS.header_bytes or len(recipients) > FILE_LIMITS.stanzas:
        raise InvalidRequest(f"{len(recipients)} recipients exceed the limit of a header")
    return begun


def for_service(identities: Identities, key_id: str, context: Context, *, padded: bool) -> Sealing:
    """Begin a file as the Age backend of the service does, with the last of these identities.

    Raises InvalidContext for an invalid ``not_after``.
    """
    context.not_after()  # raises now rather than at decryption
    key = identities.ref(list(identities.native)[-1], key_id)
    return sealing.begin([(identities, key)], context, padded=padded)


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
    streaming.seal_pipe(begun.payload_key, given.stream, target, options)


def is_large(given: InputStream) -> tuple[bool, InputStream]:
    """Return whether an input has 1 MiB or more, which pads the header, and the input to read from."""
    if given.file_range:
        return given.file_range.size >= PAD_FROM_BYTES, given
    ahead = exactly(given.stream, PAD_FROM_BYTES)
    return len(ahead) >= PAD_FROM_BYTES, InputStream(Joined(ahead, given.stream), None)
