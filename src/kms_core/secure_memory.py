"""Keeps keys and plaintext in the memory of a process out of core files, debuggers and swap.

An exec makes a process dumpable again (prctl(2)), and a fork does not inherit memory locks (mlockall(2)). So
each program calls ``forbid_dumps`` first, and each process of a server calls ``protect``, also after a fork.
Python cannot erase memory. ``SharedSecrets`` holds secrets that processes of one server share.
"""

import ctypes
import fcntl
import mmap
import os
import resource
import struct
import sys
import time
from collections.abc import Mapping
from typing import Final, Literal, Self

from kms_protocol.errors import ConfigurationError

_PR_SET_DUMPABLE: Final = 4  # prctl(2)
_ALL_PAGES: Final = 1 | 2 | 4  # mlockall(2): MCL_CURRENT, MCL_FUTURE and, since Linux 4.4, MCL_ONFAULT

Obstacle = Literal["limit", "refused", "platform"]
ADVICE: Final[Mapping[Obstacle, str]] = {
    "limit": "set LimitMEMLOCK=infinity in its systemd unit, or ulimits memlock in Compose; or have no swap",
    "refused": "allow mlockall in its seccomp profile, on Linux 4.4 or later; or have no swap",
    "platform": "run it on Linux, or encrypt the swap",
}
SIZE_BYTES: Final = 64 * 1024 * 1024  # 100 keys with as many versions as they may have
"""Pages that are not written take no memory."""
_HEAD: Final = struct.Struct("=QQ32s")  # generation, length, SHA-256 of the content
_FUTURE_WRITE: Final = 0x10  # F_SEAL_FUTURE_WRITE, fcntl(2)
_TRIES: Final = 100
_AGAIN_S: Final = 0.001


def forbid_dumps() -> None:
    """Forbid core files, and deny /proc/PID/mem and ptrace to processes of the same user.

    A fork inherits both; an exec undoes the second. Raises ConfigurationError if the kernel refuses.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise ConfigurationError(
            f"Cannot keep debuggers away (prctl PR_SET_DUMPABLE: {os.strerror(ctypes.get_errno())}): "
            "allow prctl in the seccomp profile"
        )


def lock() -> Obstacle | None:
    """Lock all present and future pages of this process; returns None, or the obstacle.

    Only used pages are locked and take memory (MCL_ONFAULT), but the limit counts the whole address space. So
    nothing is locked under a finite RLIMIT_MEMLOCK that applies: a later allocation or thread could fail.
    """
    if sys.platform != "linux":
        return "platform"
    libc = ctypes.CDLL(None)
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _lift_limit():
        return None if libc.mlockall(_ALL_PAGES) == 0 else "refused"
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, before[1]))  # below this only CAP_IPC_LOCK, without limit
    refused = libc.mlockall(_ALL_PAGES) != 0
    resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
    return "limit" if refused else None


def _lift_limit() -> bool:
    """Lift RLIMIT_MEMLOCK; False if the hard limit is finite and this process may not raise it."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        return False
    return True


def protect(*, strict: bool) -> None:
    """Lock the memory of this process and log the result; a failure is a warning if ``strict``."""
    import structlog  # noqa: PLC0415 -- each command imports this module, and few need the 10 ms

    log = structlog.get_logger(__name__)
    obstacle = lock()
    if obstacle is None:
        log.info("memory.protected", dumpable=False, locked=True)
        return
    report = log.warning if strict else log.info
    report("memory.protected", dumpable=False, locked=False, reason=obstacle, advice=ADVICE[obstacle])


# Secrets that one process writes and its children read, in memory that has no name and no file.
#
# A memfd (memfd_create(2)) whose size is fixed and which only the mapping of its creator can change
# (F_SEAL_FUTURE_WRITE, Linux 5.1). Children get its descriptor by fork or across an exec. Other processes
# cannot open it, since the processes that hold it are not dumpable (``secure_memory``).


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
        """Replace the content. Raises ConfigurationError above ``SIZE_BYTES``."""
        if len(content) > SIZE_BYTES - _HEAD.size:
            raise ConfigurationError(f"The sealed key files hold more than {SIZE_BYTES // 1024**2} MiB")
        generation = self.generation() + 1
        self._memory[_HEAD.size : _HEAD.size + len(content)] = content
        self._memory[: _HEAD.size] = _HEAD.pack(generation, len(content), _digest(content))

    def generation(self) -> int:
        """The number of writes."""
        found: int = _HEAD.unpack_from(self._memory)[0]
        return found

    def read(self) -> bytes:
        """The content; empty before the first write. A read during a write is repeated."""
        for _ in range(_TRIES):
            generation, length, digest = _HEAD.unpack_from(self._memory)
            content = self._memory[_HEAD.size : _HEAD.size + length]
            if not generation or _digest(content) == digest:
                return content
            time.sleep(_AGAIN_S)
        raise ConfigurationError("The memory with the opened keys is damaged: restart the service")


def _digest(content: bytes) -> bytes:
    import hashlib  # noqa: PLC0415 -- loads OpenSSL's digests, which few commands need

    return hashlib.sha256(content).digest()
