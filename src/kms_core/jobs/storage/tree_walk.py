"""The files below a directory that a pattern names, for jobs over many; opens directories, never a file.

Each directory is opened by its name in the one above, and never through a symbolic link: whatever is
exchanged meanwhile, nothing outside the root is seen.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from kms_core.jobs.file_patterns import States, Tree, encoded
from kms_core.jobs.storage.local_paths import DIRECTORY, TEMPORARY, Roots, file_errors
from kms_protocol.errors import PathRefused, TooLarge

MOST_DEPTH: Final = 128  # a descriptor is open for each


class ListedFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file of a job over many: its path below the base as in a URL, and its size when it was listed.

    ``code`` says why there is nothing to work on: a directory that may not be read stands for what is in it.
    """

    path: str
    size_bytes: int = 0
    code: str = ""


def walk(roots: Roots, tree: Tree) -> Iterator[ListedFile]:
    """Regular files in the order of their names' bytes, each directory in its place among them.

    Links, and what is neither file nor directory, are passed over. Raises PathRefused if the base is no
    directory beneath a root, TooLarge below 128 directories, Unavailable.
    """
    with roots.directory(tree.base) as top:
        yield from _below(tree, _Place(top, "", tree.start(), 0))


@dataclass(frozen=True, slots=True)
class _Place:
    """An open directory: its path below the base, and what of the pattern it may have matched."""

    fd: int
    path: str
    states: States
    depth: int


def _below(tree: Tree, place: _Place) -> Iterator[ListedFile]:
    if place.depth == MOST_DEPTH:
        raise TooLarge(f"There are more than {MOST_DEPTH} directories in one another")
    with file_errors(), os.scandir(place.fd) as entries:
        found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in found:
        states = tree.step(place.states, entry.name)
        path = place.path + encoded(entry.name)
        if entry.is_dir(follow_symlinks=False):
            if tree.goes_on(states):
                yield from _inside(tree, place, entry.name, states)
        elif entry.is_file(follow_symlinks=False) and tree.is_whole(states) and not _is_ours(entry.name):
            yield ListedFile(path, _size(entry))


def _inside(tree: Tree, place: _Place, name: str, states: States) -> Iterator[ListedFile]:
    path = f"{place.path}{encoded(name)}/"
    try:
        with file_errors():
            inner = os.open(name, DIRECTORY, dir_fd=place.fd)
    except PathRefused as exc:
        yield ListedFile(path, code=exc.code)
        return
    try:
        yield from _below(tree, _Place(inner, path, states, place.depth + 1))
    finally:
        os.close(inner)


def _is_ours(name: str) -> bool:
    return TEMPORARY.fullmatch(name) is not None


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # whoever opens it will say so
        return 0
