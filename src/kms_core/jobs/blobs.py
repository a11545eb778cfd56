"""The spool: uploads, items and results of jobs on a local disk, sealed under the spool key; knows no Redis.

``<spool>/<job id>/<name>``, 0600 in 0700. A blob is an age file of the spool identity whose context names
tenant, job, role and attempt, so that blobs cannot be swapped. Two exceptions hold no plaintext either: an
upload that is to be decrypted rests as the ciphertext that it is, and ``head.<fence>`` is the header of a
result whose payload is the upload's own.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from cryptography.utils import Buffer

from kms_core.backends.age import AgeBackend
from kms_core.context import Context
from kms_core.envelope import binding, disk, header, sealing, stream
from kms_core.envelope.binding import KeyRef
from kms_core.envelope.extents import Extent
from kms_core.envelope.header import FILE_LIMITS, VERSION_LINE, Header
from kms_core.envelope.pipes import SlabSealer
from kms_core.envelope.ranges import RangeReader
from kms_core.errors import DecryptFailed, NotACiphertext, ResultExpired, SpoolFull

UPLOAD: Final = "upload"
ITEMS: Final = "items"
_SPOOL_KEY_ID: Final = "spool"
_JOB_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_USAGE_CACHE_S: Final = 5.0
_USAGE_REST: Final = 50  # a count is good for so many times the time it took: it costs 2 % of a process


@dataclass(frozen=True, slots=True)
class Label:
    """What a blob is; bound to it as its context."""

    tenant: str
    job_id: str
    role: str
    attempt: int = 0

    @property
    def name(self) -> str:
        return f"{self.role}.{self.attempt}" if self.attempt else self.role

    @property
    def context(self) -> Context:
        return Context((("attempt", str(self.attempt)), ("job", self.job_id), ("role", self.role)))


@dataclass(frozen=True, slots=True)
class Blob:
    """An open age file: its parsed header, and where its sealed payload lies."""

    fd: int
    head: Header
    payload: Extent

    @property
    def plaintext_bytes(self) -> int:
        """The plaintext's size, if the payload proves genuine; DecryptFailed if no payload has this size."""
        return stream.plaintext_size(self.payload.size)


@dataclass(frozen=True, slots=True)
class Unsealed:
    """A blob whose file key is known."""

    blob: Blob
    file_key: bytes = field(repr=False)

    def reader(self) -> RangeReader:
        """Random access to the plaintext; the last chunk is verified at once."""
        key = stream.payload_key(self.file_key, self.blob.head.nonce)
        return RangeReader(key, self.blob.payload.read_at, self.blob.payload.size)


class BlobWriter:
    """Writes one blob front to back, sealed or as it is. ``size`` counts what was given."""

    def __init__(self, fd: int, room: int, sealing_: sealing.Sealing | None) -> None:
        self._fd = fd
        self._room = room
        self._offset = 0
        self._sealer = SlabSealer(sealing_.payload_key) if sealing_ else None
        self._start = b""
        self.size = 0
        if sealing_:
            self._put(memoryview(sealing_.head))

    def write(self, data: Buffer, *, more: bool = False) -> None:
        """Take some bytes; ``more`` tells for certain that others follow, which saves a copy of large ones.

        Raises SpoolFull; NotACiphertext if an unsealed blob begins as something else.
        """
        self.size += len(memoryview(data))
        if self._sealer:
            for slab in self._sealer.feed(data, more=more):
                self._put(slab)
            return
        if len(self._start) < len(VERSION_LINE):
            self._start += bytes(memoryview(data)[: len(VERSION_LINE)])
            if not self._start.startswith(VERSION_LINE[: len(self._start)]):
                raise NotACiphertext
        self._put(memoryview(data))

    def finish(self) -> None:
        """Write what is held back. The blob is whole afterwards."""
        if self._sealer:
            self._put(memoryview(self._sealer.finish()))
        elif len(self._start) < len(VERSION_LINE):
            raise NotACiphertext

    @property
    def stored(self) -> int:
        """Bytes on the disk."""
        return self._offset

    def _put(self, data: memoryview) -> None:
        if self._offset + len(data) > self._room:
            raise SpoolFull(
                "The spool's limit is reached: wait for results to expire, or raise spool_max_bytes"
            )
        disk.write_all(self._fd, data, self._offset)
        self._offset += len(data)


class Spool:
    """The directory and its key. Shared by the API and all workers of an install."""

    def __init__(self, directory: Path, key: AgeBackend, max_bytes: int) -> None:
        self._directory = directory
        self._key = key
        self._max_bytes = max_bytes
        self._used = (-math.inf, 0)  # when to count again, and what there is

    @contextmanager
    def writing(self, label: Label, *, sealed: bool = True, declared_bytes: int = 0) -> Iterator[BlobWriter]:
        """A new blob; removed again if the block fails. Raises SpoolFull, at once if it cannot fit."""
        room = self._max_bytes - self._used_bytes()
        if declared_bytes > min(room, self._free_bytes()):
            raise SpoolFull
        with _new_file(self._path(label)) as fd:
            writer = BlobWriter(fd, room, self._begin(label) if sealed else None)
            yield writer
            writer.finish()
            self._used = (self._used[0], self._used[1] + writer.stored)

    def put(self, label: Label, data: bytes) -> None:
        """A small blob that holds no plaintext, whole or absent: a result's header. Raises SpoolFull."""
        path = self._path(label)
        temporary = path.with_name(f".{path.name}.tmp")
        with _new_file(temporary) as fd:
            disk.write_all(fd, memoryview(data), 0)
            temporary.rename(path)

    @contextmanager
    def blob(self, label: Label) -> Iterator[Blob]:
        """An age file of the spool. Raises ResultExpired if it is gone, NotACiphertext, DecryptFailed."""
        with self.descriptor(label) as fd:
            head = header.read(fd, FILE_LIMITS)
            size = os.fstat(fd).st_size - head.payload_offset
            yield Blob(fd, head, Extent(fd, size, head.payload_offset))

    @contextmanager
    def descriptor(self, label: Label) -> Iterator[int]:
        """A blob's bytes as they lie."""
        try:
            fd = os.open(self._path(label), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as exc:
            raise ResultExpired from exc
        try:
            yield fd
        finally:
            os.close(fd)

    def get(self, label: Label) -> bytes:
        """A small blob's bytes."""
        with self.descriptor(label) as fd:
            return os.pread(fd, FILE_LIMITS.header_bytes + stream.NONCE, 0)

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
        self._path(label).unlink(missing_ok=True)

    def delete(self, job_id: str) -> None:
        """Everything of one job. Doing it twice is no error."""
        shutil.rmtree(self._folder(job_id), ignore_errors=True)

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

    def _path(self, label: Label) -> Path:
        return self._folder(label.job_id) / label.name

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


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """A new file (0600); removed again if the block fails, and so is its folder, unless that holds more."""
    with disk.room():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # left by a crash in the middle of this very attempt
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    except BaseException:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()
        raise
    finally:
        os.close(fd)


def _size(folder: str | Path) -> int:
    """Bytes of all files below; what is deleted meanwhile counts for nothing."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                inner = entry.is_dir(follow_symlinks=False)
                total += _size(entry.path) if inner else entry.stat(follow_symlinks=False).st_size
    return total
