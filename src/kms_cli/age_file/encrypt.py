"""Age files made with keys at hand, without a service; knows no command line and no key file."""

import os
from collections.abc import Sequence

from kms_cli.age_file.keys import Identities
from kms_cli.age_file.streams import InputStream, Joined, OutputStream, exactly
from kms_core.age import header, scrypt, stream
from kms_core.age.armor import ArmorWriter
from kms_core.age.header import FILE_KEY_BYTES, FILE_LIMITS, Stanza
from kms_core.age.recipients import Recipient
from kms_core.envelope import sealing
from kms_core.envelope.sealing import PAD_FROM_BYTES, Sealing
from kms_core.payload import parallel, streaming
from kms_core.payload.files import FileWriter
from kms_core.payload.parallel import ParallelOptions
from kms_protocol.context import Context
from kms_protocol.errors import InvalidRequest


def for_recipients(recipients: Sequence[Recipient]) -> Sealing:
    """A stock age file. Raises InvalidRequest above what our own readers take as a header (256 KiB)."""
    file_key = os.urandom(FILE_KEY_BYTES)
    begun = _stock(file_key, [recipient.wrap(file_key) for recipient in recipients])
    if len(begun.header) > FILE_LIMITS.header_bytes or len(recipients) > FILE_LIMITS.stanzas:
        raise InvalidRequest(f"{len(recipients)} recipients make a header above the limit of readers")
    return begun


def for_passphrase(passphrase: str) -> Sealing:
    """A stock age file under scrypt; takes some 0.9 s and 256 MiB."""
    file_key = os.urandom(FILE_KEY_BYTES)
    return _stock(file_key, [scrypt.wrap(file_key, passphrase)])


def for_service(identities: Identities, key_id: str, context: Context, *, padded: bool) -> Sealing:
    """A file as the service's Age backend makes it with the last of these identities.

    Raises InvalidContext if its ``not_after`` is no time.
    """
    context.not_after()  # refused now rather than when it is opened
    key = identities.ref(list(identities.native)[-1], key_id)
    return sealing.begin(identities, key, context, padded=padded)


def seal_armored(begun: Sealing, given: InputStream, target: OutputStream, pace: ParallelOptions) -> None:
    """As ``seal``, as text."""
    writer = ArmorWriter(target.writer)
    writer.write(begun.head)
    streaming.seal_pipe(begun.payload_key, given.stream, writer, pace)
    writer.finish()


def seal(begun: Sealing, given: InputStream, target: OutputStream, pace: ParallelOptions) -> None:
    """Write head and payload; by threads from file to file. Raises InvalidRequest if the source changes."""
    if given.extent and target.fd is not None:
        onto = FileWriter(target.fd)
        onto.write_at(memoryview(begun.head), 0)
        parallel.seal_file(begun.payload_key, given.extent, onto, len(begun.head), pace)
        return
    target.writer.write(begun.head)
    streaming.seal_pipe(begun.payload_key, given.stream, target.writer, pace)


def is_large(given: InputStream) -> tuple[bool, InputStream]:
    """Whether it has 1 MiB or more, which pads the header; and the source, into which was looked ahead."""
    if given.extent:
        return given.extent.size >= PAD_FROM_BYTES, given
    ahead = exactly(given.stream, PAD_FROM_BYTES)
    return len(ahead) >= PAD_FROM_BYTES, InputStream(Joined(ahead, given.stream), None)


def _stock(file_key: bytes, stanzas: Sequence[Stanza]) -> Sealing:
    nonce = os.urandom(stream.NONCE)
    return Sealing(header.render(stanzas, file_key), nonce, stream.payload_key(file_key, nonce))
