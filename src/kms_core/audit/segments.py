"""The files of a trail: ``<chain>.<number>.jsonl``, each written by one process and nobody after it.

A chain is one process's; its files (segments) follow each other. What is read here is read as it is found:
whether it holds together is for ``verify`` to say.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from kms_core.audit import chain
from kms_core.audit.chain import ChainHead, ChainLine
from kms_core.audit.keys import PublicKeys

NAME: Final = re.compile(r"([a-z][a-z0-9_]{0,31}-\d{8}T\d{6}\.\d{6}Z-\d{1,10})\.(\d{4,9})\.jsonl")
CHAIN: Final = re.compile(r"[a-z][a-z0-9_]{0,31}-\d{8}T\d{6}\.\d{6}Z-\d{1,10}")
LONGEST_LINE_BYTES: Final = 1024 * 1024
MOST_TIPS: Final = 256
_NEAR_END_BYTES: Final = 16 * 1024
_SEARCHED_BYTES: Final = 1024 * 1024
_SEARCHED_FILES: Final = 4  # of a chain: one that ends without a signed line is rare


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """One file of a chain, by its name."""

    chain: str
    number: int
    path: Path

    def opening(self) -> ChainLine | None:
        """Its first line; None if that is not whole, or the file is gone."""
        with suppress(OSError):
            return chain.read(first_line(self.path))
        return None

    def last(self) -> ChainLine | None:
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
        with os.scandir(folder) as entries:  # which knows what is a file without another call for each
            names = [entry.name for entry in entries if _is_file(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (match for match in map(NAME.fullmatch, names) if match)
    return sorted(Segment(match[1], int(match[2]), folder / match[0]) for match in found)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """False for a link that leads nowhere, too."""
    with suppress(OSError):
        return entry.is_file()
    return False


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


def tips(folder: Path, keys: PublicKeys, *, but: str, since: float = 0.0) -> dict[str, ChainHead]:
    """The ends of the other chains, of the 256 that were written to last: their last signed lines.

    Nothing behind a signed line is named: anybody who can write to the folder may have appended it. A chain
    without signed lines is named by its first line, after all others. Left out are ends that the first line
    of a signed chain names already. ``since``: only chains that were written to after that time (seconds
    since the epoch).
    """
    written = [
        (_written_at(files[-1].path), files) for name, files in by_chain(folder).items() if name != but
    ]
    signed: dict[str, ChainHead] = {}
    unsigned: dict[str, ChainHead] = {}
    named: set[tuple[str, int]] = set()
    for at, files in sorted(written, key=lambda each: each[0], reverse=True):
        if at < since or len(signed) == MOST_TIPS:
            break
        opening, end = files[0].opening(), _signed_end(files, keys)
        if end is not None:
            signed[files[0].chain] = ChainHead(end.seq, end.head, end.opened)
            named.update((name, tip.seq) for name, tip in (opening.heads.items() if opening else ()))
        elif opening is not None:
            unsigned[files[0].chain] = ChainHead(opening.seq, opening.head, opening.time)
    ends = [(name, tip) for name, tip in (signed | unsigned).items() if (name, tip.seq) not in named]
    return dict(ends[:MOST_TIPS])


def _signed_end(files: Sequence[Segment], keys: PublicKeys) -> ChainLine | None:
    """The last signed line of a chain, if it is near the end of one of its last files."""
    for segment in files[: -_SEARCHED_FILES - 1 : -1]:
        with suppress(OSError):
            found = chain.read(newest_signed(segment.path, keys)[0])
            if found is not None and found.chain == segment.chain:
                return found
    return None


def newest_signed(path: Path, keys: PublicKeys) -> tuple[bytes, int]:
    """The last line of a file that one of the keys signed, and how many whole lines stand behind it.

    Empty if none is within the last MiB. Raises OSError.
    """
    left, behind = _SEARCHED_BYTES, 0
    for line in backwards(path):
        if chain.SIGNATURE in line and keys.signed(line):
            return line, behind
        behind, left = behind + 1, left - len(line) - 1
        if left <= 0:
            break
    return b"", behind


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


def offset_of(file: BinaryIO, begins: Callable[[ChainLine], bool]) -> int:
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


def first_line(path: Path) -> bytes:
    """The first line of a file, without its newline; empty if that is not whole. Raises OSError."""
    with path.open("rb") as file:
        first = file.readline(LONGEST_LINE_BYTES)
    return first[:-1] if first.endswith(b"\n") else b""


def line_of(path: Path, seq: int) -> bytes | None:
    """The line of this number, without its newline; None if it is not there."""
    with path.open("rb") as file:
        file.seek(offset_of(file, lambda line: line.seq >= seq))
        raw = file.readline()
    found = chain.read(raw[:-1]) if raw.endswith(b"\n") else None
    return raw[:-1] if found is not None and found.seq == seq else None
