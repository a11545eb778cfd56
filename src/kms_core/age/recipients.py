"""The native key types of age: the common interface of X25519 and the post-quantum hybrid."""

import hashlib
from typing import Protocol

from kms_core.age import mlkem768x25519, x25519
from kms_core.age.header import Stanza


class Identity(Protocol):
    """A private key that unwraps file keys."""

    @property
    def recipient(self) -> "Recipient": ...
    @property
    def secret(self) -> bytes: ...
    def unwrap(self, stanza: Stanza) -> bytes: ...


class Recipient(Protocol):
    """A public key that wraps file keys."""

    def wrap(self, file_key: bytes) -> Stanza: ...


def version_of(recipient: Recipient) -> str:
    """The key version: the first 8 hexadecimal digits of SHA-256 over the recipient string."""
    return hashlib.sha256(str(recipient).encode("ascii")).hexdigest()[:8]


def parse_identity(text: str) -> Identity:
    """Parse an identity of either native type. Raises ValueError, without the text, if it is neither."""
    if text.upper().startswith(mlkem768x25519.IDENTITY_PREFIX):
        return mlkem768x25519.HybridIdentity.parse(text)
    return x25519.X25519Identity.parse(text)


def parse_recipient(text: str) -> Recipient:
    """Parse a recipient of either native type. Raises ValueError, without the text, if it is neither."""
    if text.lower().startswith(mlkem768x25519.RECIPIENT_PREFIX + "1"):
        return mlkem768x25519.HybridRecipient.parse(text)
    return x25519.X25519Recipient.parse(text)
