"""Signed ends of jobs. Depends on neither Redis nor keys.

Others can write any state into a record in Redis. The ends that clients act on, ``succeeded`` and
``failed`` with ``items_failed``, therefore count only with the MAC of a worker (``RecordKey.sign``).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from kms_protocol.wire import JobState

MOST_FAILURES: Final = 10
ITEMS_FAILED: Final = "items_failed"
CLOCK_LEEWAY_S: Final = 60.0
"""So far the clocks of machines may be apart where a worker or the API goes by its own."""


class PlacedTarget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The target that a job wrote: ``inode`` and ``mtime_ns`` of a file, ``parts`` of an object.

    Its URL stands in the sealed record, which the end is bound to: names of files are not shown to Redis.
    ``parts`` is a digest of the parts of a multipart upload, empty for an object of a single write.
    """

    size_bytes: int
    inode: int = 0
    mtime_ns: int = 0
    parts: str = ""


Failure = tuple[int, str]
"""The index of an item or file that failed, and its error code."""


class FirstFailures(list[Failure]):
    """The first ``MOST_FAILURES`` failures of a job."""

    def add(self, index: int, code: str) -> None:
        """Add a failure, unless there are enough."""
        if len(self) < MOST_FAILURES:
            self.append((index, code))


SmallBlob = tuple[str, bytes]
"""A sealed blob that rests in Redis: its name, and the bytes that its file in the spool would have."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work of an attempt, in items and bytes, and its result; ``blob`` is that, where it is small."""

    items_done: int = 0
    items_failed: int = 0
    bytes_done: int = 0
    tallies: Mapping[str, int] = field(default_factory=dict)
    failures: Sequence[Failure] = ()
    target: PlacedTarget | None = None
    result_digest: bytes = b""
    blob: SmallBlob | None = None
    file_id: str = ""

    @property
    def progress(self) -> dict[str, int]:
        """The fields of the job's record that say so."""
        return {
            "bytes_done": self.bytes_done,
            "items_done": self.items_done,
            "items_failed": self.items_failed,
        }


class SignedEnd(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The outcome of one attempt at a job.

    Its MAC is also over the digest of the sealed record, so it counts for no other record of the same id.
    ``result_digest`` is the random id of the writing of the result (``BlobWriter.ref``), or SHA-256 over the
    ends of its parts. ``failures`` are the first items or files
    that failed. ``file_id`` (``binding.file_id``) is that of the one file of the job, which it made, moved or
    opened. ``kept_until`` (seconds since the epoch) is when the record has left Redis by itself: from then on
    it proves nothing.
    """

    fence: int
    attempt: int
    attempt_id: str = ""
    state: JobState
    error: str = ""
    items: int = 0
    items_done: int = 0
    items_failed: int = 0
    size_bytes: int = 0
    bytes_done: int = 0
    parts: int = 0
    tallies: dict[str, int] = {}
    failures: tuple[Failure, ...] = ()
    target: PlacedTarget | None = None
    result_digest: bytes = b""
    file_id: str = ""
    kept_until: float


class SignedSplit(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a job: ``digest`` is SHA-256 over their sealed records, in order."""

    parts: int
    digest: bytes


def needs_proof(state: str, error: str) -> bool:
    """True if an end counts only if it is signed: callers read the result, or delete the source, after it."""
    return state == "succeeded" or (state == "failed" and error == ITEMS_FAILED)


def spec_digest(*sealed: bytes) -> bytes:
    """SHA-256 of sealed records, which binds an end to the work that was done."""
    return hashlib.sha256(b"".join(sealed)).digest()
