"""ML-KEM-768 with X25519: the post-quantum native key type of age 1.3. Each stanza wraps one file key.

Source: C2SP age specification, "The mlkem768x25519 recipient type": HPKE (RFC 9180) in base mode. An
identity is a 32-byte seed, a recipient 1,216 bytes; a file key is 16 bytes, its wrap 32. A file with such
a stanza beside a classic one is only as strong as the classic one.
"""

import hashlib
import os
from dataclasses import dataclass, field
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from kms_core.age import bech32
from kms_core.age.header import Stanza, b64encode
from kms_core.age.x25519 import NoMatch, share_of
from kms_protocol.errors import DecryptFailed

STANZA_TYPE: Final = "mlkem768x25519"
RECIPIENT_PREFIX: Final = "age1pq"
IDENTITY_PREFIX: Final = "AGE-SECRET-KEY-PQ-"
_INFO: Final = b"age-encryption.org/mlkem768x25519"
_SUITE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
_SEED_BYTES: Final = 32
_MLKEM_SEED_BYTES: Final = 64
_MLKEM_PUBLIC_BYTES: Final = 1184
_X25519_BYTES: Final = 32
_PUBLIC_BYTES: Final = _MLKEM_PUBLIC_BYTES + _X25519_BYTES
_MLKEM_CIPHERTEXT_BYTES: Final = 1088
_SHARE_BYTES: Final = _MLKEM_CIPHERTEXT_BYTES + _X25519_BYTES


@dataclass(frozen=True, slots=True)
class HybridRecipient:
    """A public key, ``age1pq1…``: some 2,000 characters."""

    public: bytes = field(repr=False)
    text: str = field(init=False)
    _key: hpke.MLKEM768X25519PublicKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        mlkem = MLKEM768PublicKey.from_public_bytes(self.public[:_MLKEM_PUBLIC_BYTES])
        x25519 = X25519PublicKey.from_public_bytes(self.public[_MLKEM_PUBLIC_BYTES:])
        object.__setattr__(self, "text", bech32.encode(RECIPIENT_PREFIX, self.public))
        object.__setattr__(self, "_key", hpke.MLKEM768X25519PublicKey(mlkem, x25519))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``age1pq1…``; ValueError (without the text) if it is not one."""
        return cls(bech32.decode_key(text, RECIPIENT_PREFIX, _PUBLIC_BYTES, "a post-quantum recipient"))

    def __str__(self) -> str:
        return self.text

    def wrap(self, file_key: bytes) -> Stanza:
        """Wrap a 16-byte file key for this recipient under fresh shares."""
        sealed = _SUITE.encrypt(file_key, self._key, _INFO)
        share = b64encode(sealed[:_SHARE_BYTES]).decode("ascii")
        return Stanza((STANZA_TYPE, share), sealed[_SHARE_BYTES:])


@dataclass(frozen=True, slots=True)
class HybridIdentity:
    """A private key, ``AGE-SECRET-KEY-PQ-1…``; not in ``repr``. Construction takes 0.2 ms: reuse it."""

    secret: bytes = field(repr=False)
    recipient: HybridRecipient = field(init=False)
    _key: hpke.MLKEM768X25519PrivateKey = field(init=False, repr=False, compare=False)
    _x25519: X25519PrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        seeds = hashlib.shake_256(self.secret).digest(_MLKEM_SEED_BYTES + _X25519_BYTES)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(seeds[:_MLKEM_SEED_BYTES])
        x25519 = X25519PrivateKey.from_private_bytes(seeds[_MLKEM_SEED_BYTES:])
        public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        object.__setattr__(self, "recipient", HybridRecipient(public))
        object.__setattr__(self, "_key", hpke.MLKEM768X25519PrivateKey(mlkem, x25519))
        object.__setattr__(self, "_x25519", x25519)

    @classmethod
    def generate(cls) -> Self:
        return cls(os.urandom(_SEED_BYTES))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``AGE-SECRET-KEY-PQ-1…``; ValueError (without the text) if it is not one."""
        return cls(bech32.decode_key(text, IDENTITY_PREFIX, _SEED_BYTES, "a post-quantum identity"))

    def export(self) -> str:
        """The secret as text, only for a key file."""
        return bech32.encode(IDENTITY_PREFIX, self.secret)

    def unwrap(self, stanza: Stanza) -> bytes:
        """Unwrap a 16-byte file key. Raises NoMatch for a stanza of another identity, DecryptFailed.

        The body's length is checked before anything is decrypted: a longer one is a partitioning oracle.
        """
        if stanza.type != STANZA_TYPE:
            raise NoMatch
        share = share_of(stanza, _SHARE_BYTES)
        try:
            return _SUITE.decrypt(share + stanza.body, self._key, _INFO)
        except InvalidTag:
            self._check_low_order(share[_MLKEM_CIPHERTEXT_BYTES:])
            raise NoMatch from None

    def _check_low_order(self, x25519_share: bytes) -> None:
        """Raise DecryptFailed for an all-zero X25519 secret, which HPKE reports as a wrong tag."""
        try:
            self._x25519.exchange(X25519PublicKey.from_public_bytes(x25519_share))
        except ValueError as exc:
            raise DecryptFailed from exc
