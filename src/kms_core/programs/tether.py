"""Starts a program that dies with its starter; as a script it is the step between fork and exec.

It knows nothing of what it starts. Why a step of its own, and not ``preexec_fn``: that runs Python
between fork and exec, which deadlocks when another thread holds a lock. This file runs after an exec,
alone in its process, costs 15 ms, and leaves through ``execv``, so the pid does not change.
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Final

PR_SET_PDEATHSIG: Final = 1  # prctl(2)
OUR_STDERR: Final = 2
EXIT_ORPHAN: Final = 1


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    output: IO[bytes] | int = OUR_STDERR,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start ``argv`` (its first word an absolute path) in a session of its own.

    The kernel kills it when the *thread* that called this ends (prctl(2), PR_SET_PDEATHSIG): call it
    from one that lives as long as the program should, normally the main thread. Terminal signals do
    not reach it; it writes no core dumps and makes files that only this user can read. ``env`` is its
    whole environment, ``output`` takes what it prints.
    """
    step = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    return subprocess.Popen(
        [*step, *argv],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=env,
        pass_fds=pass_fds,
        start_new_session=True,
        umask=0o077,
    )


def main() -> None:
    """Tie this process to its parent, then become the program named on the command line."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(EXIT_ORPHAN)
    if os.getppid() != parent:  # it died before the line above took effect
        sys.exit(EXIT_ORPHAN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and an exec would pass that on
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execv(program[0], program)  # noqa: S606  # the whole point: become it, without a shell
    except OSError as exc:
        sys.exit(f"kms: error: cannot start {program[0]}: {exc.strerror}")


if __name__ == "__main__":
    main()
