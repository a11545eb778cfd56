"""The data of one operation: bytes in memory, or a file and the target that receives the result.

Both classes have the same methods. They return the result, or b"" if a target receives it. ``offset`` is
that of the first chunk in a ciphertext, ``head`` a header and its payload nonce; payload keys have 32 bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kms_core.age import header, stream
from kms_core.age.header import FILE_LIMITS, Header, HeaderLimits
from kms_core.payload import parallel
from kms_core.payload.files import RangeSource, RangeTarget
from kms_core.payload.parallel import DEFAULTS, ParallelOptions


@dataclass(frozen=True, slots=True)
class InMemory:
    """Bytes in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read_header(self, limits: HeaderLimits) -> Header:
        """Parse the header of a ciphertext. Raises as ``header.parse``."""
        return header.parse(self.data, limits)

    def seal(self, head: bytes, key: bytes) -> bytes:
        """Seal a plaintext behind ``head``."""
        return head + stream.seal(key, self.data)

    def open(self, offset: int, key: bytes) -> bytes:
        """Open the payload of a ciphertext. Raises DecryptFailed."""
        return stream.open_(key, memoryview(self.data)[offset:])

    def reseal(self, offset: int, keys: tuple[bytes, bytes], head: bytes) -> bytes:
        """Open the payload under the first key and seal it under the second. Raises DecryptFailed."""
        old, new = keys
        return head + stream.seal(new, self.open(offset, old))

    def replace_header(self, size: int, new: bytes) -> bytes:
        """Put ``new`` in the place of a header of ``size`` bytes; the payload stays as it is."""
        return new + self.data[size:]


@dataclass(frozen=True, slots=True)
class FileToFile:
    """A file and the target that receives the result, processed by several threads.

    After an error the target is incomplete and must not be published. Methods also raise InvalidRequest if
    the source changes, SpoolFull, and what ``options.check`` raises. ``copy`` copies a payload to a position
    of the target, by default with ``parallel.copy_run``.
    """

    source: RangeSource
    target: RangeTarget
    options: ParallelOptions = DEFAULTS
    copy: Callable[[RangeSource, int, ParallelOptions], None] | None = None

    @property
    def size(self) -> int:
        return self.source.size

    def read_header(self, limits: HeaderLimits) -> Header:
        """Parse the header; ``limits`` are for ciphertexts in memory, files have ``FILE_LIMITS``."""
        del limits
        return header.read_by(self.source.read_at, FILE_LIMITS)

    def seal(self, head: bytes, key: bytes) -> bytes:
        parallel.seal_file(key, self.source, self.target, head, self.options)
        return b""

    def open(self, offset: int, key: bytes) -> bytes:
        parallel.open_file(key, self.source.tail(offset), self.target, self.options)
        return b""

    def reseal(self, offset: int, keys: tuple[bytes, bytes], head: bytes) -> bytes:
        parallel.reseal_file(keys, self.source.tail(offset), self.target, head, self.options)
        return b""

    def replace_header(self, size: int, new: bytes) -> bytes:
        payload = self.source.tail(size)
        self.target.reserve(len(new) + payload.size)
        self.target.write_at(memoryview(new), 0)
        if self.copy:
            self.copy(payload, len(new), self.options)
        else:
            parallel.copy_run(payload, self.target, len(new), self.options)
        return b""
