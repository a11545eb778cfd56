"""The cipher and the I/O of an age payload, and nothing else: what any program on this library could reach.

    python -m benchmarks.drive_bare {seal|open} KEY_HEX OFFSET SOURCE TARGET

Chunks, slabs, threads and system calls are those of ``kms_core.payload.parallel``, written down once more
without header, context, checks, progress or cancellation. The payload begins at OFFSET of the sealed file.
"""

import itertools
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kms_core.payload.files import FileWriter

CHUNK: Final = 64 * 1024
SEALED: Final = CHUNK + 16
SLAB: Final = 16
THREADS: Final = 2


def nonces(first: int, count: int, *, last: bool) -> list[bytes]:
    run = [index.to_bytes(11, "big") + b"\x00" for index in range(first, first + count)]
    if last:
        run[-1] = run[-1][:11] + b"\x01"
    return run


def cut(memory: memoryview, width: int) -> list[memoryview]:
    return [memory[at : at + width] for at in range(0, len(memory), width)]


def sealer(key: bytes, size: int, source: int, target: int, offset: int) -> Callable[[int], None]:
    """A function that seals slab number ``turn`` in place, with memory of its own."""
    aead, memory = ChaCha20Poly1305(key), memoryview(bytearray(SLAB * SEALED))
    sealed = cut(memory, SEALED)
    plain = [chunk[:CHUNK] for chunk in sealed]
    total = -(-size // (SLAB * CHUNK))

    def step(turn: int) -> None:
        length = min(SLAB * CHUNK, size - turn * SLAB * CHUNK)
        count = -(-length // CHUNK)
        views, out = plain[:count], sealed[:count]
        views[-1] = views[-1][: length - (count - 1) * CHUNK]
        out[-1] = out[-1][: len(views[-1]) + 16]
        os.preadv(source, views, turn * SLAB * CHUNK)
        run = nonces(turn * SLAB, count, last=turn == total - 1)
        deque(map(aead.encrypt_into, run, views, repeat(None), out), 0)
        os.pwrite(target, memory[: length + 16 * count], offset + turn * SLAB * SEALED)

    return step


def opener(key: bytes, size: int, source: int, target: int, offset: int) -> Callable[[int], None]:
    aead = ChaCha20Poly1305(key)
    memory, plain = memoryview(bytearray(SLAB * SEALED)), memoryview(bytearray(SLAB * CHUNK))
    total = -(-size // (SLAB * CHUNK))

    def step(turn: int) -> None:
        length = min(SLAB * CHUNK, size - turn * SLAB * CHUNK)
        count = -(-length // CHUNK)
        sealed = memory[: length + 16 * count]
        os.preadv(source, [sealed], offset + turn * SLAB * SEALED)
        run = nonces(turn * SLAB, count, last=turn == total - 1)
        deque(map(aead.decrypt_into, run, cut(sealed, SEALED), repeat(None), cut(plain[:length], CHUNK)), 0)
        os.pwrite(target, plain[:length], turn * SLAB * CHUNK)

    return step


def main(operation: str, key: str, offset: str, *paths: str) -> None:
    with Path(paths[0]).open("rb", 0) as reader, Path(paths[1]).open("wb", 0) as writer:
        size, start = os.fstat(reader.fileno()).st_size, int(offset)
        make, grown = sealer, start + size + 16 * -(-size // CHUNK)
        if operation == "open":
            make, size = opener, size - start - 16 * -(-(size - start) // SEALED)
            grown = size
        FileWriter(writer.fileno()).reserve(grown)
        turns = itertools.count()

        def work() -> None:
            step = make(bytes.fromhex(key), size, reader.fileno(), writer.fileno(), start)
            while (turn := next(turns)) * SLAB * CHUNK < size:
                step(turn)

        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(work) for _ in range(THREADS)]:
                done.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
