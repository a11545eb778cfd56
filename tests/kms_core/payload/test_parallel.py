"""Payloads in files: the same bytes as in memory, whatever the threads; trouble stops all of them."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from kms_core.age import stream
from kms_core.age.stream import CHUNK, SEALED_CHUNK
from kms_core.payload.files import FileRange, FileWriter
from kms_core.payload.parallel import ParallelOptions, open_file, seal_file, verify_file
from kms_protocol.errors import DecryptFailed, InvalidRequest, JobCancelled, SpoolFull

KEY = bytes(range(32))
SIZES = [0, 1, CHUNK, CHUNK + 1, 16 * CHUNK, 16 * CHUNK + 1, 40 * CHUNK - 3]
OPTIONS = [
    ParallelOptions(),
    ParallelOptions(threads=1),
    ParallelOptions(slab_chunks=1),
    ParallelOptions(threads=3, slab_chunks=3),
]
OPTION_IDS = ["usual", "one-thread", "one-chunk", "odd"]


@pytest.fixture
def files() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        yield source, target


def extent_of(file: BinaryIO, data: bytes, offset: int = 0) -> FileRange:
    """``data`` behind ``offset`` bytes of something else."""
    file.write(bytes(offset) + data)
    file.flush()
    return FileRange(file.fileno(), len(data), offset)


def content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("size", SIZES)
def test_files_hold_what_memory_would(
    files: tuple[BinaryIO, BinaryIO], size: int, options: ParallelOptions
) -> None:
    source, target = files
    plaintext = os.urandom(size)
    seal_file(KEY, extent_of(source, plaintext, 3), FileWriter(target.fileno()), bytes(216), options)

    assert content(target) == bytes(216) + stream.seal(KEY, plaintext)


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("size", SIZES)
def test_files_open_to_what_was_sealed(
    files: tuple[BinaryIO, BinaryIO], size: int, options: ParallelOptions
) -> None:
    source, target = files
    plaintext = os.urandom(size)
    sealed = extent_of(source, stream.seal(KEY, plaintext), 216)
    verify_file(KEY, sealed, options)
    open_file(KEY, sealed, FileWriter(target.fileno()), options=options)

    assert content(target) == plaintext


@pytest.mark.parametrize("chunk", [0, 5, 8])
def test_a_forged_slab_is_refused_and_never_written(files: tuple[BinaryIO, BinaryIO], chunk: int) -> None:
    source, target = files
    sealed = bytearray(stream.seal(KEY, b"s" * (8 * CHUNK + 9)))
    sealed[chunk * SEALED_CHUNK + 2] ^= 1
    extent = extent_of(source, bytes(sealed))
    start = chunk * CHUNK

    with pytest.raises(DecryptFailed):
        verify_file(KEY, extent, ParallelOptions(slab_chunks=1))
    with pytest.raises(DecryptFailed):
        open_file(KEY, extent, FileWriter(target.fileno()), options=ParallelOptions(slab_chunks=1))
    assert not any(content(target)[start : start + CHUNK])


@pytest.mark.parametrize("size", [0, 15, SEALED_CHUNK, SEALED_CHUNK + 16, 3 * SEALED_CHUNK])
def test_a_cut_file_is_refused(files: tuple[BinaryIO, BinaryIO], size: int) -> None:
    source, target = files
    extent = extent_of(source, stream.seal(KEY, bytes(3 * CHUNK + 1))[:size])

    with pytest.raises(DecryptFailed):
        open_file(KEY, extent, FileWriter(target.fileno()))
    with pytest.raises(DecryptFailed):
        verify_file(KEY, extent)


def test_a_file_that_ends_before_its_extent_is_refused(files: tuple[BinaryIO, BinaryIO]) -> None:
    source, target = files
    extent = extent_of(source, stream.seal(KEY, bytes(3 * CHUNK)))
    os.ftruncate(source.fileno(), SEALED_CHUNK)

    with pytest.raises(DecryptFailed):
        open_file(KEY, extent, FileWriter(target.fileno()))


def grow(fd: int) -> None:
    os.pwrite(fd, b"more", os.fstat(fd).st_size)


def shrink(fd: int) -> None:
    os.ftruncate(fd, CHUNK)


def rewrite(fd: int) -> None:
    os.pwrite(fd, b"other", 0)
    os.utime(fd, ns=(0, 0))  # whatever the clock's grain


@pytest.mark.parametrize("change", [grow, shrink, rewrite])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_source_that_changes_is_refused(
    files: tuple[BinaryIO, BinaryIO], change: Callable[[int], None], threads: int
) -> None:
    source, target = files
    extent = extent_of(source, bytes(5 * CHUNK))
    waiting = iter([change])

    def once() -> None:
        for act in waiting:
            act(extent.fd)

    with pytest.raises(InvalidRequest, match="changed while it was read"):
        seal_file(
            KEY,
            extent,
            FileWriter(target.fileno()),
            options=ParallelOptions(threads, slab_chunks=1, check=once),
        )


@pytest.mark.parametrize("size", [4, 6])
def test_a_source_of_another_size_is_refused_before_anything_is_written(
    files: tuple[BinaryIO, BinaryIO], size: int
) -> None:
    source, target = files
    extent_of(source, b"12345")

    with pytest.raises(InvalidRequest):
        seal_file(KEY, FileRange(source.fileno(), size), FileWriter(target.fileno()))
    assert content(target) == b""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_raised_check_stops_every_thread_and_comes_through(
    files: tuple[BinaryIO, BinaryIO], threads: int
) -> None:
    source, target = files
    extent = extent_of(source, bytes(60 * CHUNK))
    calls = []

    def cancelled() -> None:
        calls.append(threading.get_ident())
        if len(calls) > 10:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        seal_file(
            KEY,
            extent,
            FileWriter(target.fileno()),
            options=ParallelOptions(threads, slab_chunks=1, check=cancelled),
        )
    assert len(calls) <= 10 + threads


def test_progress_adds_up_to_the_plaintext(files: tuple[BinaryIO, BinaryIO]) -> None:
    source, target = files
    done: list[int] = []
    size = 9 * CHUNK + 5
    seal_file(
        KEY,
        extent_of(source, bytes(size)),
        FileWriter(target.fileno()),
        options=ParallelOptions(slab_chunks=2, progress=done.append),
    )
    verify_file(
        KEY,
        FileRange(target.fileno(), stream.sealed_size(size)),
        ParallelOptions(slab_chunks=4, progress=done.append),
    )

    assert sorted(done) == sorted([2 * CHUNK] * 4 + [CHUNK + 5] + [4 * CHUNK] * 2 + [CHUNK + 5])


def test_an_extent_reads_within_itself(files: tuple[BinaryIO, BinaryIO]) -> None:
    source, _ = files
    extent_of(source, b"payload and more", 3)

    assert FileRange(source.fileno(), 7, 3).read_at(4, 100) == b"oad"


def test_no_room_is_told_as_such(files: tuple[BinaryIO, BinaryIO]) -> None:
    source, _ = files
    extent = extent_of(source, bytes(3 * CHUNK))

    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(SpoolFull):
        seal_file(KEY, extent, FileWriter(full.fileno()))
