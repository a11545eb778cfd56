"""The age payload in memory: STREAM with ChaCha20-Poly1305.

Source: C2SP age specification, "Payload". A payload is divided into chunks of 64 KiB, of which the last may
be shorter. Each sealed chunk is 16 bytes longer; its nonce is an 11-byte counter and a byte that marks the
last chunk. The last chunk is empty only in an empty payload. Sizes are in bytes and exclude the 16-byte
payload nonce between header and chunks.
"""

import io
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.utils import Buffer

from kms_core.age.header import hkdf
from kms_protocol.errors import DecryptFailed

CHUNK: Final = 64 * 1024
TAG: Final = 16
SEALED_CHUNK: Final = CHUNK + TAG
_COUNTER: Final = 11
_MORE: Final = b"\x00"
_LAST: Final = b"\x01"
_ONLY: Final = bytes(_COUNTER) + _LAST


def payload_key(file_key: bytes, nonce: bytes) -> bytes:
    """Derive the 32-byte payload key from the 16-byte file key and the 16-byte payload nonce."""
    return hkdf(file_key, salt=nonce, info=b"payload")


def nonce(index: int, *, last: bool) -> bytes:
    """The 12-byte nonce of a chunk."""
    return index.to_bytes(_COUNTER, "big") + (_LAST if last else _MORE)


def nonces(first: int, count: int, *, last: bool) -> list[bytes]:
    """The nonces of ``count`` chunks from ``first`` on; with ``last`` the payload ends with them."""
    run = [index.to_bytes(_COUNTER, "big") + _MORE for index in range(first, first + count)]
    if last:
        run[-1] = nonce(first + count - 1, last=True)
    return run


def chunk_count(plaintext_size: int) -> int:
    """The number of chunks of a plaintext, at least 1."""
    return max(1, -(-plaintext_size // CHUNK))


def sealed_size(plaintext_size: int) -> int:
    """The size of the sealed chunks of a plaintext."""
    return plaintext_size + TAG * chunk_count(plaintext_size)


def plaintext_size(sealed_size: int) -> int:
    """The size of the plaintext of sealed chunks. Raises DecryptFailed if no payload has that size."""
    chunks = -(-sealed_size // SEALED_CHUNK)
    size = sealed_size - TAG * chunks
    if size < 0 or chunk_count(size) != chunks:
        raise DecryptFailed
    return size


def seal(key: bytes, plaintext: Buffer) -> bytes:
    """Seal a whole payload under its 32-byte payload key, which must not seal any other."""
    aead = ChaCha20Poly1305(key)
    if len(plaintext) <= CHUNK:
        return aead.encrypt(_ONLY, plaintext, None)
    source, run = cut(memoryview(plaintext), CHUNK), nonces(0, chunk_count(len(plaintext)), last=True)
    with blank(sealed_size(len(plaintext))) as (out, target):
        deque(map(aead.encrypt_into, run, source, repeat(None), cut(target, SEALED_CHUNK)), 0)
    return out.getvalue()


def open_(key: bytes, sealed: Buffer) -> bytes:
    """Open a whole payload. Raises DecryptFailed if it is truncated, changed, or sealed under another key.

    The caller bounds its size, since all plaintext is held until the last chunk is verified.
    """
    aead, size = ChaCha20Poly1305(key), plaintext_size(len(sealed))
    if len(sealed) <= SEALED_CHUNK:
        try:
            return aead.decrypt(_ONLY, sealed, None)
        except InvalidTag as exc:
            raise DecryptFailed from exc
    source = cut(memoryview(sealed), SEALED_CHUNK)
    with blank(size) as (out, target):
        open_into(aead, nonces(0, len(source), last=True), source, cut(target, CHUNK))
    return out.getvalue()


def open_into(
    aead: ChaCha20Poly1305, run: Iterable[bytes], sealed: Iterable[memoryview], plain: Sequence[memoryview]
) -> None:
    """Open chunks into ``plain``, in place or not. If one is forged, clear ``plain`` and raise DecryptFailed.

    ``decrypt_into`` checks the tag last, so forged plaintext would remain there otherwise.
    """
    try:
        deque(map(aead.decrypt_into, run, sealed, repeat(None), plain), 0)
    except InvalidTag as exc:
        for chunk in plain:
            chunk[:] = bytes(len(chunk))
        raise DecryptFailed from exc


def cut(data: memoryview, width: int) -> list[memoryview]:
    """Views of ``width`` bytes each, the last one of the remaining bytes."""
    return [data[start : start + width] for start in range(0, len(data), width)]


@contextmanager
def blank(size: int) -> Iterator[tuple[io.BytesIO, memoryview]]:
    """A buffer and its writable view; ``getvalue()`` of the buffer returns ``bytes`` without a copy.

    An exception passes without the locals of its frames: a view in them would keep the buffer exported, which
    the garbage collector reports or, in CPython 3.12.0 and 3.12.1, dies of (python/cpython#111049).
    """
    out = io.BytesIO(bytes(size))
    with out.getbuffer() as view:
        try:
            yield out, view
        except BaseException as exc:
            traceback.clear_frames(exc.__traceback__)
            raise
