"""The spool: uploads, items and results of jobs on a local disk, sealed under the spool key; knows no Redis.

``<spool>/<job id>/<name>``, 0600 in 0700. A blob is an age file of the spool identity, whose context names
tenant, job, role and attempt. Two exceptions hold no plaintext either: an upload that is to be decrypted
rests as the ciphertext that it is, and ``head.<fence>`` is the header of a result whose payload is the
upload's own. MACs (``blocks``) bind each blob to its name and to the one time that it was written:
``BlobWriter.ref``, in the sealed record or the signed end of the job, opens this blob and no other.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import structlog
from cryptography.utils import Buffer

from kms_core.age import header, stream
from kms_core.age.header import FILE_LIMITS, VERSION_LINE, Header
from kms_core.backends.age import AgeBackend
from kms_core.envelope import binding, sealing
from kms_core.envelope.binding import KeyRef
from kms_core.jobs.sealed_records import RecordKey
from kms_core.jobs.storage import plain_files
from kms_core.jobs.storage.blocks import BlockReader, BlockWriter
from kms_core.observability import metrics
from kms_core.payload.files import FileRange, RangeSource
from kms_core.payload.ranges import RangeReader
from kms_core.payload.streaming import SlabSealer
from kms_protocol.context import Context
from kms_protocol.errors import (
    DecryptFailed,
    NotACiphertext,
    RecordRefused,
    ResultExpired,
    SpoolFull,
    Unavailable,
)

UPLOAD: Final = "upload"
ITEMS: Final = "items"
_SPOOL_KEY_ID: Final = "spool"
_JOB_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAC_LABEL: Final = b"blob"
_WRITE_ID_BYTES: Final = 16
_SIZE_BYTES: Final = 8
_USAGE_CACHE_S: Final = 5.0
_USAGE_REST: Final = 50  # a count is good for so many times the time it took: it costs 2 % of a process
_IN_THE_WAY: Final = (
    "Something else is in the spool where a file of the service is to be; see the service's log"
)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Label:
    """What a blob is; bound to it as its context, and in its MACs.

    ``ref`` is what ``BlobWriter.ref`` was once it was written; empty for a blob of 0.1, which has no MACs.
    """

    tenant: str
    job_id: str
    role: str
    attempt: int = 0
    ref: bytes = field(default=b"", compare=False)

    @property
    def name(self) -> str:
        return f"{self.role}.{self.attempt}" if self.attempt else self.role

    @property
    def context(self) -> Context:
        return Context((("attempt", str(self.attempt)), ("job", self.job_id), ("role", self.role)))

    @property
    def texts(self) -> tuple[bytes, ...]:
        """What the key of its MACs is derived from, besides the random part of ``ref``."""
        return tuple(text.encode() for text in (self.tenant, self.job_id, self.role, str(self.attempt)))


@dataclass(frozen=True, slots=True)
class Blob:
    """An open age file, verified as it is read, and its parsed header."""

    file: RangeSource
    head: Header

    @property
    def payload(self) -> RangeSource:
        """The sealed chunks behind the header."""
        return self.file.tail(self.head.payload_offset)

    @property
    def plaintext_bytes(self) -> int:
        """The plaintext's size, if the payload proves genuine; DecryptFailed if no payload has this size."""
        return stream.plaintext_size(self.payload.size)


class BlobWriter:
    """Writes one blob front to back, sealed or as it is. ``size`` counts what was given."""

    def __init__(self, out: BlockWriter, write_id: bytes, sealing_: sealing.Sealing | None) -> None:
        self._out = out
        self._write_id = write_id
        self._sealer = SlabSealer(sealing_.payload_key) if sealing_ else None
        self._start = b""
        self.size = 0
        if sealing_:
            out.write(memoryview(sealing_.head))

    def write(self, data: Buffer, *, more: bool = False) -> None:
        """Take some bytes; ``more`` tells for certain that others follow, which saves a copy of large ones.

        Raises SpoolFull; NotACiphertext if an unsealed blob begins as something else.
        """
        self.size += len(memoryview(data))
        if self._sealer:
            for slab in self._sealer.feed(data, more=more):
                self._out.write(slab)
            return
        if len(self._start) < len(VERSION_LINE):
            self._start += bytes(memoryview(data)[: len(VERSION_LINE)])
            if not self._start.startswith(VERSION_LINE[: len(self._start)]):
                raise NotACiphertext
        self._out.write(memoryview(data))

    def finish(self) -> None:
        """Write what is held back. The blob is whole afterwards."""
        if self._sealer:
            self._out.write(memoryview(self._sealer.finish()))
        elif len(self._start) < len(VERSION_LINE):
            raise NotACiphertext
        self._out.finish()

    @property
    def ref(self) -> bytes:
        """Of a finished blob: 16 random bytes, and the size of its content in 8 (big-endian)."""
        return self._write_id + self._out.size.to_bytes(_SIZE_BYTES, "big")

    @property
    def stored(self) -> int:
        """Bytes on the disk."""
        return self._out.stored


