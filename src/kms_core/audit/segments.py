"""The files of a trail: ``<chain>.<number>.jsonl``, each written by one process and nobody after it.

A chain is one process's; its files (segments) follow each other. What is read here is read as it is found:
whether it holds together is for ``verify`` to say.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from kms_core.audit import chain
from kms_core.audit.chain import Line, Tip

NAME: Final = re.compile(r"([a-z][a-z0-9_]{0,31}-\d{8}T\d{6}\.\d{6}Z-\d{1,10})\.(\d{4,9})\.jsonl")
CHAIN: Final = re.compile(r"[a-z][a-z0-9_]{0,31}-\d{8}T\d{6}\.\d{6}Z-\d{1,10}")
LONGEST_LINE_BYTES: Final = 1024 * 1024
_NEAR_END_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """One file of a chain, by its name."""

    chain: str
    number: int
    path: Path

    def opening(self) -> Line | None:
        """Its first line; None if that is not whole, or the file is gone."""
        with suppress(OSError), self.path.open("rb") as file:
            first = file.readline(LONGEST_LINE_BYTES)
            return chain.read(first[:-1]) if first.endswith(b"\n") else None
        return None

    def last(self) -> Line | None:
        """Its last whole line."""
        with suppress(OSError):
            return next(map(chain.read, backwards(self.path)), None)
        return None


def path_of(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}.{number:04d}.jsonl"


def listed(folder: Path) -> list[Segment]:
    """The segments of a folder, by chain and number. Empty if there is no such folder.

    What is no plain file is none of them: a pipe would never be read to its end.
    """
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = ((NAME.fullmatch(path.name), path) for path in paths)
    return sorted(Segment(match[1], int(match[2]), path) for match, path in found if match and path.is_file())


def by_chain(folder: Path) -> dict[str, list[Segment]]:
    chains: dict[str, list[Segment]] = {}
    for segment in listed(folder):
        chains.setdefault(segment.chain, []).append(segment)
    return chains


def is_live(path: Path) -> bool:
    """Whether a process of this machine is writing to the file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone, or a file system without locks
        return False
    return False


def tips(folder: Path, *, but: str, since: float = 0.0) -> dict[str, Tip]:
    """The ends of the other chains, those left out whose closed end another chain already names.

    ``since``: only chains that were written to after that time (seconds since the epoch).
    """
    ends: dict[str, tuple[Tip, bool]] = {}
    witnessed: set[tuple[str, int]] = set()
    for name, files in by_chain(folder).items():
        if name == but or _written_at(files[-1].path) < since:
            continue
        opening, last = files[-1].opening(), files[-1].last()
        if opening is None or last is None:
            continue
        ends[name] = Tip(last.seq, last.head, opening.time), last.kind == chain.CLOSED
        first = opening if len(files) == 1 else files[0].opening()
        witnessed.update((named, tip.seq) for named, tip in (first.heads.items() if first else ()))
    return {
        name: tip for name, (tip, closed) in ends.items() if not (closed and (name, tip.seq) in witnessed)
    }


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -1.0


def backwards(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, last first, without their newline; a torn tail is passed over.

    They end at a line of more than 1 MiB, which nobody of ours wrote.
    """
    with path.open("rb") as file:
        begin = file.seek(0, os.SEEK_END)
        tail = b""
        while begin:
            begin, end = max(0, begin - _NEAR_END_BYTES), begin
            tail = os.pread(file.fileno(), end - begin, begin) + tail
            first, *lines = tail.split(b"\n")
            if lines:
                yield from reversed(lines[:-1])
                tail = first + b"\n"
            if len(tail) > LONGEST_LINE_BYTES:
                return
        if tail.endswith(b"\n"):
            yield tail[:-1]


def offset_of(file: BinaryIO, begins: Callable[[Line], bool]) -> int:
    """Where the first line is for which ``begins`` holds, given that it holds for all after that one.

    The end of the last whole line if there is none. Lines that cannot be read count as those before them.
    """
    low, high = 0, file.seek(0, os.SEEK_END)  # lines that begin in between are undecided
    while low < high:
        middle = (low + high) // 2
        file.seek(max(0, middle - 1))
        if middle:
            file.readline()
        start = file.tell()
        raw = file.readline()
        if start >= high or not raw.endswith(b"\n"):
            high = middle
            continue
        line = chain.read(raw[:-1])
        if line is not None and begins(line):
            high = start
        else:
            low = start + len(raw)
    return low


def line_of(path: Path, seq: int) -> bytes | None:
    """The line of this number, without its newline; None if it is not there."""
    with path.open("rb") as file:
        file.seek(offset_of(file, lambda line: line.seq >= seq))
        raw = file.readline()
    found = chain.read(raw[:-1]) if raw.endswith(b"\n") else None
    return raw[:-1] if found is not None and found.seq == seq else None
