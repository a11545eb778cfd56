"""The scrypt stanza of passphrase files. Only the ``kms`` command uses it; it is slow by design.

Source: C2SP age specification, "The scrypt recipient type". A work factor w means N = 2^w, r = 8, p = 1 and
2^w KiB of memory (18: 256 MiB, about 0.9 s). A file key has 16 bytes, a wrapped one 32.
"""

import os
import re
from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from kms_core.age.header import Stanza, b64decode, b64encode
from kms_core.age.x25519 import WRAPPED_BYTES, NoMatch
from kms_protocol.errors import DecryptFailed

STANZA_TYPE: Final = "scrypt"
WORK_FACTOR: Final = 18
_LABEL: Final = b"age-encryption.org/v1/scrypt"
_SALT_BYTES: Final = 16
_KEY_BYTES: Final = 32
_ZERO_NONCE: Final = bytes(12)
_DECIMAL: Final = re.compile(r"[1-9][0-9]{0,2}", re.ASCII)


def stanza_of(stanzas: Sequence[Stanza]) -> Stanza | None:
    """The stanza of a passphrase file; None in a header for keys.

    Raises DecryptFailed beside other stanzas: a passphrase must not open a file that was sent to others.
    """
    found = [stanza for stanza in stanzas if stanza.type == STANZA_TYPE]
    if found and len(stanzas) > 1:
        raise DecryptFailed
    return found[0] if found else None


def wrap(file_key: bytes, passphrase: str, work_factor: int = WORK_FACTOR) -> Stanza:
    """Wrap a 16-byte file key under a passphrase; the stanza must be the only one of its header."""
    salt = os.urandom(_SALT_BYTES)
    body = ChaCha20Poly1305(_wrap_key(passphrase, salt, work_factor)).encrypt(_ZERO_NONCE, file_key, None)
    return Stanza((STANZA_TYPE, b64encode(salt).decode("ascii"), str(work_factor)), body)


def unwrap(stanza: Stanza, passphrase: str, max_work_factor: int = WORK_FACTOR) -> bytes:
    """Unwrap a 16-byte file key. Raises NoMatch for a wrong passphrase, DecryptFailed.

    A work factor above ``max_work_factor`` is a DecryptFailed, too.
    """
    if stanza.type != STANZA_TYPE:
        raise NoMatch
    salt, work_factor = _read(stanza)
    if work_factor > max_work_factor:
        raise DecryptFailed(
            f"The file has scrypt work factor {work_factor}, above the {max_work_factor} allowed; "
            "each step doubles the memory, 18 takes 256 MiB"
        )
    try:
        return ChaCha20Poly1305(_wrap_key(passphrase, salt, work_factor)).decrypt(
            _ZERO_NONCE, stanza.body, None
        )
    except InvalidTag:
        raise NoMatch from None


def _read(stanza: Stanza) -> tuple[bytes, int]:
    try:
        _, salt_text, work_factor = stanza.args
    except ValueError as exc:
        raise DecryptFailed from exc
    salt = b64decode(salt_text.encode("ascii"))
    shaped = len(salt) == _SALT_BYTES and len(stanza.body) == WRAPPED_BYTES
    if not shaped or not _DECIMAL.fullmatch(work_factor):
        raise DecryptFailed
    return salt, int(work_factor)


def _wrap_key(passphrase: str, salt: bytes, work_factor: int) -> bytes:
    kdf = Scrypt(salt=_LABEL + salt, length=_KEY_BYTES, n=2**work_factor, r=8, p=1)
    return kdf.derive(passphrase.encode("utf-8"))