class Spool:
    """The directory and its keys. Shared by the API and all workers of an install."""

    def __init__(self, directory: Path, key: AgeBackend, record_key: RecordKey, max_bytes: int) -> None:
        self._directory = directory
        self._key = key
        self._record_key = record_key
        self._max_bytes = max_bytes
        self._used = (-math.inf, 0)  # when to count again, and what there is

    @contextmanager
    def writing(self, label: Label, *, sealed: bool = True, declared_bytes: int = 0) -> Iterator[BlobWriter]:
        """A new blob; removed again if the block fails.

        Raises SpoolFull, at once if it cannot fit; Unavailable while something else is in its place.
        """
        room = self._max_bytes - self._used_bytes()
        if declared_bytes > min(room, self._free_bytes()):
            raise SpoolFull
        write_id = os.urandom(_WRITE_ID_BYTES)
        with ExitStack() as stack:
            try:
                fd = stack.enter_context(plain_files.create(self._folder(label.job_id), label.name))
            except RecordRefused as exc:
                _log.error("spool.in_the_way", job_id=label.job_id, role=label.role)
                raise Unavailable(_IN_THE_WAY) from exc
            out = BlockWriter(fd, self._mac_key(label, write_id), room)
            writer = BlobWriter(out, write_id, self._begin(label) if sealed else None)
            yield writer
            writer.finish()
            self._used = (self._used[0], self._used[1] + writer.stored)

    @contextmanager
    def blob(self, label: Label) -> Iterator[Blob]:
        """An age file of the spool.

        Raises ResultExpired if it is gone, NotACiphertext, DecryptFailed, TooLarge; RecordRefused, now or
        when a part of it is read, if it is not the one that ``label.ref`` names.
        """
        try:
            with plain_files.open_(self._folder(label.job_id), label.name) as fd:
                file = self._reader(fd, label)
                yield Blob(file, header.read_by(file.read_at, FILE_LIMITS))
        except RecordRefused:
            role = label.role.rstrip("0123456789")
            _log.error("spool.blob_refused", job_id=label.job_id, role=role, attempt=label.attempt)
            metrics.SPOOL_REFUSED.labels(role).inc()
            raise

    @contextmanager
    def opened(self, label: Label, head: Label | None = None) -> Iterator[RangeReader]:
        """The plaintext of a blob whose header was sealed for its label, or is in the blob ``head``.

        Raises as ``blob``.
        """
        other = self._header(head) if head else None
        with self.blob(label) as blob:
            found = other or blob.head
            key = stream.payload_key(self.unseal(head or label, found), found.nonce)
            yield RangeReader(key, blob.payload.read_at, blob.payload.size)

    def _header(self, label: Label) -> Header:
        with self.blob(label) as blob:
            return blob.head

    def unseal(self, label: Label, head: Header) -> bytes:
        """The file key of a header that the spool identity sealed for this label."""
        bound = binding.read(head)
        if bound is None:
            raise DecryptFailed
        ref = replace(self.ref(label), version=bound.key_version)
        return sealing.file_key_of(head, self._key, ref, context=label.context)

    def header_for(self, label: Label, file_key: bytes, nonce: bytes) -> bytes:
        """A spool header around a payload that was sealed elsewhere: how a decrypted result rests sealed."""
        return sealing.write_header(
            file_key, nonce, self._key, key=self.ref(label), context=label.context, padded=False
        )

    def discard(self, label: Label) -> None:
        """One blob, when nothing needs it any more."""
        with suppress(ResultExpired, RecordRefused):
            plain_files.remove(self._folder(label.job_id), label.name)

    def delete(self, job_id: str) -> bool:
        """Everything of one job; whether it is gone. Doing it twice is no error; what is no id has none."""
        with suppress(ResultExpired):
            if not plain_files.remove_folder(self._folder(job_id)):
                _log.warning("spool.not_deleted", job_id=job_id)
                return False
        return True

    def folders(self, older_than_s: float) -> Iterator[str]:
        """Job ids of folders that nothing has changed for so long: candidates for the sweep of orphans."""
        limit = time.time() - older_than_s
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if _JOB_ID.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < limit:
                    yield entry.name

    def ref(self, label: Label) -> KeyRef:
        """The spool key's version in use."""
        return KeyRef(label.tenant, _SPOOL_KEY_ID, self._key.current_version(), self._key.name)

    def _begin(self, label: Label) -> sealing.Sealing:
        return sealing.begin(self._key, self.ref(label), label.context)

    def _mac_key(self, label: Label, write_id: bytes) -> bytes:
        return self._record_key.digest(_MAC_LABEL, *label.texts, write_id)

    def _reader(self, fd: int, label: Label) -> RangeSource:
        if not label.ref:
            return FileRange(fd, os.fstat(fd).st_size)
        write_id, size = label.ref[:_WRITE_ID_BYTES], label.ref[_WRITE_ID_BYTES:]
        return BlockReader.of(fd, self._mac_key(label, write_id), int.from_bytes(size, "big"))

    def _folder(self, job_id: str) -> Path:
        if not _JOB_ID.fullmatch(job_id):
            raise ResultExpired
        return self._directory / job_id

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._directory).free

    def _used_bytes(self) -> int:
        """The spool's size: counted anew every few seconds or more seldom, and our own writes since then."""
        begun = time.monotonic()
        if begun >= self._used[0]:
            size = _size(self._directory)
            ended = time.monotonic()
            self._used = (ended + max(_USAGE_CACHE_S, _USAGE_REST * (ended - begun)), size)
        return self._used[1]


def _size(folder: str | Path) -> int:
    """Bytes of all files below; what is deleted meanwhile, or cannot be looked at, counts for nothing."""
    total, folders = 0, [folder]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
    return total
