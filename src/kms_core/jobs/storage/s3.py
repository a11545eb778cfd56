"""Jobs to and from objects: a source pinned to one version, a target that appears once, by any worker.

A large target is a multipart upload, which any worker can complete: the commit names it and what its parts
are. A small one is a single write, of bytes that die with the worker: then the work is done again, and the
condition on the write lets only the first of several attempts through. The metadata of an object is the mark
of its attempt (``CommitMarks``): so a job recognises its own object, and takes no other for it. Uploads that
were begun are noted, and aborted if their attempt died.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import quote

from kms_core.jobs.file_patterns import path_names
from kms_core.jobs.model import Commit, CommitGone
from kms_core.jobs.spec import PlacedTarget
from kms_core.jobs.storage.blob_store import BlobStore
from kms_core.jobs.storage.commit_marks import CommitMarks
from kms_core.payload.files import RangeSource
from kms_core.payload.parallel import ParallelOptions, copy_run
from kms_core.s3.bucket import ALWAYS, Bucket, Completion, If, ObjectHead, ObjectReader, UploadedPart
from kms_core.s3.conditions import ignored_conditions
from kms_core.s3.connection import S3Connection
from kms_core.s3.multipart import Assembly, digest
from kms_core.settings.model import Settings
from kms_core.stores import s3_connection
from kms_protocol.errors import KmsError, PathRefused, RecordRefused, ResultExpired, TargetExists, Unavailable

# Objects that jobs name by ``s3://``: the buckets of the settings, and where jobs may read and write there.
#
# A URL is read as a file's is: its parts are percent-decoded, so that a key with ``%``, ``?``, ``#`` or,
# for jobs over many, ``*`` can be written. Knows no job.

SCHEME: Final = "s3://"
ANY_NAME: Final = "any"
"""Stands for each name below a directory, where permissions are checked."""
KEY_MAX_BYTES: Final = 1024
_PROBE: Final = ".kms-probe"


@dataclass(frozen=True, slots=True)
class Allowed:
    """A bucket, and the prefixes beneath which jobs may read and write."""

    bucket: Bucket
    read: tuple[str, ...]
    write: tuple[str, ...]


class Buckets:
    """The buckets that jobs may use. Safe for threads and across forks."""

    def __init__(self, allowed: Mapping[str, Allowed]) -> None:
        self._allowed = dict(allowed)
        self._checked: set[str] = set()

    def reading(self, url: str) -> tuple[Bucket, str]:
        """Bucket and key of an object that jobs may read; asks no store. Raises PathRefused."""
        return self._found(url, "reading")

    def writing(self, url: str) -> tuple[Bucket, str]:
        """The bucket and key of an object that jobs may write."""
        return self._found(url, "writing")

    def _found(self, url: str, use: Literal["reading", "writing"]) -> tuple[Bucket, str]:
        name, key = parse(url)
        found = self._allowed.get(name)
        if found is None or not key.startswith(found.read if use == "reading" else found.write):
            raise PathRefused(f"[kms.jobs.buckets] allows no such object for {use}")
        return found.bucket, key

    def require_conditions(self, url: str) -> None:
        """Try whether the store of an object that a job writes honours conditions, once for each bucket.

        By an object ``.kms-probe`` beneath the prefix where jobs may write. Raises PathRefused if it ignores
        any: a target could not appear once, as by ``writing``, Unavailable.
        """
        bucket, key = self.writing(url)
        if bucket.name in self._checked:
            return
        prefix = next(each for each in self._allowed[bucket.name].write if key.startswith(each))
        if found := ignored_conditions(bucket, prefix + _PROBE, uploads=True):
            raise PathRefused(
                f"Bucket {bucket.name} ignores {' and '.join(found)}, so a write could replace another one: "
                "use a store with conditional writes, or another target with overwrite (docs/s3.md)"
            )
        self._checked.add(bucket.name)

    def listing(self, url_prefix: str) -> Iterator[tuple[str, int]]:
        """URL and size in bytes of every object beneath ``s3://bucket/`` or ``s3://bucket/folder/``.

        In the order of keys; empty objects that stand for folders, and probes, are left out. A URL may yet be
        refused by ``reading``, if its key could be read in two ways. Raises PathRefused, Unavailable.
        """
        bucket, below = self.reading(f"{url_prefix}{ANY_NAME}")
        for key, size, _ in bucket.listed(below.removesuffix(ANY_NAME)):
            if (size or not key.endswith("/")) and key.rpartition("/")[2] != _PROBE:
                yield f"{SCHEME}{bucket.name}/{quote(key)}", size


def parse(url: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``.

    Raises PathRefused where a store, or what stands before it, could read the key in another way: ``.``,
    ``..`` or nothing between slashes, an encoded slash, control characters, more than 1,024 bytes.
    """
    name, slash, path = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not name or not slash:
        raise PathRefused("Expected s3://bucket/key")
    key = "/".join(path_names(path))
    if len(key.encode()) > KEY_MAX_BYTES:
        raise PathRefused(f"A key has at most {KEY_MAX_BYTES} bytes")
    return name, key


