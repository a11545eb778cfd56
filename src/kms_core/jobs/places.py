"""Where jobs read and write: the same seams over files beneath the roots and over objects in buckets.

What differs between them is how a target that nobody sees yet is made, and how it is put in place; the work
in between (``jobs/files.py``) knows neither.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from kms_core.envelope.extents import Reader, Writer
from kms_core.envelope.slabs import Pace
from kms_core.jobs.buckets import SCHEME, Buckets
from kms_core.jobs.leftovers import Notes
from kms_core.jobs.model import Commit
from kms_core.jobs.objects import ObjectSource, ObjectTarget
from kms_core.jobs.paths import Roots
from kms_core.jobs.rooted import RootedSource, RootedTarget
from kms_core.jobs.trees import Tree
from kms_core.jobs.walk import Found, walk

_ANY = "any"  # a name below a directory


class Open(Protocol):
    """Something that its ``with`` block closes."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Source(Open, Protocol):
    """Something to read, pinned as it was when it was opened."""

    @property
    def reader(self) -> Reader: ...
    @property
    def size_bytes(self) -> int: ...
    def check_unchanged(self) -> None:
        """Raises InvalidRequest if it is another by now; ask after the last read."""


class Pending(Open, Protocol):
    """A target in the making, which nobody sees."""

    @property
    def writer(self) -> Writer: ...
    def copy(self, reader: Reader, at: int, pace: Pace) -> None:
        """Write all of ``reader`` from ``at`` on, to the end of the target, as cheaply as it can be done."""

    def settle(self, source: Source, *, in_place: bool) -> Commit:
        """Describe what will be put in place; nothing may be written afterwards.

        ``in_place``: the result takes the place of its source, and of nothing that came after it.
        """

    def finish(self, commit: Commit) -> None:
        """As the target's ``finish``, with what only the process that did the work has."""

    def discard(self) -> None:
        """Leave nothing of it behind."""


class Target(Protocol):
    """The place of a job's result."""

    def prepare(self, fence: int) -> Pending:
        """Begin an attempt. Raises TargetExists, PathRefused, SpoolFull, Unavailable."""

    def finish(self, commit: Commit) -> bool:
        """Put in place what a commit describes; once it is there, doing it again changes nothing.

        False if the work must be done again for that. Raises TargetExists, PathRefused, Unavailable.
        """

    def give_up(self, commit: Commit) -> None:
        """The commit was refused: remove what it would have put in place."""

    def sweep(self, fence: int) -> None:
        """Remove what attempts before this fence left when they were killed."""


@dataclass(frozen=True, slots=True)
class Places:
    """All that jobs may name: ``file://`` beneath the roots, ``s3://`` in the buckets."""

    roots: Roots
    buckets: Buckets
    notes: Notes

    def check(self, url: str) -> None:
        """Raises PathRefused unless jobs may write there. Looks at nothing."""
        if url.startswith(SCHEME):
            self.buckets.writing(url)
        else:
            self.roots.check(url)

    def open_source(self, url: str) -> Source:
        """Raises PathRefused if it is not there or not allowed, Unavailable."""
        if url.startswith(SCHEME):
            return ObjectSource.at(url, self.buckets)
        return RootedSource(self.roots.open_source(url))

    def target(self, url: str, job_id: str, *, overwrite: bool) -> Target:
        """The place of a job's result; looks at nothing."""
        if url.startswith(SCHEME):
            return ObjectTarget(url, job_id, overwrite, self.buckets, self.notes)
        return RootedTarget(url, job_id, overwrite, self.roots)

    def check_base(self, url: str) -> None:
        """Raises PathRefused unless jobs may read what is below this URL, which ends in a slash."""
        if url.startswith(SCHEME):
            self.buckets.reading(f"{url}{_ANY}")
        else:
            with self.roots.directory(url):
                pass

    def check_directory(self, url: str) -> None:
        """The same for writing; looks at nothing."""
        if url.startswith(SCHEME):
            self.buckets.writing(f"{url}{_ANY}")
        else:
            self.roots.check_directory(url)

    def make_parents(self, url: str) -> None:
        """Make the directories that a target lacks. Raises PathRefused, SpoolFull, Unavailable."""
        if not url.startswith(SCHEME):
            self.roots.make_parents(url)

    def files(self, tree: Tree) -> Iterator[Found]:
        """What a pattern names, in a fixed order. Raises PathRefused, TooLarge, Unavailable."""
        if not tree.base.startswith(SCHEME):
            yield from walk(self.roots, tree)
            return
        above = tree.base.count("/")  # a key may be written in several ways, but none hides a slash
        for url, size in self.buckets.listing(tree.base):
            path = url.split("/", above)[above]
            if tree.names(path):
                yield Found(path, size)


def is_remote(url: str) -> bool:
    """Whether reading or writing there keeps a thread waiting more than working."""
    return url.startswith(SCHEME)
