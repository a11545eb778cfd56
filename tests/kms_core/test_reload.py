"""Values of files, read again when the files change."""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from kms_core.reload import AGAIN_S, Reloaded
from support.waiting import until

LARGE = b"x" * 300_000


class ReloadedFile:
    """A value that is the length of a file, and what was told of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.file.write_bytes(b"12")
        self.now = 0.0
        self.may_read = Event()
        self.may_read.set()
        self.reads = 0
        self.done: list[int] = []
        self.failed: list[str] = []
        self.value = Reloaded(
            [file],
            self._read,
            done=self.done.append,
            failed=lambda exc: self.failed.append(type(exc).__name__),
            clock=lambda: self.now,
        )

    def _read(self) -> int:
        self.reads += 1
        assert self.may_read.wait(30)
        content = self.file.read_bytes()
        if content.startswith(b"bad"):
            raise ValueError
        return len(content)

    def put(self, content: bytes) -> None:
        made = self.file.with_suffix(".made")
        made.write_bytes(content)
        made.replace(self.file)


@pytest.fixture
def reloaded(tmp_path: Path) -> ReloadedFile:
    return ReloadedFile(tmp_path / "file")


def test_a_small_file_is_read_at_once_and_only_when_it_has_changed(reloaded: ReloadedFile) -> None:
    assert [reloaded.value.current() for _ in range(3)] == [2, 2, 2]
    reloaded.put(b"123")

    assert [reloaded.value.current() for _ in range(3)] == [3, 3, 3]
    assert (reloaded.reads, reloaded.done) == (2, [3])


def test_a_file_with_the_inode_size_and_time_of_the_one_before_is_read_again(reloaded: ReloadedFile) -> None:
    """As a copy that keeps times may have; the clock of the kernel ticks a few milliseconds apart."""
    before = reloaded.file.stat()
    while (after := reloaded.file.stat()).st_ctime_ns == before.st_ctime_ns:
        reloaded.file.write_bytes(b"34")
        os.utime(reloaded.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (
        after.st_ino,
        after.st_size,
        after.st_mtime_ns,
    )

    reloaded.value.current()
    assert reloaded.reads == 2


def test_while_a_large_file_is_read_callers_get_the_old_value(reloaded: ReloadedFile) -> None:
    reloaded.put(LARGE)
    reloaded.may_read.clear()
    assert [reloaded.value.current() for _ in range(3)] == [2, 2, 2]
    assert reloaded.failed == [], "a caller waited for it"
    until(lambda: reloaded.reads == 2, "the reading")
    reloaded.value.current()
    assert reloaded.reads == 2  # one reader at a time
    reloaded.may_read.set()

    until(lambda: reloaded.value.current() == len(LARGE), "the new value")
    assert reloaded.done == [len(LARGE)]


def test_a_file_that_changes_while_it_is_read_is_read_again(reloaded: ReloadedFile) -> None:
    reloaded.put(LARGE)
    reloaded.may_read.clear()
    reloaded.value.current()
    reloaded.put(b"1234")
    reloaded.may_read.set()

    until(lambda: reloaded.value.current() == 4, "the newest value")


@pytest.mark.parametrize(("spoil", "error"), [("bad", "ValueError"), ("gone", "FileNotFoundError")])
def test_a_file_that_cannot_be_used_is_told_once_a_minute_and_leaves_the_value(
    reloaded: ReloadedFile, spoil: str, error: str
) -> None:
    changes: dict[str, Callable[[], None]] = {
        "bad": lambda: reloaded.put(b"bad"),
        "gone": reloaded.file.unlink,
    }
    changes[spoil]()
    assert [reloaded.value.current() for _ in range(3)] == [2, 2, 2]
    assert reloaded.failed == [error]
    reloaded.now += AGAIN_S - 1
    reloaded.value.current()
    assert reloaded.failed == [error]
    reloaded.now += 1
    assert [reloaded.value.current() for _ in range(3)] == [2, 2, 2]
    assert reloaded.failed == [error, error]
    reloaded.put(b"12345")

    assert reloaded.value.current() == 5
    reloaded.now += AGAIN_S
    assert reloaded.value.current() == 5
    assert reloaded.done == [5]
