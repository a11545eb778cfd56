"""Runs a command whose output goes to a terminal of a given width."""

import errno
import os
import subprocess
import termios
from collections.abc import Mapping
from pathlib import Path


def at_terminal(command: str, folder: Path, env: Mapping[str, str], *, columns: int = 80) -> tuple[int, str]:
    """Return the exit code of a line of bash, and all that its terminal was sent; stdin is empty."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as running:
        os.close(theirs)
        shown = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    return running.returncode, shown.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError as exc:
        if exc.errno == errno.EIO:  # Linux says so once no process has the terminal open
            return b""
        raise
