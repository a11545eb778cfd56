"""Results of ``Kms``: bytes and their key. No ``repr`` shows a secret."""

from dataclasses import dataclass, field
from typing import Literal

from kms_core.age import stream
from kms_core.envelope.binding import KeyRef

Origin = Literal["service", "foreign"]


@dataclass(frozen=True, slots=True)
class Sealed:
    """A ciphertext, empty if a file received it, the key that sealed it, and its id (``binding.file_id``)."""

    ciphertext: bytes = field(repr=False)
    key: KeyRef
    file_id: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A plaintext, empty if a file received it, its key, whether this service sealed it, and its file."""

    plaintext: bytes = field(repr=False)
    key: KeyRef
    origin: Origin
    file_id: str


@dataclass(frozen=True, slots=True)
class DataKey:
    """Random bytes in clear and sealed, and the id of the ciphertext."""

    plaintext: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)
    key: KeyRef
    file_id: str


@dataclass(frozen=True, slots=True)
class WrappedFileKey:
    """A file key wrapped for a header that an age tool writes: one stanza as text."""

    stanza: bytes
    key: KeyRef


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """The 16-byte file key and the 16-byte payload nonce of a file, with the key that unwrapped it."""

    file_key: bytes = field(repr=False)
    nonce: bytes = field(repr=False)
    key: KeyRef
    origin: Origin

    @property
    def payload_key(self) -> bytes:
        return stream.payload_key(self.file_key, self.nonce)


@dataclass(frozen=True, slots=True)
class KeyVersionStatus:
    """The key that a header names; ``key_version`` is empty where the backend has no such version."""

    key_id: str
    key_version: str
    newest: bool
