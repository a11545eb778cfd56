"""The payload in memory: sizes, nonces, and that nothing forged gets through."""

import os
from collections.abc import Callable

import pyrage
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_core.age import header, stream
from kms_core.age.stream import CHUNK, SEALED_CHUNK, TAG
from kms_core.age.x25519 import X25519Identity
from kms_protocol.errors import DecryptFailed

KEY = bytes(range(32))
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7]


def test_nonce_is_a_big_endian_counter_and_a_last_mark() -> None:
    assert stream.nonce(258, last=False) == bytes(9) + b"\x01\x02\x00"
    assert stream.nonce(0, last=True) == bytes(11) + b"\x01"
    assert stream.nonces(7, 2, last=True) == [stream.nonce(7, last=False), stream.nonce(8, last=True)]


@settings(deadline=None)
@given(st.integers(0, 2**48))
def test_every_plaintext_size_has_its_own_sealed_size(size: int) -> None:
    assert stream.plaintext_size(stream.sealed_size(size)) == size


@pytest.mark.parametrize(
    "size", [0, 1, TAG - 1, SEALED_CHUNK + 1, SEALED_CHUNK + TAG, 2 * SEALED_CHUNK + TAG]
)
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(DecryptFailed):
        stream.plaintext_size(size)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sealed_opens_here_and_in_pyrage(size: int) -> None:
    identity = X25519Identity.generate()
    file_key, nonce, plaintext = os.urandom(16), os.urandom(16), os.urandom(size)
    sealed = stream.seal(stream.payload_key(file_key, nonce), plaintext)
    file = header.render([identity.recipient.wrap(file_key)], file_key) + nonce + sealed

    assert len(sealed) == stream.sealed_size(size)
    assert stream.open_(stream.payload_key(file_key, nonce), sealed) == plaintext
    assert pyrage.decrypt(file, [pyrage.x25519.Identity.from_str(identity.export())]) == plaintext


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(kind: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
    plaintext = os.urandom(CHUNK + 5)
    sealed = stream.seal(KEY, kind(plaintext))

    assert stream.open_(KEY, kind(sealed)) == plaintext


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda sealed: sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :]


@pytest.mark.parametrize(
    "forge",
    [
        flip(0),
        flip(SEALED_CHUNK),
        flip(2 * SEALED_CHUNK + 3),
        lambda sealed: sealed[:-1],
        lambda sealed: sealed[: 2 * SEALED_CHUNK],
        lambda sealed: sealed[SEALED_CHUNK:],
        lambda sealed: (
            sealed[SEALED_CHUNK : 2 * SEALED_CHUNK] + sealed[:SEALED_CHUNK] + sealed[2 * SEALED_CHUNK :]
        ),
        lambda sealed: sealed + bytes(TAG),
        lambda _: b"",
    ],
    ids=["first", "second", "last", "cut", "cut-at-border", "beheaded", "swapped", "longer", "empty"],
)
def test_forged_payloads_are_refused(forge: Callable[[bytes], bytes]) -> None:
    sealed = stream.seal(KEY, os.urandom(2 * CHUNK + 100))

    with pytest.raises(DecryptFailed):
        stream.open_(KEY, forge(sealed))


def test_forged_plaintext_is_cleared_from_its_buffer() -> None:
    sealed = memoryview(flip(SEALED_CHUNK)(stream.seal(KEY, b"s" * (CHUNK + 100))))
    buffer = memoryview(bytearray(CHUNK + 100))
    run = stream.nonces(0, 2, last=True)

    with pytest.raises(DecryptFailed):
        stream.open_into(
            ChaCha20Poly1305(KEY), run, stream.cut(sealed, SEALED_CHUNK), stream.cut(buffer, CHUNK)
        )
    assert not any(buffer)


def test_an_exception_that_is_kept_keeps_no_view_of_a_buffer() -> None:
    def fail(view: memoryview) -> None:
        held = view[:3]
        raise DecryptFailed(str(len(held)))

    with pytest.raises(DecryptFailed) as kept, stream.blank(8) as (out, view):
        fail(view)

    assert kept.value.detail == "3"
    out.truncate(0)  # raises BufferError while it is exported
