"""Secrets that one process writes and its children read, in memory that has no name and no file.

A memfd (memfd_create(2)) whose size is fixed and which only the mapping of its creator can change
(F_SEAL_FUTURE_WRITE, Linux 5.1). Children get its descriptor by fork or across an exec. Other processes
cannot open it, since the processes that hold it are not dumpable (``secure_memory``).
"""

import fcntl
import hashlib
import mmap
import os
import struct
import sys
import time
from typing import Final, Self

from kms_protocol.errors import ConfigurationError

SIZE_BYTES: Final = 8 * 1024 * 1024  # pages that are not written take no memory
_HEAD: Final = struct.Struct("=QQ32s")  # generation, length, SHA-256 of the content
_FUTURE_WRITE: Final = 0x10  # F_SEAL_FUTURE_WRITE, fcntl(2)
_TRIES: Final = 100
_AGAIN_S: Final = 0.001


class SharedSecrets:
    """The memory, with its descriptor. One process writes, in one thread; any number read."""

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        self.fd = fd
        self._memory = memory

    @classmethod
    def create(cls) -> Self:
        """New memory, which this process may write. Raises ConfigurationError where the kernel has none."""
        if sys.platform != "linux":
            raise ConfigurationError("Sealed key files need Linux: other systems have no memfd")
        try:
            fd = os.memfd_create("kms-keys", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, SIZE_BYTES)
            memory = mmap.mmap(fd, SIZE_BYTES)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _FUTURE_WRITE
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        except OSError as exc:
            raise ConfigurationError(
                f"Sealed key files need memfd_create with F_SEAL_FUTURE_WRITE ({exc.strerror}): use Linux "
                "5.1 or later, and allow it in the seccomp profile"
            ) from exc
        return cls(fd, memory)

    @classmethod
    def inherited(cls, fd: int) -> Self:
        """The memory behind a descriptor from the parent, which this process may only read."""
        os.set_inheritable(fd, False)  # noqa: FBT003 -- its only parameter
        return cls(fd, mmap.mmap(fd, SIZE_BYTES, prot=mmap.PROT_READ))

    def write(self, content: bytes) -> None:
        """Replace the content. Raises ConfigurationError above 8 MiB."""
        if len(content) > SIZE_BYTES - _HEAD.size:
            raise ConfigurationError(f"The sealed key files hold more than {SIZE_BYTES // 1024**2} MiB")
        generation = self.generation() + 1
        self._memory[_HEAD.size : _HEAD.size + len(content)] = content
        self._memory[: _HEAD.size] = _HEAD.pack(generation, len(content), hashlib.sha256(content).digest())

    def generation(self) -> int:
        """The number of writes."""
        found: int = _HEAD.unpack_from(self._memory)[0]
        return found

    def read(self) -> bytes:
        """The content; empty before the first write. A read during a write is repeated."""
        for _ in range(_TRIES):
            generation, length, digest = _HEAD.unpack_from(self._memory)
            content = self._memory[_HEAD.size : _HEAD.size + length]
            if not generation or hashlib.sha256(content).digest() == digest:
                return content
            time.sleep(_AGAIN_S)
        raise ConfigurationError("The memory with the opened keys is damaged: restart the service")
