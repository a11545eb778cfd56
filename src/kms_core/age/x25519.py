"""X25519 recipients and identities, the classic native key type of age. Each stanza wraps one file key.

Source: C2SP age specification, "The X25519 recipient type". A file key has 16 bytes, a wrapped one 32.
"""

from dataclasses import dataclass, field
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age import bech32
from kms_core.age.header import FILE_KEY_BYTES, KEY_BYTES, Stanza, b64decode, b64encode, hkdf
from kms_protocol.errors import DecryptFailed

STANZA_TYPE: Final = "X25519"
RECIPIENT_PREFIX: Final = "age"
IDENTITY_PREFIX: Final = "AGE-SECRET-KEY-"
_INFO: Final = b"age-encryption.org/v1/X25519"
WRAPPED_BYTES: Final = FILE_KEY_BYTES + 16
_ZERO_NONCE: Final = bytes(12)


class NoMatch(DecryptFailed):
    """The stanza is for another key: try the next. DecryptFailed if none is left."""


@dataclass(frozen=True, slots=True)
class X25519Recipient:
    """A public key, ``age1…``."""

    public: bytes
    text: str = field(init=False)
    _key: X25519PublicKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", bech32.encode(RECIPIENT_PREFIX, self.public))
        object.__setattr__(self, "_key", X25519PublicKey.from_public_bytes(self.public))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``age1…``; ValueError (without the text) if it is not one."""
        return cls(bech32.decode_key(text, RECIPIENT_PREFIX, KEY_BYTES, "an X25519 recipient"))

    def __str__(self) -> str:
        return self.text

    def wrap(self, file_key: bytes) -> Stanza:
        """Wrap a 16-byte file key for this recipient under a fresh ephemeral key."""
        ephemeral = X25519PrivateKey.generate()
        share = ephemeral.public_key().public_bytes_raw()
        wrap_key = hkdf(ephemeral.exchange(self._key), salt=share + self.public, info=_INFO)
        body = ChaCha20Poly1305(wrap_key).encrypt(_ZERO_NONCE, file_key, None)
        return Stanza((STANZA_TYPE, b64encode(share).decode("ascii")), body)


@dataclass(frozen=True, slots=True)
class X25519Identity:
    """A private key, ``AGE-SECRET-KEY-1…``; not in ``repr``."""

    secret: bytes = field(repr=False)
    recipient: X25519Recipient = field(init=False)
    _key: X25519PrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        key = X25519PrivateKey.from_private_bytes(self.secret)
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "recipient", X25519Recipient(key.public_key().public_bytes_raw()))

    @classmethod
    def generate(cls) -> Self:
        return cls(X25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``AGE-SECRET-KEY-1…``; ValueError (without the text) if it is not one."""
        return cls(bech32.decode_key(text, IDENTITY_PREFIX, KEY_BYTES, "an X25519 identity"))

    def export(self) -> str:
        """The secret as text, only for a key file."""
        return bech32.encode(IDENTITY_PREFIX, self.secret)

    def unwrap(self, stanza: Stanza) -> bytes:
        """Unwrap a 16-byte file key. Raises NoMatch for a stanza of another identity, DecryptFailed.

        The body's length is checked before anything is decrypted: a longer one is a partitioning oracle.
        """
        if stanza.type != STANZA_TYPE:
            raise NoMatch
        share = share_of(stanza, KEY_BYTES)
        try:
            secret = self._key.exchange(X25519PublicKey.from_public_bytes(share))
        except ValueError as exc:  # a low-order share: the all-zero shared secret
            raise DecryptFailed from exc
        wrap_key = hkdf(secret, salt=share + self.recipient.public, info=_INFO)
        try:
            return ChaCha20Poly1305(wrap_key).decrypt(_ZERO_NONCE, stanza.body, None)
        except InvalidTag:
            raise NoMatch from None


def share_of(stanza: Stanza, size: int) -> bytes:
    """The share of ``size`` bytes in a stanza. Raises DecryptFailed for another shape of share or body."""
    if len(stanza.args) != 2 or len(stanza.body) != WRAPPED_BYTES:  # noqa: PLR2004 -- type and share
        raise DecryptFailed
    share = b64decode(stanza.args[1].encode("ascii"))
    if len(share) != size:
        raise DecryptFailed
    return share
