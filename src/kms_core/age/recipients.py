"""Native recipients and identities of age, of either type, and the files that hold them."""

from datetime import UTC, datetime

from kms_core.age.mlkem768x25519 import IDENTITY_PREFIX, RECIPIENT_PREFIX, HybridIdentity, HybridRecipient
from kms_core.age.x25519 import X25519Identity, X25519Recipient
from kms_protocol.units import time_text

Identity = X25519Identity | HybridIdentity
"""A private key that unwraps file keys."""
Recipient = X25519Recipient | HybridRecipient
"""A public key that wraps file keys."""


def key_lines(text: str) -> list[tuple[int, str]]:
    """The stripped lines of a file of identities or recipients, without comments; their numbers from 1."""
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def identity_file(identity: Identity) -> bytes:
    """Return the content of a file with a new identity, as age-keygen writes it."""
    created = time_text(datetime.now(UTC))
    return f"# created: {created}\n# public key: {identity.recipient}\n{identity.export()}\n".encode()


def parse_identity(text: str) -> Identity:
    """Parse an identity of either native type. Raises ValueError, without the text, if it is neither."""
    if text.upper().startswith(IDENTITY_PREFIX):
        return HybridIdentity.parse(text)
    return X25519Identity.parse(text)


def parse_recipient(text: str) -> Recipient:
    """Parse a recipient of either native type. Raises ValueError, without the text, if it is neither."""
    if text.lower().startswith(RECIPIENT_PREFIX + "1"):
        return HybridRecipient.parse(text)
    return X25519Recipient.parse(text)
