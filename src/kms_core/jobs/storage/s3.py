"""Jobs to and from objects: a source pinned to one version, a target that appears once, whoever finishes it.

A large target is a multipart upload, which any worker can complete: the commit names it and what its parts
are. A small one is a single write, of bytes that die with the worker: then the work is done again, and the
condition on the write lets only the first of several attempts through. The metadata of an object has the id
of its job and 128 random bits of the attempt, which the signed commit has too: so a worker that finds the
place taken recognises the work of this commit, and takes no other object for it.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import msgspec

from kms_core.jobs.model import SWEPT, Commit
from kms_core.jobs.storage.buckets import Buckets
from kms_core.jobs.storage.multipart_journal import MultipartJournal
from kms_core.payload.files import RangeSource
from kms_core.payload.parallel import ParallelOptions, copy_run
from kms_core.s3.bucket import ALWAYS, Completion, If, UploadedPart
from kms_core.s3.multipart import Assembly, ObjectReader, digest
from kms_protocol.errors import KmsError, PathRefused, TargetExists, Unavailable

_LOST: Final = "The result was removed or replaced before it was in place: run the job again"
_ANY: Final = "*"
_MARK_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class ObjectSource:
    """An object, as it was when it was asked for. Nothing is held open."""

    reader: ObjectReader

    @classmethod
    def at(cls, url: str, buckets: Buckets) -> "ObjectSource":
        """Raises PathRefused if it is not there or not allowed, Unavailable."""
        bucket, key = buckets.reading(url)
        found = bucket.head(key)
        if found is None:
            raise PathRefused("There is nothing at this place: write the object first")
        return cls(ObjectReader(bucket, key, found.etag, found.size))

    @property
    def size_bytes(self) -> int:
        return self.reader.size

    def check_unchanged(self) -> None:
        self.reader.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class ObjectPending:
    """An object in the making. ``there`` is the ETag of what was at its place, if anything was."""

    writer: Assembly
    target: "ObjectTarget"
    fence: int
    there: str

    def copy(self, reader: RangeSource, at: int, pace: ParallelOptions) -> None:
        """Put the rest of a target, from ``at`` on, out of ``reader``; by the store itself where it can."""
        if isinstance(reader, ObjectReader) and self.writer.can_copy(reader):
            lead = self.writer.part_bytes - at
            copy_run(reader.head(lead), self.writer, at, pace)
            reader, at = reader.tail(lead), self.writer.part_bytes
            if self.writer.copy(reader, pace.before, pace.after):
                return
        copy_run(reader, self.writer, at, pace)

    def settle(self, source: object, *, in_place: bool) -> Commit:
        """Describe what will be put in place; nothing may be written afterwards."""
        self.writer.settle()
        over = self.there
        if in_place and isinstance(source, ObjectSource):
            over = source.reader.etag
        elif self.target.overwrite and self.writer.upload:  # it is put in place once, whatever is there
            over = _ANY
        parts = digest(self.writer.parts) if self.writer.upload else ""
        return Commit(
            fence=self.fence,
            size_bytes=self.writer.size,
            upload=self.writer.upload,
            parts=parts,
            over=over,
            mark=self.writer.mark,
        )

    def finish(self, commit: Commit) -> None:
        """As the target's ``finish``, with what is at hand."""
        if commit.upload:
            self.target.complete(commit, self.writer.parts)
        else:
            self.target.put(commit, self.writer.whole)

    def discard(self) -> None:
        """Throw away what was sent. What cannot be now, the next attempt does."""
        self.target.abort(self.fence, self.writer.upload)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class ObjectTarget:
    """Where the result of a job goes, and how it gets there."""

    url: str
    job_id: str
    overwrite: bool
    buckets: Buckets
    notes: MultipartJournal

    def prepare(self, fence: int, room_bytes: int = 0) -> ObjectPending:
        """Begin an attempt. Raises TargetExists if something is there already, PathRefused, Unavailable."""
        del room_bytes  # a store does not tell how much it takes
        bucket, key = self.buckets.writing(self.url)
        found = bucket.head(key)
        if found and not self.overwrite:
            raise TargetExists

        def begun(upload: str) -> None:
            self.notes.add(self.job_id, fence, self.url, upload)

        mark = f"{self.job_id}/{os.urandom(_MARK_BYTES).hex()}"
        writer = Assembly(bucket, key, mark, begun)
        return ObjectPending(writer, self, fence, found.etag if found else "")

    def finish(self, commit: Commit) -> bool:
        """Put it in place; once it is there, doing it again changes nothing.

        False if it is not there and cannot be without the bytes, which died with their worker. Raises
        TargetExists if somebody else took the place, PathRefused if what was to be put there is gone,
        Unavailable.
        """
        if not commit.upload:
            return self.is_placed(commit)
        bucket, key = self.buckets.writing(self.url)
        self.complete(commit, bucket.parts(key, commit.upload))
        return True

    def is_placed(self, commit: Commit) -> bool:
        """Whether the object of this commit is in place. Raises PathRefused, Unavailable."""
        bucket, key = self.buckets.writing(self.url)
        found = bucket.head(key)
        return found is not None and found.mark == self._mark(commit)

    def complete(self, commit: Commit, parts: Sequence[UploadedPart] | None) -> None:
        """Make the object out of the parts of its upload; None if there is no such upload any more."""
        bucket, key = self.buckets.writing(self.url)
        end = Completion.GONE
        if parts is not None:
            if digest(parts) != commit.parts:
                raise PathRefused(_LOST)
            end = bucket.complete(key, commit.upload, parts, _condition(commit))
        if end is not Completion.DONE:
            self._must_be_ours(commit, end)
        self.notes.forget(self.job_id, commit.fence, self.url)

    def put(self, commit: Commit, whole: memoryview) -> None:
        """Write a small object."""
        bucket, key = self.buckets.writing(self.url)
        if not bucket.put(key, whole, _condition(commit), self._mark(commit)):
            self._must_be_ours(commit, Completion.TAKEN)

    def give_up(self, commit: Commit) -> None:
        """The commit was refused: its upload is in nobody's way."""
        self.abort(commit.fence, commit.upload)

    def sweep(self, fence: int) -> None:
        """Throw away the uploads of attempts before this fence."""
        for earlier in range(max(1, fence - SWEPT), fence):
            self.abort(earlier, self.notes.find(self.job_id, earlier, self.url) or "")

    def _mark(self, commit: Commit) -> str:
        return self.job_id if commit.mark is msgspec.UNSET else commit.mark

    def _must_be_ours(self, commit: Commit, end: Completion) -> None:
        bucket, key = self.buckets.writing(self.url)
        found = bucket.head(key)
        if found and found.mark == self._mark(commit):
            return
        if end is Completion.GONE:
            raise PathRefused(_LOST)
        if found is None and not self.overwrite:
            raise Unavailable("The object store is busy with another write to the target")
        raise TargetExists("Something else was written to the target while the job ran")

    def abort(self, fence: int, upload: str) -> None:
        """Throw away an upload and its note. What cannot be now is left to a later call."""
        with suppress(KmsError):
            if upload:
                bucket, key = self.buckets.writing(self.url)
                bucket.abort(key, upload)
                self.notes.forget(self.job_id, fence, self.url)


def _condition(commit: Commit) -> If:
    if commit.over == _ANY:
        return ALWAYS
    return If(etag=commit.over) if commit.over else If(absent=True)
