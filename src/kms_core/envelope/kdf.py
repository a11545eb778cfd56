"""HKDF-SHA256 with one 32-byte output block: every key of the age format and of our stanzas."""

import hmac
from typing import Final

KEY_BYTES: Final = 32


def hkdf(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """Derive 32 bytes (RFC 5869 with L = 32, so one expand block). An empty salt means 32 zero bytes.

    Two ``hmac.digest`` calls: ``cryptography``'s HKDF object costs four times as much per call.
    """
    pseudorandom_key = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(pseudorandom_key, info + b"\x01", "sha256")
