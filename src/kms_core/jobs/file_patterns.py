"""URLs of files, and sources that name many files by a pattern. Opens no file.

A source with ``*`` in it is a tree: a directory, a slash, and a pattern of the paths below it.

- ``*`` stands for any run of characters of one name, a leading dot included;
- ``**`` stands alone between slashes, for any number of directories; at the end it is every file below.

A star that is part of a name is written ``%2A``. The target is another directory, ending in a slash, below
which paths stay as they are: encrypt appends ``.age``, decrypt takes it away where it is there. Or the target
is the source itself: then each file takes the place of the one it was made from.
"""

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Self
from urllib.parse import quote, unquote_to_bytes

from kms_core.patterns import STAR, Pattern
from kms_protocol.errors import InvalidRequest, PathRefused
from kms_protocol.wire import JobKind

SCHEME: Final = "file://"
LOCAL_HOSTS: Final = frozenset({"", "localhost"})  # RFC 8089 §2
URL_MAX_CHARS: Final = 3 * 4096  # Linux's PATH_MAX, every byte percent-encoded
TAG: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
TEMPORARY: Final = re.compile(rf"\.kms-{TAG.pattern}\.tmp", re.IGNORECASE)  # some file systems ignore case

_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_UNPRINTABLE: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
SUFFIX: Final = ".age"
ANY_DEPTH: Final = "**"
MOST_PARTS: Final = 64
Positions = frozenset[int]
"""Positions in a pattern: the numbers of the parts that may match the next name; at its end, their count."""


def is_tree(source: str) -> bool:
    """Return whether a source names many files."""
    return "*" in source


def base_of(source: str) -> str:
    """The URL of the directory that a pattern begins at, with its slash; empty where it has none."""
    before = source[: source.index("*")]
    return before[: before.rindex("/") + 1] if "/" in before else ""


@dataclass(frozen=True, slots=True)
class Tree:
    """``base`` is a URL that ends in a slash; ``parts`` has one for each name below it, None for a ``**``."""

    base: str
    parts: tuple[Pattern | None, ...]

    @classmethod
    def parse(cls, source: str) -> Self:
        """Raises InvalidRequest where a pattern could be read in more than one way."""
        base = base_of(source)
        parts = source[len(base) :].split("/")
        if len(parts) > MOST_PARTS or not all(parts):
            raise InvalidRequest(f"A pattern has at most {MOST_PARTS} parts, none of them empty")
        if any(ANY_DEPTH in part and part != ANY_DEPTH for part in parts):
            raise InvalidRequest("In a pattern ** stands alone between slashes: write **/*.csv, not **.csv")
        if parts[-1] == ANY_DEPTH:
            parts.append("*")
        return cls(base, tuple(None if part == ANY_DEPTH else _name_pattern(part) for part in parts))

    def start(self) -> Positions:
        return self._closed({0})

    def step(self, positions: Positions, name: str) -> Positions:
        """The positions after ``name``, a decoded part of a path; empty if nothing below can match."""
        after: set[int] = set()
        for position in positions - {len(self.parts)}:
            part = self.parts[position]
            if part is None:
                after.add(position)
            elif part.matches(name):
                after.add(position + 1)
        return self._closed(after)

    def is_whole(self, positions: Positions) -> bool:
        """Return whether the path so far is one that the pattern names."""
        return len(self.parts) in positions

    def goes_on(self, positions: Positions) -> bool:
        """Return whether the pattern may name something below."""
        return any(position < len(self.parts) for position in positions)

    def names(self, path: str) -> bool:
        """Return whether the pattern names this path below the base, as it stands in a URL."""
        positions = self.start()
        for part in path.split("/"):
            positions = self.step(positions, decoded(part))
        return self.is_whole(positions)

    def _closed(self, positions: set[int]) -> Positions:
        """Add the positions after each ``**``, which may match no directory."""
        found = set(positions)
        for at, part in enumerate(self.parts):
            if at in found and part is None:
                found.add(at + 1)
        return frozenset(found)


def encoded(name: str) -> str:
    """A name of the file system as part of a URL, whatever bytes it has."""
    return quote(os.fsencode(name), safe="")


def decoded(part: str) -> str:
    """Return a name of the file system from a percent-encoded part of a URL."""
    return os.fsdecode(unquote_to_bytes(part))


def target_of(kind: JobKind, source: str, target: str, path: str) -> str:
    """The URL of the result for the file at ``path`` below the base of ``source``."""
    if target == source:
        return base_of(source) + path
    if kind == "encrypt":
        return target + path + SUFFIX
    stem = path.removesuffix(SUFFIX)
    if kind == "decrypt" and stem.rpartition("/")[2]:
        return target + stem
    return target + path


def _name_pattern(part: str) -> Pattern:
    """The pattern of one name: cut before it is decoded, so ``*`` is a wildcard and ``%2A`` a star."""
    return Pattern(tuple(decoded(piece) for piece in part.split(STAR)))


def parse_file_url(url: str) -> PurePosixPath:
    """The absolute path that a ``file:///…`` URL names, percent-decoded once (RFC 8089).

    Raises PathRefused where the path could be read in more than one way: another scheme or host, a query
    or fragment, ``.``, ``..`` or ``//``, an encoded slash, control characters, bytes that are not UTF-8.
    The name of a temporary file of this service is refused too: it may hold another job's plaintext.
    """
    if len(url) > URL_MAX_CHARS or not url.startswith(SCHEME):
        raise PathRefused("Expected file:///path/to/file, at most 4096 bytes long")
    host, slash, rest = url.removeprefix(SCHEME).partition("/")
    if host not in LOCAL_HOSTS or not slash:
        raise PathRefused("A file URL names this host: write file:///path, with three slashes")
    names = path_names(rest)
    if TEMPORARY.fullmatch(names[-1]):
        raise PathRefused("This name is kept for the service's own temporary files")
    return PurePosixPath("/", *names)


def path_names(path: str) -> list[str]:
    """The names of a URL's path, each percent-decoded once. PathRefused if one can be read in two ways."""
    if {"?", "#"} & set(path) or _BAD_ESCAPE.search(path):
        raise PathRefused("In a URL write % as %25, ? as %3F and # as %23")
    return [_decoded(part) for part in path.split("/")]


def _decoded(part: str) -> str:
    try:
        name = unquote_to_bytes(part).decode()
    except ValueError as exc:
        raise PathRefused("A path is written in UTF-8") from exc
    if name in {"", ".", ".."} or "/" in name:
        raise PathRefused(
            "A path has no empty part, no '.' or '..', no encoded slash, and no slash at its end"
        )
    if any(unicodedata.category(char) in _UNPRINTABLE for char in name):
        raise PathRefused("A path has no control characters")
    return name
