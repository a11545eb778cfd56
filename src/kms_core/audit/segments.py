"""Segments: the files ``<chain>.<number>.jsonl`` of an audit log, listed and read.

The segments of a chain follow each other, and a chain belongs to one process. Functions that read segments
check nothing: ``verification`` does.
"""

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kms_core.audit import chain
from kms_core.audit.chain import ChainHead, ChainLine
from kms_core.audit.keys import PublicKeys
from kms_protocol.small_files import at_once

CHAIN: Final = re.compile(r"[a-z][a-z0-9_]{0,31}-\d{8}T\d{6}\.\d{6}Z-\d{1,10}")
NAME: Final = re.compile(rf"({CHAIN.pattern})\.(\d{{4,9}})\.jsonl")
LONGEST_LINE_BYTES: Final = 1024 * 1024
MAX_HEADS: Final = 256
_BLOCK_BYTES: Final = 16 * 1024
_SEARCHED_BYTES: Final = 1024 * 1024
_NOWHERE: Final = frozenset({errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})  # of a broken link
_SEARCHED_FILES: Final = 4  # of a chain: one that ends without a signed line is rare


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """One segment of a chain, by its file name."""

    chain: str
    number: int
    path: Path

    def opening(self) -> ChainLine | None:
        """The first line; None if it cannot be read."""
        with suppress(OSError):
            return next(map(chain.read, lines_of(self.path)), None)
        return None

    def last(self) -> ChainLine | None:
        """The last whole line."""
        with suppress(OSError):
            return next(map(chain.read, backwards(self.path)), None)
        return None


def path_of(folder: Path, name: str, number: int) -> Path:
    """Return the path of a segment."""
    return folder / f"{name}.{number:04d}.jsonl"


def listed(folder: Path) -> list[Segment]:
    """The segments of a folder, by chain and number; none if the folder does not exist.

    Only plain files count.
    """
    names: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_file(entry)]  # without a call for each
    found = sorted(filter(None, map(NAME.fullmatch, names)), key=lambda each: (each[1], int(each[2])))
    return [Segment(each[1], int(each[2]), folder / each[0]) for each in found]


