"""The private directories of a state directory, and their locks."""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from kms_core import secure_files
from kms_core.secure_files import in_shell
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, Conflict

DIR_MODE: Final = 0o700


def make_directory(path: Path) -> None:
    """Create a directory (0700) and its parents. Raises ConfigurationError if it cannot be created."""
    try:
        path.mkdir(mode=DIR_MODE, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot create the directory {path}: {exc.strerror}. Name another with --state-dir"
        ) from exc


def private_directory(path: Path) -> Path:
    """Create a directory (0700) and its parents. An existing one must already be private to this user.

    Its mode is never changed: ``--state-dir /`` as root must not change /run. Raises ConfigurationError if it
    cannot be created, is a symbolic link, belongs to another user or is open to others.
    """
    make_directory(path)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"{path} is a symbolic link: remove it, or name another with --state-dir")
    if found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"The directory {path} belongs to user {found.st_uid}, not to {os.geteuid()}: "
            "run as its owner, or name another with --state-dir"
        )
    if stat.S_IMODE(found.st_mode) & secure_files.GROUP_AND_OTHERS:
        raise ConfigurationError(f"The directory {path} is open to others: run chmod 700 {in_shell(path)}")
    return path


@contextmanager
def locked(path: Path, taken: str) -> Iterator[int]:
    """Hold the lock file at ``path``, which then has the id of this process.

    Raises Conflict with the text ``taken`` and the id of the holder if another process holds it.
    """
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(secure_files.lock(path, wait=False))
        except BlockingIOError as exc:
            pid = small_files.read(path).decode("ascii", "replace").strip()
            raise Conflict(
                f"{taken} (process {pid or '?'}): stop it, or name another state directory"
            ) from exc
        os.ftruncate(handle, 0)
        secure_files.write_all(handle, b"%d\n" % os.getpid())
        yield handle
