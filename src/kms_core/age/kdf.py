"""HKDF-SHA256 with one 32-byte output block: every key of the age format and of our stanzas; its HMAC."""

from hashlib import sha256
from typing import Final

KEY_BYTES: Final = 32
_BLOCK: Final = 64
_INNER: Final = bytes(octet ^ 0x36 for octet in range(256))
_OUTER: Final = bytes(octet ^ 0x5C for octet in range(256))
_NO_SALT: Final = bytes(_BLOCK).translate(_INNER), bytes(_BLOCK).translate(_OUTER)


def hkdf(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """Derive 32 bytes (RFC 5869 with L = 32, so one expand block). An empty salt means 32 zero bytes."""
    return mac(mac(salt, secret), info + b"\x01")


def mac(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104) under a salt or a key of one file.

    A header needs thirteen, and ``hmac.digest`` costs half as much again (ADR 18). What outlives a file, as
    the key of an origin, is for ``hmac.digest``.
    """
    if not key:
        inner, outer = _NO_SALT
    else:
        block = (key if len(key) <= _BLOCK else sha256(key).digest()).ljust(_BLOCK, b"\0")
        inner, outer = block.translate(_INNER), block.translate(_OUTER)
    return sha256(outer + sha256(inner + message).digest()).digest()
