"""Keeps the memory of a process, which holds keys and plaintext, out of core files, debuggers and swap.

Neither protection is for good: an exec makes a process dumpable again (prctl(2)), and memory locks are not
inherited by a fork (mlockall(2)). So each program calls ``forbid_dumps`` first, and each process of a server
calls ``lock``, also after a fork. Python itself cannot erase memory.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Mapping
from typing import Final, Literal

from kms_protocol.errors import ConfigurationError

_PR_SET_DUMPABLE: Final = 4  # prctl(2)
_ALL_PAGES: Final = 1 | 2 | 4  # mlockall(2): MCL_CURRENT, MCL_FUTURE and, since Linux 4.4, MCL_ONFAULT

Obstacle = Literal["limit", "refused", "platform"]
ADVICE: Final[Mapping[Obstacle, str]] = {
    "limit": "set LimitMEMLOCK=infinity in its systemd unit, or ulimits memlock in Compose; or have no swap",
    "refused": "allow mlockall in its seccomp profile, on Linux 4.4 or later; or have no swap",
    "platform": "run it on Linux, or encrypt the swap",
}


def forbid_dumps() -> None:
    """Forbid core files, and have the kernel refuse /proc/PID/mem and ptrace to processes of the same user.

    A fork inherits this; an exec undoes the second half. Raises ConfigurationError where it is refused.
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
    """Lock all pages of this process, those to come included; None, or what was in the way.

    Only pages that are used are locked, and take memory (MCL_ONFAULT), but the limit counts all of the
    address space. So nothing is locked where RLIMIT_MEMLOCK is finite and counts: an allocation or a thread
    could fail later because of it.
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


def may_lock() -> bool:
    """Whether ``lock`` would lock the memory of a program that this one starts; leaves this one unlocked."""
    if sys.platform != "linux":
        return False
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = lock() is None
    ctypes.CDLL(None).munlockall()
    resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
    return locked


def _lift_limit() -> bool:
    """Lift RLIMIT_MEMLOCK; False if the hard limit is finite and this process may not raise it."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        return False
    return True
