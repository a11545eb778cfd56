"""The result of an ended job as bytes of a known size, any run of which can be read.

A result is pieces laid end to end: a header and the payload of the upload, an opened payload, or the
result lines of every part of a bulk job.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from kms_core.age import header, stream
from kms_core.jobs.execution import one_file, tree
from kms_core.jobs.model import DEAD, REFUSED, Job
from kms_core.jobs.spec import AnyJob, FileJob, ItemsJob, TreeJob, TreePart, UploadJob, needs_proof
from kms_core.jobs.storage.spool import HEAD, Label, Spool, result_label
from kms_core.jobs.store.store import JobStore
from kms_core.payload.streaming import RangeReader
from kms_protocol import wire
from kms_protocol.errors import JobNotFinished, RecordRefused, ResultExpired, ResultReleased, UnknownJob
from kms_protocol.units import KiB

_LAG_S: Final = 1.0
"""Seconds by which the time of Redis, as a process knows it, may lag."""
_KEPT_BYTES: Final = 64 * KiB
"""The most bytes of a blob that is read into memory together with its size."""


OpenBlob = Callable[[], AbstractContextManager[RangeReader]]
"""Opens a blob of the spool to be read."""


@dataclass(frozen=True, slots=True)
class LiteralPiece:
    """Bytes in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def slabs(self, start: int, stop: int) -> Generator[bytes]:
        yield self.data[start:stop]


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Content that is read from the spool; ``is_sealed``: its sealed chunks, as stored."""

    open_blob: OpenBlob
    is_sealed: bool
    size: int

    def slabs(self, start: int, stop: int) -> Generator[memoryview]:
        """The bytes from ``start`` to before ``stop``, verified. Nothing is held open between calls.

        Raises ResultExpired, DecryptFailed, RecordRefused for a file of the spool that is not the job's.
        """
        with self.open_blob() as reader:
            yield from (reader.sealed_slabs if self.is_sealed else reader.slabs)(start, stop)


ResultPiece = LiteralPiece | StoredPiece
"""Some bytes of a result."""


def _content(open_blob: OpenBlob, *, is_sealed: bool = False, kept_bytes: int = _KEPT_BYTES) -> ResultPiece:
    """The content of a blob, read together with its size if it has at most ``kept_bytes``."""
    with open_blob() as reader:
        size = reader.sealed_size if is_sealed else reader.size
        if size > kept_bytes:
            return StoredPiece(open_blob, is_sealed, size)
        return LiteralPiece(b"".join((reader.sealed_slabs if is_sealed else reader.slabs)(0, size)))


@dataclass(frozen=True, slots=True)
class Result:
    """Pieces end to end. ``file_id`` is that of the one file of an upload (see ``binding.file_id``)."""

    pieces: Sequence[ResultPiece]
    lines: bool = False
    file_id: str = ""

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def slabs(self, start: int, stop: int) -> Generator[bytes | memoryview]:
        """The bytes from ``start`` to before ``stop``, in order, at most some 1 MiB at a time."""
        at = 0
        for piece in self.pieces:
            first, last = max(0, start - at), min(piece.size, stop - at)
            if first < last:
                yield from piece.slabs(first, last)
            at += piece.size


def of(job: Job, store: JobStore, spool: Spool) -> Result:
    """The result of this job.

    Raises JobNotFinished, ResultExpired, ResultReleased, UnknownJob for a forged record, RecordRefused for an
    end, or a file of the spool, that is not the job's.
    """
    accepted = _readable_job(job, store)
    if not isinstance(accepted, UploadJob):
        return Result(list(_lines(job, accepted, store, spool)), lines=True)
    label = Label(job.tenant, job.job_id, HEAD, job.result_attempt, _ref(job))
    with spool.opened(label) as content:
        head = content.read_at(0, content.size)
    payload = _content(partial(_payload, accepted, head, spool), is_sealed=accepted.kind == "encrypt")
    pieces: list[ResultPiece] = [payload] if accepted.kind == "decrypt" else [LiteralPiece(head), payload]
    return Result(pieces, file_id=one_file.file_id(head))


@contextmanager
def _payload(job: UploadJob, head: bytes, spool: Spool) -> Iterator[RangeReader]:
    """Reader of the result of a job behind its header; of a decrypted one, which has none, all of it.

    That of an encrypted one is the reader's payload, sealed. Raises ResultExpired; RecordRefused and
    DecryptFailed, now or when a part of it is read.
    """
    with spool.opened(one_file.upload_label(job)) as content:
        if job.kind == "encrypt":
            yield content
            return
        sealed = content.tail(header.read_by(content.read_at, header.FILE_LIMITS).payload_offset)
        if job.kind == "rewrap":
            yield sealed
            return
        file_key, nonce = head[: header.FILE_KEY_BYTES], head[header.FILE_KEY_BYTES :]
        yield RangeReader(stream.payload_key(file_key, nonce), sealed)


def delete(job: Job, store: JobStore, spool: Spool) -> None:
    """Delete the result of an ended job, and its input, without which a dead job cannot be retried.

    Doing it again changes nothing. Raises JobNotFinished, UnknownJob; ResultExpired if it has no result.
    """
    if not job.released and job.error not in DEAD:
        _readable_job(job, store)
    store.release(job)
    if spool.delete(job.job_id):
        store.purged(job.job_id)


def _readable_job(job: Job, store: JobStore) -> AnyJob:
    """The sealed part of a job whose result may be read. Raises as ``of``."""
    if not job.ended:
        raise JobNotFinished
    if job.released and job.released <= store.now() + _LAG_S:
        raise ResultReleased
    if job.purged or (job.state == "cancelled" and not job.parts):
        raise _gone_error(job)
    if job.error == REFUSED:
        raise RecordRefused
    accepted = job.accepted or store.accepted(job.job_id)  # which says why it cannot be opened
    if accepted.tenant != job.tenant:  # Redis was tampered with: the sealed part is right
        raise UnknownJob
    if job.state == "cancelled" and not isinstance(accepted, TreeJob):  # nothing of it was put in place
        raise _gone_error(job)
    if job.end is None and job.state != "cancelled":  # or Redis says so: its files have no signature
        raise ResultExpired(f"This job failed (`{job.error}`); it has no result")
    _check_target(accepted)
    return accepted


def _check_target(accepted: AnyJob) -> None:
    if isinstance(accepted, FileJob):
        raise ResultExpired("The result of this job is the file that it was to write")


def _gone_error(job: Job) -> ResultExpired:
    return ResultExpired("This job was cancelled; it has no result" if job.state == "cancelled" else "")


def _ref(job: Job) -> bytes:
    """The reference of the result of a job or part; empty of one without a signed end."""
    return job.end.result_digest if job.end else b""


def _lines(job: Job, accepted: AnyJob, store: JobStore, spool: Spool) -> Iterator[ResultPiece]:
    if not job.parts:
        if not isinstance(accepted, TreeJob):  # else no file was named
            yield _content(_written(job, 0, job, spool))
        return
    for number, part in enumerate(store.parts_as_ended(job)):
        if needs_proof(part.job.state, part.job.error):
            yield _content(_written(job, number, part.job, spool), kept_bytes=0)  # there may be many
        elif isinstance(part.job.accepted, TreePart):
            files = tree.PartFiles.read(part.job.accepted, spool)
            yield _literal(files.lines(part.log, part.job.error))
        elif isinstance(part.job.accepted, ItemsJob):
            yield _literal(_refused(part.job.accepted, part.job.error))
        else:
            raise RecordRefused


def _written(job: Job, number: int, part: Job, spool: Spool) -> OpenBlob:
    """The lines that a part wrote; a job that was not split is its own part 0."""
    label = result_label(job.tenant, job.job_id, number, part.result_attempt, _ref(part))
    return partial(spool.opened, label)


def _refused(part: ItemsJob, code: str) -> Iterator[wire.ItemResult]:
    """One line with the error ``code`` for each item of a part that has no result of its own."""
    error = wire.ErrorCode(code=code)
    return (wire.ItemResult(index=part.first + at, error=error) for at in range(part.items))


def _literal(lines: Iterable[wire.ItemResult]) -> LiteralPiece:
    return LiteralPiece(b"".join(wire.encode(line) + b"\n" for line in lines))
