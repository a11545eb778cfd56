"""Whole reads where the system gives less than was asked for, and room reserved the way a disk likes."""

import os
import tempfile
from pathlib import Path

import pytest

from kms_core.payload import files
from kms_core.payload.files import FileRange, MemoryRange

SHORT = Path("/proc/crypto")  # the kernel gives it a page at a time
MIB = 1024 * 1024


@pytest.mark.skipif(not SHORT.exists() or len(SHORT.read_bytes()) < 8192, reason="needs a long /proc/crypto")
def test_short_reads_are_completed() -> None:
    whole = SHORT.read_bytes()
    views = [memoryview(bytearray(5000)), memoryview(bytearray(3000))]
    with SHORT.open("rb", buffering=0) as file:
        assert os.preadv(file.fileno(), [bytearray(8000)], 100) < 8000
        source = FileRange(file.fileno(), len(whole))
        assert source.read_into(views, 100)
        assert not source.read_into([memoryview(bytearray(5000))] * 2, len(whole) - 9000)

    assert b"".join(views) == whole[100:8100]


def test_a_range_of_memory_is_read_from_a_position_on_and_not_beyond_its_end() -> None:
    source = MemoryRange(memoryview(b"0123456789")).tail(2)
    views = [memoryview(bytearray(3)), memoryview(bytearray(4))]

    assert source.read_into(views, 1)
    assert (b"".join(views), source.size, source.read_at(6, 100)) == (b"3456789", 8, b"89")
    assert not source.read_into(views, 2)


@pytest.mark.parametrize("folder", [Path("/dev/shm"), Path(__file__).parent], ids=["memory", "disk"])
def test_reserving_grows_a_file_and_never_shrinks_it(folder: Path) -> None:
    """Pages of memory are not filled beforehand."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.pwrite(file.fileno(), b"header", 0)
        before = os.fstat(file.fileno()).st_blocks
        files.FileWriter(file.fileno()).reserve(4 * MIB)
        grown = os.fstat(file.fileno())
        files.FileWriter(file.fileno()).reserve(2 * MIB)

        assert grown.st_size == os.fstat(file.fileno()).st_size == 4 * MIB
        assert (grown.st_blocks == before) == (folder == Path("/dev/shm"))
        assert os.pread(file.fileno(), 8, 0) == b"header\0\0"


def test_small_files_are_left_to_grow() -> None:
    with tempfile.TemporaryFile() as file:
        files.FileWriter(file.fileno()).reserve(MIB - 1)

        assert os.fstat(file.fileno()).st_size == 0


def test_a_file_on_no_mount_is_reserved_too() -> None:
    with os.fdopen(os.memfd_create("unnamed"), "r+b") as file:
        files.FileWriter(file.fileno()).reserve(2 * MIB)

        assert os.fstat(file.fileno()).st_size == 2 * MIB


def test_trouble_that_is_not_lack_of_room_keeps_its_name() -> None:
    with Path("/dev/null").open("rb") as unwritable, pytest.raises(OSError, match="Bad file descriptor"):
        files.write_all(unwritable.fileno(), memoryview(b"x"), 0)
