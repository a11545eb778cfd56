"""Derives the 32-byte keys of the age format and of our stanzas with HKDF-SHA-256 (RFC 5869)."""

from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES: Final = 32
_SHA256: Final = SHA256()


def hkdf(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """Derive 32 bytes. An empty salt means 32 zero bytes."""
    return HKDF(_SHA256, KEY_BYTES, salt, info).derive(secret)
