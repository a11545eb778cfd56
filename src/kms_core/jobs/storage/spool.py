"""The spool: uploads, items and results of jobs, sealed under the spool key.

They rest by job id and name in a directory or a bucket (``BlobStore``), or small ones in Redis
(``SmallBlobStore``), byte for byte the same. A blob is an age file of the spool identity. Its header is
bound to the tenant and to a context: job, role, attempt, and the random id of the one time that it was
written. This id (``BlobWriter.ref``), in the sealed record or the signed end of the job, opens this blob and
no other.
"""

import math
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

import msgspec
import structlog

from kms_core.age import header, stream
from kms_core.age.header import FILE_LIMITS
from kms_core.backends.age import AgeBackend
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.jobs.spec import ItemsJob
from kms_core.jobs.storage.blob_store import BlobStore, BlobWriter, WriteBlob
from kms_core.observability import metrics
from kms_core.payload.files import MemoryRange, RangeSource
from kms_core.payload.streaming import RangeReader
from kms_protocol.context import Context
from kms_protocol.errors import (
    DecryptFailed,
    KmsError,
    NotACiphertext,
    RecordRefused,
    ResultExpired,
    SpoolFull,
    SpoolUnavailable,
    TooLarge,
)
from kms_protocol.units import size_text

UPLOAD: Final = "upload"
ITEMS: Final = "items"
HEAD: Final = "head"
"""Of the result of an upload: what is before its payload."""
RESULT: Final = "result"
"""Of the result lines of a part, whose number follows."""
RESOURCE: Final = "root:spool"
"""Of jobs whose input is a file or object: a worker whose processes hang on such takes no other one."""
NO_ATTEMPT: Final = "0"
"""Of blobs that the submitter wrote."""

_RESULTS: Final = (f"{HEAD}.", RESULT)
_SPOOL_KEY_ID: Final = "spool"
_JOB_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_REF_BYTES: Final = 16
_USAGE_REST: Final = 50  # a count is good for so many times the time it took: it costs 2 % of a process
_IN_THE_WAY: Final = (
    "Something else is in the spool where a file of the service is to be; see the service's log"
)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Label:
    """The meaning of a blob, bound to it as its context. ``ref`` is ``BlobWriter.ref`` of a written one.

    ``is_by_ref``: its name has the ref, so that no other process writes or removes a blob of this name.
    """

    tenant: str
    job_id: str
    role: str
    attempt: str = NO_ATTEMPT
    ref: bytes = field(default=b"", compare=False)
    is_by_ref: bool = False

    @property
    def name(self) -> str:
        if self.is_by_ref:
            return f"{self.role}.{self.ref.hex()}"
        return self.role if self.attempt == NO_ATTEMPT else f"{self.role}.{self.attempt}"

    @property
    def context(self) -> Context:
        return Context(
            (("attempt", self.attempt), ("job", self.job_id), ("role", self.role), ("write", self.ref.hex()))
        )


def result_label(tenant: str, job_id: str, part: int, attempt: str, ref: bytes = b"") -> Label:
    """The label of the result lines of one part; a job that was not split is its own part 0."""
    return Label(tenant, job_id, f"{RESULT}{part}", attempt, ref)


@dataclass(frozen=True, slots=True)
class SpoolUse:
    """Bytes in the spool, and bytes that fit: the setting, or less if the disk has less room.

    ``is_away``: what holds them does not answer, or refuses calls.
    """

    used_bytes: int
    limit_bytes: int
    is_away: bool = False

    @property
    def ratio(self) -> float:
        """The used part, 1.0 for all."""
        return min(1.0, self.used_bytes / self.limit_bytes) if self.limit_bytes > 0 else 1.0


def items_label(job: ItemsJob) -> Label:
    """The label of the items of a job, or of the job that it is a part of."""
    return Label(job.tenant, job.owner, ITEMS, ref=job.input_ref, is_by_ref=job.is_input_by_ref)


class BlobReader(RangeReader):
    """The content of a blob; its methods raise RecordRefused where it was changed."""

    def _open(self, at: int, sealed: memoryview, plain: memoryview) -> int:
        try:
            return super()._open(at, sealed, plain)
        except DecryptFailed as exc:
            raise RecordRefused from exc


