"""Segments of the audit log: what a search in one of them may cost."""

import io
import os
from pathlib import Path

import pytest

from kms_core.audit import segments
from support.holes import islands, small_peak, with_hole


class Measured(io.BytesIO):
    """A file that notes the longest line it was asked to give."""

    longest = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self.longest = max(self.longest, len(line))
        return line


def test_a_search_holds_no_more_than_a_line_of_the_longest_kind() -> None:
    """A file of the folder may be huge and have no newline."""
    file = Measured(b"x" * (3 * segments.LONGEST_LINE_BYTES))

    assert segments.offset_of(file, lambda _: True) == 0
    assert file.longest == segments.LONGEST_LINE_BYTES


def test_a_line_that_is_looked_for_is_no_longer_than_the_longest(tmp_path: Path) -> None:
    """Others may have put a hole of any size where the line was."""
    file = tmp_path / "api.jsonl"
    file.write_bytes(b'{"seq":0,"chain":"api","time":""}\n')
    with_hole(file)

    with small_peak():
        assert segments.line_of(file, 1) is None
        assert segments.line_of(file, 0)


def test_blocks_between_holes_take_no_more_than_they_are(tmp_path: Path) -> None:
    """Of each line that a hole makes too long, a MiB would be read and kept."""
    path, count = tmp_path / "islands", 64
    path.write_bytes(b"first\n")
    islands(path, count, 2**20)
    with_hole(path, b"\nlast\n")
    with path.open("rb") as file:
        lines = list(segments.lines_of(file))

    assert [line for line in lines if line in {b"first", b"last"}] == [b"first", b"last"]
    assert sum(map(len, lines)) < 2 * 4096 * count


def test_a_line_of_any_length_is_searched_once_from_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole of a MiB costs nothing, and there may be any number of files: all are read at each start."""
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


@pytest.mark.parametrize("size", [2**20 - 2, 2**20 - 1, 2**20, 2**20 + 1, 2**16 - 1, 2**16, 2**16 + 1])
def test_lines_of_any_length_are_whole_up_to_a_mib(tmp_path: Path, size: int) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\n\n" + b"x" * size + b"\nb\n" + b"y" * (2**20 - 1) + b"\nend")
    with path.open("rb") as file:
        lines = list(segments.lines_of(file))

    assert b"".join(lines[1:-3]) == b"x" * size
    assert len(lines) == 5 or size >= 2**20
    assert (lines[0], lines[-3:]) == (b"a", [b"b", b"y" * (2**20 - 1), b"end"])
