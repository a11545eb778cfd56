"""What ``Kms`` answers with: bytes and the key that they have to do with. Secrets are in no ``repr``."""

from dataclasses import dataclass, field
from typing import Literal

from kms_core.age import stream
from kms_core.envelope.binding import KeyRef

Origin = Literal["service", "foreign"]


@dataclass(frozen=True, slots=True)
class Sealed:
    """A ciphertext and the key that seals it."""

    ciphertext: bytes = field(repr=False)
    key: KeyRef


@dataclass(frozen=True, slots=True)
class Opened:
    """A plaintext, the key that opened it, and whether this service made the file."""

    plaintext: bytes = field(repr=False)
    key: KeyRef
    origin: Origin


@dataclass(frozen=True, slots=True)
class DataKey:
    """Random bytes and the same bytes sealed."""

    plaintext: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)
    key: KeyRef


@dataclass(frozen=True, slots=True)
class WrappedFileKey:
    """A file key wrapped for a header that somebody else writes: one stanza, as text."""

    stanza: bytes
    key: KeyRef


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """The secrets of one file, for the job layer, which moves payloads that do not fit in memory."""

    file_key: bytes = field(repr=False)
    nonce: bytes = field(repr=False)
    key: KeyRef
    origin: Origin

    @property
    def payload_key(self) -> bytes:
        return stream.payload_key(self.file_key, self.nonce)


@dataclass(frozen=True, slots=True)
class KeyVersionStatus:
    """What a header says of its key; ``key_version`` is empty where the backend knows no such version."""

    key_id: str
    key_version: str
    newest: bool
