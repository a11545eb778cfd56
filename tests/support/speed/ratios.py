"""Where counts say nothing, since C does the work: processor time beside that of the bare primitives."""

import binascii
import hmac
import math
import os
import time
from functools import partial
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.age import header
from kms_core.age.header import FILE_LIMITS
from kms_core.age.stream import CHUNK, SEALED_CHUNK, cut
from kms_core.payload import parallel
from kms_core.payload.parallel import SLAB_CHUNKS
from support.speed.counting import Function
from support.speed.growth import header_of
from support.speed.hot_paths import FILE_BYTES, SECRET, SINGLE_THREAD, Install, files

_ROUNDS: Final = 30
_ROUND_S: Final = 0.01
_PAUSE_S: Final = (
    0.05  # between rounds: what others do to caches and memory for a second is not in all of them
)
_KEY: Final = SECRET[:32]
_NONCE: Final = bytes(12)


def measure(install: Install) -> dict[str, float]:
    """How many times the bare primitives the whole takes: in turn, in one thread, the least of the rounds."""
    head = header_of(1000)
    pairs: dict[str, tuple[Function, Function]] = {
        "slabs.seal_file": (partial(parallel.seal_file, _KEY, *files(), options=SINGLE_THREAD), _slabs()),
        "slabs.open_file": (
            partial(parallel.open_file, _KEY, *files(sealed=True), options=SINGLE_THREAD),
            _slabs(),
        ),
        "sealing.seal of 1 KiB": (install.seal, _secret),
        "sealing.open of 1 KiB": (install.open, _secret),
        "header.parse": (lambda: header.parse(head, FILE_LIMITS), lambda: binascii.b2a_base64(head)),
    }
    return {f"{name}, times its primitives": _ratio(*pair) for name, pair in pairs.items()}


def _ratio(*pair: Function) -> float:
    runs = [math.ceil(_ROUND_S / max(1e-6, min(_seconds(each, 1) for _ in range(3)))) for each in pair]
    rounds = []
    for _ in range(_ROUNDS):
        rounds.append([_seconds(each, count) for each, count in zip(pair, runs, strict=True)])
        time.sleep(_PAUSE_S)
    whole, bare = map(min, zip(*rounds, strict=True))
    return float(round(whole / bare, 2))


def _seconds(function: Function, runs: int) -> float:
    begun = time.thread_time()
    for _ in range(runs):
        function()
    return (time.thread_time() - begun) / runs


def _slabs() -> Function:
    """What a file costs at least: each slab is read, its chunks are encrypted in place, and it is written."""
    source, target = os.memfd_create("source"), os.memfd_create("target")
    os.truncate(source, FILE_BYTES)
    aead, memory = ChaCha20Poly1305(_KEY), memoryview(bytearray(SLAB_CHUNKS * SEALED_CHUNK))

    def slabs() -> None:
        for number in range(FILE_BYTES // CHUNK // SLAB_CHUNKS):
            os.preadv(source, [memory[: SLAB_CHUNKS * CHUNK]], number * SLAB_CHUNKS * CHUNK)
            for chunk in cut(memory, SEALED_CHUNK):
                aead.encrypt_into(_NONCE, chunk[:CHUNK], None, chunk)
            os.pwrite(target, memory, number * len(memory))

    return slabs


def _secret() -> None:
    """What a seal or an open must do: a key agreement, the HMACs of five keys and three tags, two ciphers."""
    fresh = X25519PrivateKey.generate()
    fresh.exchange(fresh.public_key())
    for _ in range(13):
        hmac.digest(_KEY, _KEY, "sha256")
    for data in (_KEY[:16], SECRET):
        ChaCha20Poly1305(_KEY).encrypt(_NONCE, data, None)