@dataclass(frozen=True, slots=True)
class Blob:
    """An open blob: its content, its 16-byte file key and payload nonce; ``is_small``: it is in Redis."""

    content: BlobReader
    file_key: bytes = field(repr=False)
    nonce: bytes
    is_small: bool


class SmallBlobStore(Protocol):
    """Holds blobs that need no file: ``jobs.store.small_blobs.SmallBlobs``.

    ``names`` and ``delete`` also say whether the job has no other blobs: then its store is not asked.
    """

    @property
    def most_bytes(self) -> int: ...
    def get(self, job_id: str, name: str) -> bytes | None: ...
    def names(self, job_id: str) -> tuple[list[str], bool]: ...
    def remove(self, job_id: str, name: str) -> None: ...
    def delete(self, job_id: str) -> bool: ...


class Spool:
    """The blobs and their keys. Shared by the API and all workers of an install."""

    def __init__(
        self,
        store: BlobStore,
        key: AgeBackend,
        max_bytes: int,
        small: SmallBlobStore | None = None,
    ) -> None:
        self.store = store
        self._small = small
        self._key = key
        self._max_bytes = max_bytes
        self._used = (-math.inf, 0)  # when to count again, and what there is
        self._counting = 0  # the process that has a thread for it
        self._first_count = threading.Lock()

    @contextmanager
    def writing(
        self, label: Label, *, declared_bytes: int = 0, may_be_small: bool = False
    ) -> Iterator[BlobWriter]:
        """A new blob, durable under its name when the block ends; removed again if the block fails.

        ``may_be_small``: a blob that may be stored in Redis is not written; the caller stores
        ``BlobWriter.small`` with the record or the end of the job, and the store is not asked. Raises
        SpoolFull, at once if it cannot fit; SpoolUnavailable while something else is in its place, or if the
        disk fails.
        """
        most = self._small.most_bytes if self._small and may_be_small else 0
        most = most if declared_bytes < most else 0
        used = self._used_bytes(wait=not most)
        room = self._max_bytes - used
        if declared_bytes > room:
            raise SpoolFull(
                f"Uploads and results use {size_text(used)} of {size_text(self._max_bytes)}: wait until "
                "results expire, or raise [kms.jobs] spool_max_bytes"
            )
        if not most and declared_bytes > self.store.free_bytes():
            raise SpoolFull("The disk of uploads and results has no room for this upload")
        written = replace(label, ref=os.urandom(_REF_BYTES))
        begun = sealing.begin([(self._key, self._key_ref(label))], written.context)
        with ExitStack() as stack:
            create = partial(self._create, stack, written, declared_bytes)
            out = BlobWriter(written.ref, begun, create, room, most)
            yield out
            out.finish(replace(written, is_by_ref=False).name)  # Redis stores it with the job or not at all
        if out.small is None:
            self._used = (self._used[0], self._used[1] + out.stored)

    def _create(self, stack: ExitStack, label: Label, declared_bytes: int) -> tuple[WriteBlob, int]:
        """A new blob in the store, and the bytes that it may take."""
        self._used_bytes(wait=True)  # it might have been small
        try:
            made = stack.enter_context(self.store.create(_folder(label.job_id), label.name, declared_bytes))
        except RecordRefused as exc:
            _log.error("spool.in_the_way", job_id=label.job_id, role=label.role)
            raise SpoolUnavailable(_IN_THE_WAY) from exc
        return made, self._max_bytes - self._used[1]

    @contextmanager
    def blob(self, label: Label, small: bytes | None = None) -> Iterator[Blob]:
        """A blob to be read; ``small`` is what Redis has of it, where that was read with its job.

        Raises ResultExpired if it is gone; RecordRefused, now or when a part of it is read, if it is not the
        one that ``label.ref`` names.
        """
        found = self._small.get(label.job_id, label.name) if self._small and small is None else small
        try:
            with ExitStack() as stack:
                source: RangeSource = (
                    stack.enter_context(self.store.open(_folder(label.job_id), label.name))
                    if found is None
                    else MemoryRange(memoryview(found))
                )
                yield self._opened(label, source, is_small=found is not None)
        except RecordRefused:
            role = label.role.rstrip("0123456789")
            _log.error("spool.blob_refused", job_id=label.job_id, role=role, attempt=label.attempt)
            metrics.SPOOL_REFUSED.labels(role).inc()
            raise

    def _opened(self, label: Label, source: RangeSource, *, is_small: bool) -> Blob:
        try:
            head = header.read_by(source.read_at, FILE_LIMITS)
            bound = binding.read(head.stanzas)
            if bound is None:
                raise RecordRefused
            ref = msgspec.structs.replace(self._key_ref(label), version=bound.key_version)
            file_key = sealing.unwrap_file(head, self._key, ref, context=label.context, bound=bound).file_key
            key = stream.payload_key(file_key, head.nonce)
            content = BlobReader(key, source.tail(head.payload_offset))
        except (NotACiphertext, TooLarge, DecryptFailed) as exc:
            raise RecordRefused from exc
        return Blob(content, file_key, head.nonce, is_small)

    @contextmanager
    def opened(self, label: Label, small: bytes | None = None) -> Iterator[BlobReader]:
        """The content of a blob. Arguments and errors as for ``blob``."""
        with self.blob(label, small) as blob:
            yield blob.content

    def remove(self, job_id: str, name: str, *, are_all: bool = False) -> None:
        """Remove a blob, when nothing needs it any more; ``are_all``: all blobs of the job are in Redis."""
        if self._small:
            self._small.remove(job_id, name)
        if not are_all:
            with suppress(ResultExpired, RecordRefused):
                self.store.remove(_folder(job_id), name)

    def discard_input(self, job_id: str) -> bool:
        """Remove the input of an ended job, but not an upload whose payload is that of the result.

        Returns whether it is gone.
        """
        names, are_all = self._small.names(job_id) if self._small else ([], False)
        with suppress(ResultExpired, RecordRefused):
            names += [] if are_all else self.store.names(_folder(job_id))
        if any(name.startswith(_RESULTS) for name in names):
            for name in names:
                if name.startswith(ITEMS):
                    self.remove(job_id, name, are_all=are_all)
            return True
        return not names or self.delete(job_id)

    def delete(self, job_id: str, *, in_redis: bool = True) -> bool:
        """Delete all of one job, or only its files. True if nothing is left, also for a malformed id."""
        if self._small and in_redis and self._small.delete(job_id):
            return True
        with suppress(ResultExpired):
            if not self.store.remove_folder(_folder(job_id)):
                _log.warning("spool.not_deleted", job_id=job_id)
                return False
        return True

    def folders(self, older_than_s: float) -> Iterator[str]:
        """Job ids of folders that nothing has changed for so long: candidates for the sweep of orphans."""
        return (name for name in self.store.folders(older_than_s) if _JOB_ID.fullmatch(name))

    def _key_ref(self, label: Label) -> KeyRef:
        """The spool key's version in use."""
        return KeyRef(label.tenant, _SPOOL_KEY_ID, self._key.versions()[-1].version, self._key.name)

    def use(self) -> SpoolUse:
        """The bytes that the spool has and may have. Does not wait for a bucket: it has the last count."""
        used = self._used_bytes(wait=not self.store.is_remote)
        with suppress(SpoolUnavailable):
            is_away = self.store.is_away or self.store.is_refused
            return SpoolUse(used, min(self._max_bytes, used + self.store.free_bytes()), is_away)
        return SpoolUse(used, used, is_away=True)

    def _used_bytes(self, *, wait: bool) -> int:
        """The spool's size in bytes: the last count, plus our writes since then.

        A thread of its own counts every few seconds at most. Callers wait only for the first count, and only
        with ``wait``: one of them counts.
        """
        if wait and self._used[0] == -math.inf:
            with self._first_count:
                if self._used[0] == -math.inf:
                    self._count()
        elif time.monotonic() >= self._used[0] and self._counting != os.getpid():
            self._counting = os.getpid()
            threading.Thread(target=self._count_aside, name="spool-use", daemon=True).start()
        return self._used[1]

    def _count(self) -> None:
        begun = time.monotonic()
        size = self.store.used_bytes()
        ended = time.monotonic()
        self._used = (ended + max(self.store.usage_cache_s, _USAGE_REST * (ended - begun)), size)

    def _count_aside(self) -> None:
        try:
            self._count()
        except KmsError:
            self._used = (time.monotonic() + self.store.usage_cache_s, self._used[1])
        finally:
            self._counting = 0


def _folder(job_id: str) -> str:
    if not _JOB_ID.fullmatch(job_id):
        raise ResultExpired
    return job_id
