"""Files with a hole, which may have any length and cost nothing; the memory that reading them takes."""

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kms_protocol.units import MiB

HOLE_BYTES: Final = 256 * MiB
MOST_BYTES: Final = 16 * MiB


def with_hole(file: Path, behind: bytes = b"", hole_bytes: int = HOLE_BYTES) -> None:
    """Put a hole at the end of a file, and some bytes behind it."""
    os.truncate(file, file.stat().st_size + hole_bytes)
    with file.open("ab") as out:
        out.write(behind)


def islands(file: Path, count: int, apart_bytes: int) -> None:
    """Put blocks of data at the end of a file, each behind a hole: they cost 4 KiB each."""
    for _ in range(count):
        with_hole(file, b"x" * 4096, apart_bytes)


@contextmanager
def small_peak() -> Iterator[None]:
    """The block holds at most 16 MiB at a time."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= MOST_BYTES
