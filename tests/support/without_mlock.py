"""Runs a program that may not lock memory, whoever runs the tests: ``python without_mlock.py PROGRAM …``."""

import ctypes
import os
import resource
import subprocess
import sys
from typing import Final

LIMIT_BYTES: Final = 8 << 20  # as most systems have it
_PR_CAPBSET_DROP: Final = 24
_CAP_IPC_LOCK, _CAP_SYS_RESOURCE = 14, 24


def words(*program: str) -> list[str]:
    """The command line that runs ``program`` so; its first word is an absolute path."""
    return [sys.executable, "-I", "-S", __file__, *program]


def may_lock() -> bool:
    """Return whether a program that this one starts may lock its memory."""
    script = "import sys; from kms_core import secure_memory; sys.exit(secure_memory.lock() is not None)"
    return subprocess.run([sys.executable, "-P", "-c", script], check=False).returncode == 0


def main(program: list[str]) -> None:
    """Set RLIMIT_MEMLOCK, take away what would get around it, and become the program."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (LIMIT_BYTES, LIMIT_BYTES))
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (_CAP_IPC_LOCK, _CAP_SYS_RESOURCE):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.execv(program[0], program)  # noqa: S606 -- the tests' own words


if __name__ == "__main__":
    main(sys.argv[1:])
