"""The payload: whatever is done to the chunks of one, all its openers notice and release no forgery.

An input is a size, and hands that cut, stretch, flip, drop, repeat and swap; or, behind a zero byte, a whole
payload that somebody made up.
"""

import io
import tempfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age import stream
from kms_core.age.stream import CHUNK, SEALED_CHUNK, TAG
from kms_core.payload import parallel, streaming
from kms_core.payload.files import FileRange, FileWriter
from kms_core.payload.parallel import ParallelOptions
from kms_protocol.errors import DecryptFailed

MOST_BYTES: Final = 512
WORDS: Final = (b"\x00", b"\x00\x00\x00\x01", b"\xff\xff\xff\xff")
KEY: Final = bytes(range(32))
SIZES: Final = (0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5, 3 * CHUNK)
_OPTIONS: Final = ParallelOptions(threads=1, slab_chunks=2)
_STEP: Final = 4  # a hand: which one, and three bytes of where


def seeds() -> Iterable[bytes]:
    whole = stream.seal(KEY, b"made up")
    yield b"\x00" + whole
    for size in range(1, len(SIZES) + 1):
        yield bytes([size])
        for hand in range(len(TAMPERINGS)):
            yield bytes([size, hand, 0, 0, 1])
            yield bytes([size, hand, 0, 255, 255, hand, 1, 0, 16])


def check(data: bytes) -> None:
    if not data or not data[0]:
        _judge(data[1:], b"made up")
        return
    plaintext = _plaintext(SIZES[data[0] % len(SIZES)])
    sealed = _sealed(len(plaintext))
    for at in range(1, min(len(data) - _STEP + 1, 1 + 4 * _STEP), _STEP):
        hand = TAMPERINGS[data[at] % len(TAMPERINGS)]
        sealed = hand(sealed, int.from_bytes(data[at + 1 : at + _STEP], "big"))
    _judge(sealed, plaintext)


@lru_cache
def _plaintext(size: int) -> bytes:
    return bytes(number * 7 % 251 for number in range(size))


@lru_cache
def _sealed(size: int) -> bytes:
    return stream.seal(KEY, _plaintext(size))


def _judge(sealed: bytes, plaintext: bytes) -> None:
    """Each opener gives the plaintext if and only if the payload is the one that was sealed from it."""
    genuine = sealed == stream.seal(KEY, plaintext)
    outcomes = [opener(sealed, plaintext) for opener in (_in_memory, _by_pipe, _by_slabs)]
    assert outcomes == [genuine] * len(outcomes)


def _in_memory(sealed: bytes, plaintext: bytes) -> bool:
    try:
        opened = stream.open_(KEY, sealed)
    except DecryptFailed:
        return False
    assert opened == plaintext
    return True


def _by_pipe(sealed: bytes, plaintext: bytes) -> bool:
    """What a pipe has released before it fails is a beginning of the plaintext."""
    released = io.BytesIO()
    try:
        size = streaming.open_pipe(KEY, io.BytesIO(sealed), released, _OPTIONS)
    except DecryptFailed:
        assert plaintext.startswith(released.getvalue())
        return False
    assert size == len(plaintext)
    assert released.getvalue() == plaintext
    return True


def _by_slabs(sealed: bytes, plaintext: bytes) -> bool:
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.write(sealed)
        source.flush()
        try:
            parallel.open_file(
                KEY, FileRange(source.fileno(), len(sealed)), FileWriter(target.fileno()), options=_OPTIONS
            )
        except DecryptFailed:
            return False
        assert target.read() == plaintext
    return True


# -- hands -------------------------------------------------------------------------------------------


def _chunks(sealed: bytes) -> list[bytes]:
    return [sealed[at : at + SEALED_CHUNK] for at in range(0, len(sealed), SEALED_CHUNK)] or [b""]


def _cut(sealed: bytes, at: int) -> bytes:
    return sealed[: at % (len(sealed) + 1)]


def _cut_chunks(sealed: bytes, at: int) -> bytes:
    found = _chunks(sealed)
    return b"".join(found[: at % (len(found) + 1)])


def _stretch(sealed: bytes, at: int) -> bytes:
    return sealed + bytes([at & 0xFF]) * (1 + at % (2 * TAG))


def _flip(sealed: bytes, at: int) -> bytes:
    if not sealed:
        return sealed
    place, bit = (at >> 3) % len(sealed), 1 << (at & 7)
    return sealed[:place] + bytes([sealed[place] ^ bit]) + sealed[place + 1 :]


def _drop(sealed: bytes, at: int) -> bytes:
    found = _chunks(sealed)
    del found[at % len(found)]
    return b"".join(found)


def _repeat(sealed: bytes, at: int) -> bytes:
    found = _chunks(sealed)
    found.insert(at >> 4 & 3, found[at % len(found)])
    return b"".join(found)


def _swap(sealed: bytes, at: int) -> bytes:
    found = _chunks(sealed)
    one, other = at % len(found), (at >> 4) % len(found)
    found[one], found[other] = found[other], found[one]
    return b"".join(found)


def _reopen(sealed: bytes, at: int) -> bytes:
    """An empty last chunk, sealed by whoever has the key, behind a payload that ended."""
    return sealed + ChaCha20Poly1305(KEY).encrypt(stream.nonce(1 + at % 4, last=True), b"", None)


TAMPERINGS: Final[tuple[Callable[[bytes, int], bytes], ...]] = (
    _cut,
    _cut_chunks,
    _stretch,
    _flip,
    _drop,
    _repeat,
    _swap,
    _reopen,
)
