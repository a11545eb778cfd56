"""Sources that name many files: what a pattern means, and where the result of each file goes; opens no file.

A source with ``*`` in it is a tree: a directory, a slash, and a pattern of the paths below it.

- ``*`` stands for any run of characters of one name, a leading dot included;
- ``**`` stands alone between slashes, for any number of directories; at the end it is every file below.

A star that is part of a name is written ``%2A``. The target is another directory, ending in a slash, below
which paths stay as they are: encrypt appends ``.age``, decrypt takes it away where it is there. Or the target
is the source itself: then each file takes the place of the one it was made from.
"""

import os
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import quote, unquote_to_bytes

from kms_core.patterns import STAR, Pattern
from kms_protocol.errors import InvalidRequest
from kms_protocol.wire import JobKind

SUFFIX: Final = ".age"
ANY_DEPTH: Final = "**"
MOST_PARTS: Final = 64
States = frozenset[int]
"""How much of a pattern the directories so far may have matched."""


def is_tree(source: str) -> bool:
    return "*" in source


@dataclass(frozen=True, slots=True)
class Tree:
    """``base`` is a URL that ends in a slash; ``pattern`` has a part for each name below it."""

    base: str
    pattern: tuple[str, ...]
    _names: tuple[Pattern, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_names", tuple(map(_name_pattern, self.pattern)))

    @classmethod
    def parse(cls, source: str) -> Self:
        """Raises InvalidRequest where a pattern could be read in more than one way."""
        before = source[: source.index("*")]
        base = before[: before.rindex("/") + 1] if "/" in before else ""
        parts = source[len(base) :].split("/")
        if len(parts) > MOST_PARTS or not all(parts):
            raise InvalidRequest(f"A pattern has at most {MOST_PARTS} parts, none of them empty")
        if any(ANY_DEPTH in part and part != ANY_DEPTH for part in parts):
            raise InvalidRequest("In a pattern ** stands alone between slashes: write **/*.csv, not **.csv")
        if parts[-1] == ANY_DEPTH:
            parts.append("*")
        return cls(base, tuple(parts))

    def start(self) -> States:
        return self._closed({0})

    def step(self, states: States, name: str) -> States:
        """What may have been matched with ``name``, a decoded part of a path; empty: nothing below can be."""
        after: set[int] = set()
        for state in states:
            if state < len(self.pattern):
                if self.pattern[state] == ANY_DEPTH:
                    after.add(state)
                elif self._names[state].matches(name):
                    after.add(state + 1)
        return self._closed(after)

    def is_whole(self, states: States) -> bool:
        """Whether the path so far is one that the pattern names."""
        return len(self.pattern) in states

    def goes_on(self, states: States) -> bool:
        """Whether the pattern may name something below."""
        return any(state < len(self.pattern) for state in states)

    def names(self, path: str) -> bool:
        """Whether the pattern names this path below the base, as it stands in a URL."""
        states = self.start()
        for part in path.split("/"):
            states = self.step(states, decoded(part))
        return self.is_whole(states)

    def _closed(self, states: set[int]) -> States:
        """With what follows a ``**`` that matches no directory; one step for each part of the pattern."""
        found = set(states)
        for at, part in enumerate(self.pattern):
            if at in found and part == ANY_DEPTH:
                found.add(at + 1)
        return frozenset(found)


def encoded(name: str) -> str:
    """A name of the file system as part of a URL, whatever bytes it has."""
    return quote(os.fsencode(name), safe="")


def decoded(part: str) -> str:
    return os.fsdecode(unquote_to_bytes(part))


def target_of(kind: JobKind, source: str, target: str, tree: Tree, path: str) -> str:
    """The URL of the result for the file at ``path`` below the base of ``source``."""
    if target == source:
        return tree.base + path
    if kind == "encrypt":
        return target + path + SUFFIX
    stem = path.removesuffix(SUFFIX)
    if kind == "decrypt" and stem.rpartition("/")[2]:
        return target + stem
    return target + path


def _name_pattern(part: str) -> Pattern:
    """The pattern of one name: cut before it is decoded, so ``*`` is a wildcard and ``%2A`` a star."""
    return Pattern(tuple(decoded(piece) for piece in part.split(STAR)))