def is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a plain file; False for a broken link.

    True for one that is out of reach: reading it says why.
    """
    try:
        return entry.is_file()
    except OSError as exc:
        return exc.errno not in _NOWHERE


def by_chain(folder: Path) -> dict[str, list[Segment]]:
    """Return the segments of a folder by chain, each in order."""
    chains: dict[str, list[Segment]] = {}
    for segment in listed(folder):
        chains.setdefault(segment.chain, []).append(segment)
    return chains


def is_live(path: Path) -> bool:
    """Return whether a process of this machine holds the file open for writing."""
    try:
        with open(path, "rb", opener=at_once) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as exc:  # else it is gone, or a file system without locks
        return isinstance(exc, BlockingIOError)
    return False


def chain_heads(folder: Path, keys: PublicKeys, *, but: str, since: float = 0.0) -> dict[str, ChainHead]:
    """The heads of the other chains: the last signed line of each of the 256 that were written to last.

    Lines after a signed line are not named, since any program that can write to the folder may have appended
    them. A chain without signed lines is named by line 0, after all others. Heads that the first line
    of a signed chain names already are left out. ``since``: only chains that were written to after that time
    (seconds since the epoch).
    """
    written = [
        (_written_at(files[-1].path), files) for name, files in by_chain(folder).items() if name != but
    ]
    signed: dict[str, ChainHead] = {}
    unsigned: dict[str, ChainHead] = {}
    named: set[tuple[str, int]] = set()
    for at, files in sorted(written, key=lambda each: each[0], reverse=True):
        if at < since or len(signed) == MAX_HEADS:
            break
        opening, end = files[0].opening(), _signed_end(files, keys)
        if end is not None:
            signed[files[0].chain] = ChainHead(end.seq, end.head, end.opened)
            named.update((name, head.seq) for name, head in (opening.heads.items() if opening else ()))
        elif opening is not None and not opening.seq:
            unsigned[files[0].chain] = ChainHead(opening.seq, opening.head, opening.time)
    heads = [(name, head) for name, head in (signed | unsigned).items() if (name, head.seq) not in named]
    return dict(heads[:MAX_HEADS])


def _signed_end(files: Sequence[Segment], keys: PublicKeys) -> ChainLine | None:
    """The last signed line of a chain, if it is near the end of one of its last segments."""
    for segment in files[: -_SEARCHED_FILES - 1 : -1]:
        with suppress(OSError):
            found = chain.read(newest_signed(segment.path, keys)[0])
            if found is not None and found.chain == segment.chain:
                return found
    return None


def newest_signed(path: Path, keys: PublicKeys) -> tuple[bytes, int]:
    """The last line of a file that one of the keys signed, and the number of whole lines after it.

    The line is empty if there is none in the last MiB. Raises OSError.
    """
    left, after = _SEARCHED_BYTES, 0
    for line in backwards(path):
        if chain.SIGNATURE in line and keys.signed(line):
            return line, after
        after, left = after + 1, left - len(line) - 1
        if left <= 0:
            break
    return b"", after


def _written_at(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return -1.0


def backwards(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, last first, without their newline; a torn last line is left out.

    Stops at a line of more than 1 MiB; the service writes none.
    """
    begin = path.stat().st_size
    rest: bytes | None = None  # the end of a line that begins before the block
    while begin:
        begin, end = max(0, begin - max(_BLOCK_BYTES, len(rest or b""))), begin  # doubled in a long line
        with open(path, "rb", opener=at_once) as file:  # each time: there may be many chains
            block = os.pread(file.fileno(), end - begin, begin)
        if rest is None:
            block, newline, _ = block.rpartition(b"\n")
            if not newline:
                continue
            rest = b""
        rest, *lines = (block + rest).split(b"\n")
        yield from reversed(lines)
        if len(rest) > LONGEST_LINE_BYTES:
            return
    if rest is not None:
        yield rest


def lines_of(path: Path, begin: int = 0) -> Iterator[bytes]:
    """The lines of a file from an offset on, without newlines and empty lines, and the torn one at its end.

    Stops at a line of more than 1 MiB; the service writes none. Raises OSError.
    """
    rest = b""
    while len(rest) <= LONGEST_LINE_BYTES:
        with open(path, "rb", opener=at_once) as file:  # each time: there may be many chains
            block = os.pread(file.fileno(), _BLOCK_BYTES, begin)
        if not block:
            break
        begin += len(block)
        *lines, rest = (rest + block).split(b"\n")
        yield from filter(None, lines)
    if rest:
        yield rest


def offset_of(path: Path, begins: Callable[[ChainLine], bool]) -> int:
    """The offset of the first line for which ``begins`` holds, given that it holds for all later lines.

    The end of the last whole line if there is none. An unreadable line counts as the line before it. Raises
    OSError.
    """
    with open(path, "rb", opener=at_once) as file:
        low, high = 0, file.seek(0, os.SEEK_END)  # lines that begin in between are undecided
        while low < high:
            middle = (low + high) // 2 if low else 0  # often all lines follow: the first is looked at first
            file.seek(max(0, middle - 1))
            if middle:
                file.readline(LONGEST_LINE_BYTES)
            start = file.tell()
            raw = file.readline(LONGEST_LINE_BYTES)
            if start >= high or not raw.endswith(b"\n"):
                high = middle
                continue
            line = chain.read(raw[:-1])
            if line is not None and begins(line):
                high = start
            else:
                low = start + len(raw)
    return low


def line_of(path: Path, seq: int) -> bytes:
    """The line with this number, without its newline; empty if the file does not have it. Raises OSError."""
    line = next(lines_of(path, offset_of(path, lambda line: line.seq >= seq)), b"")
    found = chain.read(line)
    return line if found is not None and found.seq == seq else b""
