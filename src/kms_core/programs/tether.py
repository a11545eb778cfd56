"""Starts a program that the kernel kills when its starter dies; run as a script between fork and exec.

``preexec_fn`` would run Python between fork and exec, which deadlocks if another thread holds a lock. This
script runs after an exec, takes 15 ms, and ends by ``execv``, so that the pid stays the same.
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

    The kernel kills it when the *thread* that called this ends (prctl(2), PR_SET_PDEATHSIG): call it from a
    thread that lives as long as the program should, normally the main thread. Terminal signals do not reach
    it; it writes no core dumps, and only this user can read the files that it creates. ``env`` is its whole
    environment, ``output`` its standard output and error.
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
    if os.getppid() != parent:  # the parent died before the line above took effect
        sys.exit(EXIT_ORPHAN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and an exec would pass that on
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execv(program[0], program)  # noqa: S606  # it replaces this process, without a shell
    except OSError as exc:
        sys.exit(f"kms: error: cannot start {program[0]}: {exc.strerror}")


if __name__ == "__main__":
    main()
