"""Keeps keys and plaintext in the memory of a process out of core files, debuggers and swap.

An exec makes a process dumpable again (prctl(2)), and a fork does not inherit memory locks (mlockall(2)). So
each program calls ``forbid_dumps`` first, and each process of a server calls ``lock``, also after a fork.
Python cannot erase memory.
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
