"""Segments of the audit log: what a search in one of them may cost."""

import os
from pathlib import Path

import pytest

from kms_core.audit import segments


def test_a_line_of_any_length_is_searched_once_from_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be any number of files, and all are read at each start."""
    path = tmp_path / "long"
    path.write_bytes(b"first\n" + b"x" * 900_000 + b"\nlast\n")
    read: list[int] = []

    def noted(fd: int, size: int, at: int) -> bytes:
        read.append(size)
        return pread(fd, size, at)

    pread = os.pread
    monkeypatch.setattr(os, "pread", noted)

    assert [len(line) for line in segments.backwards(path)] == [4, 900_000, 5]
    assert len(read) <= 10, "all that was read is looked through after each of them"


@pytest.mark.parametrize("size", [2**14 - 1, 2**14, 2**14 + 1, 900_000, 2**20])
def test_lines_are_whole_up_to_a_mib(tmp_path: Path, size: int) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\n\n" + b"x" * size + b"\nb\nend")

    assert list(segments.lines_of(path)) == [b"a", b"x" * size, b"b", b"end"]
    assert list(segments.lines_of(path, 3)) == [b"x" * size, b"b", b"end"]


def test_reading_stops_at_a_longer_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\n" + b"x" * 3 * 2**20 + b"\nb\n")

    first, junk = segments.lines_of(path)
    assert (first, set(junk)) == (b"a", {ord("x")})
    assert list(segments.backwards(path)) == [b"b"]
