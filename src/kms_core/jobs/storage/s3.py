"""Jobs to and from objects: a source pinned to one version, a target that appears once, by any worker.

A large target is a multipart upload, which any worker can complete: the commit names it and what its parts
are. A small one is a single write, of bytes that die with the worker: then the work is done again, and the
condition on the write lets only the first of several attempts through. The metadata of an object is the mark
of its attempt (``commit_marks``): so a job recognises its own object, and takes no other for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from kms_core.jobs.ends import PlacedTarget
from kms_core.jobs.model import Commit, CommitGone
from kms_core.jobs.storage.buckets import Buckets
from kms_core.jobs.storage.commit_marks import CommitMarks
from kms_core.jobs.storage.multipart_journal import MultipartJournal
from kms_core.payload.files import RangeSource
from kms_core.payload.parallel import ParallelOptions, copy_run
from kms_core.s3.bucket import ALWAYS, Completion, If, ObjectHead, UploadedPart
from kms_core.s3.multipart import Assembly, ObjectReader, digest
from kms_protocol.errors import KmsError, PathRefused, TargetExists, Unavailable

_ANY: Final = "*"


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

    def check_unchanged(self) -> None:
        """Raises InvalidRequest if it is another by now; ask after the last read."""
        self.reader.check()


@dataclass(frozen=True, slots=True)
class ObjectPending:
    """An object in the making. ``there`` is the ETag of the object at its place, if there was one."""

    writer: Assembly
    target: "ObjectTarget"
    attempt_id: str
    there: str

    def copy(self, reader: RangeSource, at: int, options: ParallelOptions) -> None:
        """Put the rest of a target, from ``at`` on, out of ``reader``; by the store itself where it can."""
        if isinstance(reader, ObjectReader) and self.writer.can_copy(reader):
            lead = self.writer.part_bytes - at
            copy_run(reader.head(lead), self.writer, at, options)
            reader, at = reader.tail(lead), self.writer.part_bytes
            if self.writer.copy(reader, options.check, options.progress):
                return
        copy_run(reader, self.writer, at, options)

    def settle(self, source: object, *, in_place: bool) -> Commit:
        """Describe what will be put in place; nothing may be written afterwards.

        ``in_place``: the result takes the place of its source, and of nothing that came after it.
        """
        self.writer.settle()
        over = self.there
        if in_place and isinstance(source, ObjectSource):
            self.target.buckets.require_conditions(self.target.url)
            over = source.reader.etag
        elif self.target.overwrite and self.writer.upload:  # it is put in place once, whatever is there
            over = _ANY
        parts = digest(self.writer.parts) if self.writer.upload else ""
        return Commit(
            attempt_id=self.attempt_id,
            size_bytes=self.writer.size,
            upload=self.writer.upload,
            parts=parts,
            over=over,
            mark=self.writer.mark,
        )

    def finish(self, commit: Commit) -> None:
        """Finish the target with the state of this process."""
        if commit.upload:
            self.target.complete(commit, self.writer.parts)
        else:
            self.target.put(commit, self.writer.whole)

    def discard(self) -> None:
        """Delete the parts that were sent. If that fails, the next attempt does it."""
        self.target.abort(self.attempt_id, self.writer.upload)


@dataclass(frozen=True, slots=True)
class ObjectTarget:
    """The target object of a job."""

    url: str
    job_id: str
    overwrite: bool
    buckets: Buckets
    notes: MultipartJournal
    marks: CommitMarks
    _seen: list[ObjectHead | None] = field(default_factory=list)

    def recognised(self) -> PlacedTarget | None:
        """The object of this job, if that is what is there now. Raises Unavailable."""
        with suppress(PathRefused):  # the attempt itself will say what is wrong
            bucket, key = self.buckets.writing(self.url)
            self._seen[:] = [found := self._seen[0] if self._seen else bucket.head(key)]
            if found and self.marks.is_ours(found.mark, self.url):
                return PlacedTarget(size_bytes=found.size)
        return None

    @contextmanager
    def prepare(self, attempt_id: str, room_bytes: int = 0) -> Iterator[ObjectPending]:
        """Begin an attempt. Raises TargetExists if something is there already, PathRefused, Unavailable."""
        del room_bytes  # a store does not tell how much it takes
        bucket, key = self.buckets.writing(self.url)
        found = self._seen.pop() if self._seen else bucket.head(key)
        if found and not self.overwrite:
            raise TargetExists
        if not self.overwrite:
            self.buckets.require_conditions(self.url)
        mark = self.marks.sign(attempt_id, self.url)

        def begin() -> str:
            self.notes.add(self.job_id, attempt_id, self.url)
            upload = bucket.begin(key, mark)
            self.notes.add(self.job_id, attempt_id, self.url, upload)
            return upload

        writer = Assembly(bucket, key, mark, begin)
        yield ObjectPending(writer, self, attempt_id, found.etag if found else "")

    def finish(self, commit: Commit) -> bool:
        """Put it in place; once it is there, doing it again changes nothing.

        False if it is not there and cannot be without the bytes, which died with their worker. Raises
        TargetExists if another writer took the name, CommitGone if what was to be put there is gone,
        PathRefused, Unavailable.
        """
        if not commit.upload:
            return self.is_placed(commit)
        bucket, key = self.buckets.writing(self.url)
        self.complete(commit, bucket.parts(key, commit.upload))
        return True

    def is_placed(self, commit: Commit) -> bool:
        """Return whether the object of this commit is in place. Raises PathRefused, Unavailable."""
        bucket, key = self.buckets.writing(self.url)
        found = bucket.head(key)
        return found is not None and found.mark == commit.mark

    def complete(self, commit: Commit, parts: Sequence[UploadedPart] | None) -> None:
        """Make the object out of the parts of its upload; None if there is no such upload any more."""
        bucket, key = self.buckets.writing(self.url)
        end = Completion.GONE
        if parts is not None:
            if digest(parts) != commit.parts:
                raise CommitGone
            end = bucket.complete(key, commit.upload, parts, _condition(commit))
        if end is not Completion.DONE:
            self._must_be_ours(commit, end)
        self.notes.forget(self.job_id, commit.attempt_id, self.url)

    def put(self, commit: Commit, whole: memoryview) -> None:
        """Write a small object."""
        bucket, key = self.buckets.writing(self.url)
        if not bucket.put(key, whole, _condition(commit), commit.mark):
            self._must_be_ours(commit, Completion.TAKEN)

    def give_up(self, commit: Commit) -> None:
        """Abort the upload of a refused commit."""
        self.abort(commit.attempt_id, commit.upload)

    def _must_be_ours(self, commit: Commit, end: Completion) -> None:
        bucket, key = self.buckets.writing(self.url)
        found = bucket.head(key)
        if found and found.mark == commit.mark:
            return
        if end is Completion.GONE:
            raise CommitGone
        if found is None and not self.overwrite:
            raise Unavailable("The object store is busy with another write to the target")
        raise TargetExists("Something else was written to the target while the job ran")

    def abort(self, attempt: str, upload: str) -> None:
        """Abort an upload and delete its note. If that fails, a later call does it."""
        with suppress(KmsError):
            if upload:
                bucket, key = self.buckets.writing(self.url)
                bucket.abort(key, upload)
                self.notes.forget(self.job_id, attempt, self.url)


def _condition(commit: Commit) -> If:
    if commit.over == _ANY:
        return ALWAYS
    return If(etag=commit.over) if commit.over else If(absent=True)
