"""Objects as targets of payloads: multipart uploads whose parts are written in any order."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from kms_core.s3.bucket import MOST_PARTS, Bucket, ObjectReader, UploadAborted, UploadedPart
from kms_protocol.errors import InvalidRequest, PathRefused

PART_BYTES: Final = 8 * 1024 * 1024
"""Part size of objects up to 80 GB; larger ones have larger parts, since an upload has at most 10,000."""

COPY_BYTES: Final = 256 * 1024 * 1024
_COPIES: Final = 4  # concurrent; the store does the work
_MIB: Final = 1024 * 1024


@dataclass(slots=True)
class _Filling:
    """A part that is not complete yet."""

    memory: memoryview
    missing: int


@dataclass(slots=True)
class Assembly:
    """An object that several threads write at any position. It is visible only after its completion.

    The thread that writes the last bytes of a part sends it, so memory holds about two parts for each writing
    thread. An object below one part is not sent; ``whole`` returns it. ``begin`` begins the upload and
    returns its id, before the first part is sent.
    """

    bucket: Bucket
    key: str
    mark: str
    begin: Callable[[], str]
    size: int = -1
    part_bytes: int = PART_BYTES
    upload: str = ""
    _filling: dict[int, _Filling] = field(default_factory=dict)
    _sent: dict[int, UploadedPart] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _copied: bool = False

    def reserve(self, size: int) -> None:
        if self.size == size:
            return
        if self.size >= 0:
            raise ValueError("the object was given another size before")
        self.size = size
        self.part_bytes = max(PART_BYTES, -(-size // (MOST_PARTS * _MIB)) * _MIB)
        if size > self.part_bytes:
            self.upload = self.begin()

    def write_at(self, data: memoryview, position: int) -> None:
        while data:
            number, at = divmod(position, self.part_bytes)
            run = data[: self.part_bytes - at]
            part = self._part(number)
            part.memory[at : at + len(run)] = run
            self._arrived(number, part, len(run))
            data, position = data[len(run) :], position + len(run)

    def can_copy(self, source: ObjectReader) -> bool:
        """Return whether the store can copy: same endpoint, and an object of several parts."""
        return bool(self.upload) and source.bucket.line is self.bucket.line

    def copy(
        self, source: ObjectReader, check: Callable[[], object], report: Callable[[int], object]
    ) -> bool:
        """Have the store copy ``source`` after the first part, to the end. False if it cannot.

        ``check`` is called before each request and may raise to stop; ``report`` gets the bytes of each part.
        """
        width = max(COPY_BYTES, -(-source.size // (MOST_PARTS - 1)))
        starts = range(0, source.size, width)

        def one(index: int) -> bool:
            check()
            rest = source.tail(starts[index])
            part = self.bucket.copy_part(self.key, self.upload, index + 2, rest.head(min(width, rest.size)))
            if part is None:
                return False
            self._sent[part.number] = part
            report(part.size)
            return True

        if not one(0):
            return False
        self._copied = True
        with ThreadPoolExecutor(_COPIES, thread_name_prefix="copy") as pool:
            if not all(pool.map(one, range(1, len(starts)))):
                raise PathRefused("The object store copies some parts and others not: run the job again")
        return True

    def settle(self) -> None:
        """Raise InvalidRequest unless all bytes were written, UploadAborted. Nothing may be written after."""
        if self._copied:  # the store knows the sizes of copied parts
            if (parts := self.bucket.parts(self.key, self.upload)) is None:
                raise UploadAborted
            self._sent = {part.number: part for part in parts}
        held = sum(part.size for part in self._sent.values()) if self.upload else len(self.whole)
        if held != self.size or (not self.upload and any(part.missing for part in self._filling.values())):
            raise InvalidRequest("The object is incomplete: run the job again")

    @property
    def whole(self) -> memoryview:
        """The bytes of an object below one part."""
        return self._filling[0].memory if self._filling else memoryview(b"")

    @property
    def parts(self) -> list[UploadedPart]:
        """The uploaded parts, by number."""
        return [self._sent[number] for number in sorted(self._sent)]

    def _part(self, number: int) -> _Filling:
        with self._lock:
            if number not in self._filling:
                size = min(self.part_bytes, self.size - number * self.part_bytes)
                self._filling[number] = _Filling(memoryview(bytearray(size)), size)
            return self._filling[number]

    def _arrived(self, number: int, part: _Filling, size: int) -> None:
        with self._lock:
            part.missing -= size
            if part.missing or not self.upload:
                return
            del self._filling[number]
        self._sent[number + 1] = self.bucket.put_part(self.key, self.upload, number + 1, part.memory)


def digest(parts: Sequence[UploadedPart]) -> str:
    """A digest of the numbers, sizes and ETags of parts."""
    text = "".join(f"{part.number} {part.size} {part.etag}\n" for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()