def build_buckets(settings: Settings) -> Buckets:
    """The buckets of ``[kms.jobs.buckets]``; reads files of secrets and authorities, connects to nothing.

    Raises ConfigurationError.
    """
    lines: dict[tuple[object, ...], S3Connection] = {}
    allowed = {}
    for name, section in settings.kms.jobs.buckets.items():
        # On one line an object is copied by the store itself, from bucket to bucket.
        same = (section.endpoint, section.region, section.access_key_id, section.secret_key_file)
        line = lines.setdefault(
            (*same, section.ca_file, section.timeout_s),
            s3_connection(f"kms.jobs.buckets.{name}", section, strict=settings.is_prod),
        )
        bucket = Bucket(name, line, path_style=section.path_style)
        allowed[name] = Allowed(bucket, section.read, section.write)
    return Buckets(allowed)


# Notes of multipart uploads: a store keeps the parts of an upload, and does not say whose they are.
#
# A note is a small blob in the spool, ``multipart/<job id>.<attempt>.<digest of the target>``. It is
# written empty before the upload begins, then holds its id, and goes with it. Any later attempt finds the
# notes of its job, also of attempts that Redis has forgotten. An upload whose note is empty (a kill between
# two requests) has no parts, and is found by listing the uploads to its key.

_FOLDER: Final = "multipart"
_LONGEST: Final = 4096
_NAME: Final = re.compile(r"(.+)\.([a-z0-9]+)\.([0-9a-f]{32})")
_LEEWAY_S: Final = 60.0
"""So far the clock of a store may be off."""


@dataclass(frozen=True, slots=True)
class UploadNote:
    """One attempt's note of ``at`` (seconds since the epoch); ``upload`` is empty until that has begun."""

    job_id: str
    attempt: str
    place: str
    upload: str
    at: float


class MultipartJournal:
    """One note for each attempt and target. Shared by all workers of an install, as the spool is."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def add(self, job_id: str, attempt: str, url: str, upload: str = "") -> None:
        """Note an upload that has begun, or, without its id, that one will begin.

        Raises SpoolFull, SpoolUnavailable, RecordRefused for what is no plain file there.
        """
        name = self._name(job_id, attempt, url)
        self._store.put(_FOLDER, name, upload.encode("ascii"), durable=bool(upload))

    def forget(self, job_id: str, attempt: str, url: str) -> None:
        """Remove the note of an upload that has ended; may be called twice."""
        with suppress(ResultExpired, RecordRefused):
            self._store.remove(_FOLDER, self._name(job_id, attempt, url))

    def sweep(self, buckets: Buckets, targets: Mapping[str, str], keep: Collection[str]) -> None:
        """Abort the uploads of jobs, by id, to their targets, but for those of the attempts ``keep``.

        What cannot be aborted now is left to a later call.
        """
        wanted = {job_id: url for job_id, url in targets.items() if url.startswith(SCHEME)}
        found = list(self.noted(wanted.values())) if wanted else []
        for note in found:
            url = wanted.get(note.job_id, "")
            if note.place != _place(url) or note.attempt in keep:
                continue
            with suppress(KmsError):
                if _abort(buckets, url, note, [other for other in found if other is not note]):
                    self.forget(note.job_id, note.attempt, url)

    def noted(self, urls: Iterable[str]) -> Iterator[UploadNote]:
        """The notes of uploads to these targets."""
        places = {_place(url) for url in urls}
        with suppress(ResultExpired, RecordRefused):
            for name in self._store.names(_FOLDER):
                if (matched := _NAME.fullmatch(name)) and matched[3] in places:
                    with suppress(ResultExpired, RecordRefused):
                        note = self._store.get(_FOLDER, name, _LONGEST)
                        upload = note.data.decode("ascii", "replace")
                        yield UploadNote(matched[1], matched[2], matched[3], upload, note.at)

    @staticmethod
    def _name(job_id: str, attempt: str, url: str) -> str:
        return f"{job_id}.{attempt}.{_place(url)}"


def _place(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def _abort(buckets: Buckets, url: str, note: UploadNote, others: list[UploadNote]) -> bool:
    """Abort the upload of a note. False if it cannot be known which one that is, while another begins."""
    bucket, key = buckets.writing(url)
    if note.upload:
        bucket.abort(key, note.upload)
        return True
    same = [other for other in others if other.place == note.place]
    if not all(other.upload for other in same):
        return False
    named = {other.upload for other in same}
    for found in list(bucket.unfinished(key)):
        is_new = found.upload not in named and found.begun >= note.at - _LEEWAY_S
        if found.key == key and is_new and not bucket.parts(key, found.upload):
            bucket.abort(key, found.upload)
    return True


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
        del room_bytes  # a store does not say how much it takes
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
        if parts is not None and digest(parts) == commit.parts:  # of an upload that ends, some may be left
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
