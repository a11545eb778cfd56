"""Per-job keys: a bulk job asks the peer once for a key of its own, and wraps its file keys under that.

The peer wraps the 32-byte job key; a file key is sealed under HKDF(job key, fresh 32-byte salt), with the
AAD that the peer would have got: tenant, key, version and context stay authenticated for every file. A job
key serves one tenant and key version, for a bounded number of files, and never leaves the service.
"""

import os
import threading
from dataclasses import dataclass, field
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age.header import FILE_KEY_BYTES
from kms_core.age.kdf import hkdf
from kms_core.envelope.binding import KeyRef
from kms_protocol.context import length_prefixed
from kms_protocol.errors import DecryptFailed

JOB_KEY_BYTES: Final = 32
SALT_BYTES: Final = 32
MOST_FILES: Final = 10_000
MOST_OPENED: Final = 256
BODY_BYTES: Final = SALT_BYTES + FILE_KEY_BYTES + 16
_INFO: Final = b"kms-service/job/1"
_NONCE: Final = bytes(12)  # each derived key seals once


def job_aad(key: KeyRef) -> bytes:
    """What the peer authenticates with a job key: names alone, since the files bind their contexts."""
    names = (key.tenant, key.key_id, key.backend, key.version)
    return length_prefixed(_INFO, *(name.encode() for name in names))


def seal(job_key: bytes, file_key: bytes, aad: bytes) -> bytes:
    """Salt and sealed file key: 64 bytes."""
    salt = os.urandom(SALT_BYTES)
    return salt + _aead(job_key, salt).encrypt(_NONCE, file_key, aad)


def open_(job_key: bytes, body: bytes, aad: bytes) -> bytes:
    """The file key. Raises DecryptFailed."""
    if len(body) != BODY_BYTES or len(job_key) != JOB_KEY_BYTES:
        raise DecryptFailed
    try:
        return _aead(job_key, body[:SALT_BYTES]).decrypt(_NONCE, body[SALT_BYTES:], aad)
    except InvalidTag as exc:
        raise DecryptFailed from exc


def _aead(job_key: bytes, salt: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(hkdf(job_key, salt=salt, info=_INFO))


class Cryptor(Protocol):
    """Who wraps job keys: a remote backend."""

    def encrypt(self, secret: bytes, key: KeyRef, aad: bytes) -> bytes: ...
    def decrypt(self, wrapped: bytes, key: KeyRef, aad: bytes) -> bytes: ...


@dataclass(slots=True)
class _JobKey:
    secret: bytes = field(repr=False)
    wrapped: bytes
    files: int = 0


class JobKeys:
    """The job keys of one run: made at the first wrap, opened at the first unwrap, then at hand."""

    def __init__(self, peer: Cryptor) -> None:
        self._peer = peer
        self._lock = threading.Lock()
        self._sealing: dict[KeyRef, _JobKey] = {}
        self._opened: dict[tuple[KeyRef, bytes], bytes] = {}

    def wrap(self, file_key: bytes, key: KeyRef, aad: bytes) -> tuple[bytes, bytes]:
        """The sealed file key, and the wrapped job key that opens it."""
        with self._lock:
            job_key = self._sealing.get(key)
            if job_key is None or job_key.files >= MOST_FILES:
                secret = os.urandom(JOB_KEY_BYTES)
                job_key = _JobKey(secret, self._peer.encrypt(secret, key, job_aad(key)))
                self._sealing[key] = job_key
            job_key.files += 1
        return seal(job_key.secret, file_key, aad), job_key.wrapped

    def unwrap(self, body: bytes, wrapped: bytes, key: KeyRef, aad: bytes) -> bytes:
        """The file key. Raises DecryptFailed, and what the peer raises."""
        with self._lock:
            secret = self._opened.get((key, wrapped))
            if secret is None:
                secret = self._peer.decrypt(wrapped, key, job_aad(key))
                if len(self._opened) >= MOST_OPENED:
                    self._opened.pop(next(iter(self._opened)))
                self._opened[key, wrapped] = secret
        return open_(secret, body, aad)
