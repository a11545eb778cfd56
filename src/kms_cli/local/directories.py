"""The private directories of an installation, of its state and of its sockets, and their locks."""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from kms_core import secure_files
from kms_core.secure_files import in_shell
from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError, Conflict

DIR_MODE: Final = 0o700
_MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path is 108 with its final zero, unix(7)


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


def place(environ: Mapping[str, str]) -> tuple[Path, str]:
    """Return the folder of the runtime directories of this user, and the start of their names."""
    login = Path(environ.get("XDG_RUNTIME_DIR", ""))
    is_ours = login.is_absolute() and is_private(login, {os.geteuid()})  # under sudo it may not be
    if is_ours and len(os.fsencode(login / "kms-01234567" / "valkey.sock")) <= _MAX_SOCKET_PATH_BYTES:
        return login, "kms"
    return Path("/tmp"), f"kms-{os.geteuid()}"  # noqa: S108  # they are made 0700 and their owner checked


def runtime_dir(state_dir: Path, environ: Mapping[str, str]) -> Path:
    """Return the directory of the socket: a short path, always the same for a state directory."""
    tag = hashlib.sha256(os.fsencode(os.path.realpath(state_dir))).hexdigest()[:8]
    parent, prefix = place(environ)
    return parent / f"{prefix}-{tag}"


def is_private(folder: Path, owners: set[int]) -> bool:
    """Return whether it is a directory in which only these users can have created files."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and found.st_uid in owners and not others


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
