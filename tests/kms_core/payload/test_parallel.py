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
from kms_core.payload.parallel import (
    ParallelOptions,
    copy_run,
    open_file,
    reseal_file,
    seal_file,
    verify_file,
)
from kms_protocol.errors import DecryptFailed, InvalidRequest, JobCancelled, SpoolFull

KEY = bytes(range(32))
OTHER = bytes(range(32, 64))
SIZES = [0, 1, CHUNK, CHUNK + 1, 16 * CHUNK, 16 * CHUNK + 1, 40 * CHUNK - 3]
OPTIONS = {
    "usual": ParallelOptions(),
    "one-thread": ParallelOptions(threads=1),
    "one-chunk": ParallelOptions(slab_chunks=1),
    "odd": ParallelOptions(threads=3, slab_chunks=3),
}


@pytest.fixture
def source() -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        yield file


@pytest.fixture
def target() -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        yield file


def extent_of(file: BinaryIO, data: bytes, offset: int = 0) -> FileRange:
    """``data`` behind ``offset`` bytes of something else."""
    file.write(bytes(offset) + data)
    file.flush()
    return FileRange(file.fileno(), len(data), offset)


def content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_files_are_sealed_opened_and_resealed_as_in_memory(
    source: BinaryIO, target: BinaryIO, size: int, options: ParallelOptions
) -> None:
    plaintext = os.urandom(size)
    seal_file(KEY, extent_of(source, plaintext, 3), FileWriter(target.fileno()), bytes(216), options)
    assert content(target) == bytes(216) + stream.seal(KEY, plaintext)

    sealed = FileRange(target.fileno(), stream.sealed_size(size), 216)
    verify_file(KEY, sealed, options)
    with tempfile.TemporaryFile() as opened:
        open_file(KEY, sealed, FileWriter(opened.fileno()), options=options)
        assert content(opened) == plaintext
    with tempfile.TemporaryFile() as resealed:
        reseal_file((KEY, OTHER), sealed, FileWriter(resealed.fileno()), bytes(100), options)
        assert content(resealed) == bytes(100) + stream.seal(OTHER, plaintext)


@pytest.mark.parametrize("size", SIZES)
def test_a_run_is_copied_as_it_is(source: BinaryIO, target: BinaryIO, size: int) -> None:
    data = os.urandom(size)
    copy_run(extent_of(source, data, 3), FileWriter(target.fileno()), 7, ParallelOptions(slab_chunks=2))

    assert content(target) == (bytes(7) + data if size else b"")


@pytest.mark.parametrize("chunk", [0, 5, 8])
def test_a_forged_slab_is_refused_and_never_written(source: BinaryIO, target: BinaryIO, chunk: int) -> None:
    sealed = bytearray(stream.seal(KEY, b"s" * (8 * CHUNK + 9)))
    sealed[chunk * SEALED_CHUNK + 2] ^= 1
    extent, options = extent_of(source, bytes(sealed)), ParallelOptions(slab_chunks=1)

    with pytest.raises(DecryptFailed):
        verify_file(KEY, extent, options)
    with pytest.raises(DecryptFailed):
        open_file(KEY, extent, FileWriter(target.fileno()), options=options)
    assert not any(content(target)[chunk * CHUNK : (chunk + 1) * CHUNK])
    with tempfile.TemporaryFile() as resealed:
        with pytest.raises(DecryptFailed):
            reseal_file((KEY, OTHER), extent, FileWriter(resealed.fileno()), options=options)
        assert not any(content(resealed)[chunk * SEALED_CHUNK : (chunk + 1) * SEALED_CHUNK])


@pytest.mark.parametrize("size", [0, 15, SEALED_CHUNK, SEALED_CHUNK + 16, 3 * SEALED_CHUNK])
def test_a_cut_file_is_refused(source: BinaryIO, target: BinaryIO, size: int) -> None:
    extent = extent_of(source, stream.seal(KEY, bytes(3 * CHUNK + 1))[:size])

    with pytest.raises(DecryptFailed):
        open_file(KEY, extent, FileWriter(target.fileno()))
    with pytest.raises(DecryptFailed):
        verify_file(KEY, extent)


def test_a_file_that_ends_before_its_extent_is_refused(source: BinaryIO, target: BinaryIO) -> None:
    extent = extent_of(source, stream.seal(KEY, bytes(3 * CHUNK)))
    os.ftruncate(source.fileno(), SEALED_CHUNK)

    with pytest.raises(DecryptFailed):
        open_file(KEY, extent, FileWriter(target.fileno()))
    with pytest.raises(InvalidRequest):
        copy_run(extent, FileWriter(target.fileno()))


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
    source: BinaryIO, target: BinaryIO, change: Callable[[int], None], threads: int
) -> None:
    extent = extent_of(source, bytes(5 * CHUNK))
    waiting = iter([change])

    def once() -> None:
        for act in waiting:
            act(extent.fd)

    options = ParallelOptions(threads, slab_chunks=1, check=once)
    with pytest.raises(InvalidRequest, match="changed while it was read"):
        seal_file(KEY, extent, FileWriter(target.fileno()), options=options)


@pytest.mark.parametrize("size", [4, 6])
def test_a_source_of_another_size_is_refused_before_anything_is_written(
    source: BinaryIO, target: BinaryIO, size: int
) -> None:
    extent_of(source, b"12345")

    with pytest.raises(InvalidRequest):
        seal_file(KEY, FileRange(source.fileno(), size), FileWriter(target.fileno()))
    assert content(target) == b""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_raised_check_stops_every_thread_and_comes_through(
    source: BinaryIO, target: BinaryIO, threads: int
) -> None:
    extent = extent_of(source, bytes(60 * CHUNK))
    calls = []

    def cancelled() -> None:
        calls.append(threading.get_ident())
        if len(calls) > 10:
            raise JobCancelled

    options = ParallelOptions(threads, slab_chunks=1, check=cancelled)
    with pytest.raises(JobCancelled):
        seal_file(KEY, extent, FileWriter(target.fileno()), options=options)
    assert len(calls) <= 10 + threads


def test_progress_adds_up_to_the_plaintext(source: BinaryIO, target: BinaryIO) -> None:
    done: list[int] = []
    two, four = (ParallelOptions(slab_chunks=chunks, progress=done.append) for chunks in (2, 4))
    size = 9 * CHUNK + 5
    seal_file(KEY, extent_of(source, bytes(size)), FileWriter(target.fileno()), options=two)
    verify_file(KEY, FileRange(target.fileno(), stream.sealed_size(size)), four)

    assert sorted(done) == sorted([2 * CHUNK] * 4 + [CHUNK + 5] + [4 * CHUNK] * 2 + [CHUNK + 5])


def test_an_extent_reads_within_itself(source: BinaryIO) -> None:
    extent_of(source, b"payload and more", 3)

    assert FileRange(source.fileno(), 7, 3).read_at(4, 100) == b"oad"


def test_no_room_is_told_as_such(source: BinaryIO) -> None:
    extent = extent_of(source, bytes(3 * CHUNK))

    with Path("/dev/full").open("r+b", buffering=0) as full, pytest.raises(SpoolFull):
        seal_file(KEY, extent, FileWriter(full.fileno()))
