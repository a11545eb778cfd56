"""Values of files, read again when the files change."""

from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from kms_core.reload import AGAIN_S, Reloaded
from support.waiting import until

LARGE = b"x" * 300_000


class Site:
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
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "file")


def test_a_small_file_is_read_at_once_and_only_when_it_has_changed(site: Site) -> None:
    assert [site.value.current() for _ in range(3)] == [2, 2, 2]
    site.put(b"123")

    assert [site.value.current() for _ in range(3)] == [3, 3, 3]
    assert (site.reads, site.done) == (2, [3])


def test_while_a_large_file_is_read_callers_get_the_old_value(site: Site) -> None:
    site.put(LARGE)
    site.may_read.clear()
    assert [site.value.current() for _ in range(3)] == [2, 2, 2]
    assert site.failed == [], "a caller waited for it"
    until(lambda: site.reads == 2, "the reading")
    site.value.current()
    assert site.reads == 2  # one reader at a time
    site.may_read.set()

    until(lambda: site.value.current() == len(LARGE), "the new value")
    assert site.done == [len(LARGE)]


def test_a_file_that_changes_while_it_is_read_is_read_again(site: Site) -> None:
    site.put(LARGE)
    site.may_read.clear()
    site.value.current()
    site.put(b"1234")
    site.may_read.set()

    until(lambda: site.value.current() == 4, "the newest value")


@pytest.mark.parametrize(("spoil", "error"), [("bad", "ValueError"), ("gone", "FileNotFoundError")])
def test_a_file_that_cannot_be_used_is_told_once_a_minute_and_leaves_the_value(
    site: Site, spoil: str, error: str
) -> None:
    changes: dict[str, Callable[[], None]] = {"bad": lambda: site.put(b"bad"), "gone": site.file.unlink}
    changes[spoil]()
    assert [site.value.current() for _ in range(3)] == [2, 2, 2]
    assert site.failed == [error]
    site.now += AGAIN_S - 1
    site.value.current()
    assert site.failed == [error]
    site.now += 1
    assert [site.value.current() for _ in range(3)] == [2, 2, 2]
    assert site.failed == [error, error]
    site.put(b"12345")

    assert site.value.current() == 5
    site.now += AGAIN_S
    assert site.value.current() == 5
    assert site.done == [5]
