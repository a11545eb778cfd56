"""Seals or opens one file with the envelope alone, as a program of its own; knows no settings or policy.

    python -m benchmarks.drive_kms {seal|open} IDENTITY_FILE SOURCE TARGET

``-`` is a standard stream; a ciphertext in a pipe must have the 4 KiB header of files of 1 MiB and more.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kms_core.age import header, stream
from kms_core.age.header import FILE_LIMITS, Header, Stanza
from kms_core.age.x25519 import X25519Identity
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.payload import parallel, streaming
from kms_core.payload.files import FileRange, FileWriter
from kms_protocol.context import Context

ITEM_BYTES: Final = 1024
KEY: Final = KeyRef("default", "default", "bench", "age")
CONTEXT: Final = Context.parse("env=bench")


@dataclass(frozen=True, slots=True)
class Local:
    """Wraps file keys for one identity, as the Age backend does."""

    identity: X25519Identity
    origin: bytes

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> Stanza:
        del key, aad
        return self.identity.recipient.wrap(file_key)

    def unwrap(self, stanza: Stanza, key: KeyRef, aad: bytes) -> bytes:
        del key, aad
        return self.identity.unwrap(stanza)

    def origin_key(self, key: KeyRef) -> bytes | None:
        del key
        return self.origin


def wrapper(identity_file: Path) -> Local:
    identity = X25519Identity.parse(identity_file.read_text().split()[-1])
    return Local(identity, binding.origin_key(identity.secret))


def file_key_of(head: Header, by: Local) -> bytes:
    """Of a file sealed here, or by stock age."""
    if binding.read(head.stanzas) is None:
        return sealing.foreign_file_key(head, by, [KEY])[0]
    return sealing.unwrap_file(head, by, KEY, context=CONTEXT).file_key


def seal(by: Local, source: str, target: str) -> None:
    if source == "-":
        begun = sealing.begin([(by, KEY)], CONTEXT, padded=True)
        with open(0, "rb", 0) as reader, open(1, "wb", 0) as writer:
            writer.write(begun.head)
            streaming.seal_pipe(begun.payload_key, reader, writer)
        return
    with Path(source).open("rb", 0) as reader, Path(target).open("wb", 0) as writer:
        size = os.fstat(reader.fileno()).st_size
        begun = sealing.begin([(by, KEY)], CONTEXT, padded=size >= sealing.PAD_FROM_BYTES)
        parallel.seal_file(
            begun.payload_key, FileRange(reader.fileno(), size), FileWriter(writer.fileno()), begun.head
        )


def seal_items(count: int) -> None:
    """So many items of a bulk job, and nothing but their sealing."""
    identity = X25519Identity.generate()
    by, plaintext = Local(identity, binding.origin_key(identity.secret)), os.urandom(ITEM_BYTES)
    for _ in range(count):
        sealing.seal(plaintext, [(by, KEY)], CONTEXT)


def open_(by: Local, source: str, target: str) -> None:
    if source == "-":
        with open(0, "rb", 0) as reader, open(1, "wb", 0) as writer:
            head = header.parse(reader.read(sealing.PADDED_HEADER_BYTES + header.NONCE_BYTES), FILE_LIMITS)
            streaming.open_pipe(stream.payload_key(file_key_of(head, by), head.nonce), reader, writer)
        return
    with Path(source).open("rb", 0) as reader, Path(target).open("wb", 0) as writer:
        sealed = FileRange(reader.fileno(), os.fstat(reader.fileno()).st_size)
        head = header.read_by(sealed.read_at, FILE_LIMITS)
        key = stream.payload_key(file_key_of(head, by), head.nonce)
        parallel.open_file(key, sealed.tail(head.payload_offset), FileWriter(writer.fileno()))


if __name__ == "__main__":
    {"seal": seal, "open": open_}[sys.argv[1]](wrapper(Path(sys.argv[2])), *sys.argv[3:])
