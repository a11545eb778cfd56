"""Makes directories and files that only this user can read; knows nothing of what they hold."""

import os
import stat
from pathlib import Path
from typing import Final

from kms_core.payload.disk import sync_folder
from kms_protocol.errors import ConfigurationError

DIR_MODE: Final = 0o700
OTHERS: Final = 0o077


def directory(path: Path) -> Path:
    """Make ``path`` (0700) and its parents; one that is there must be ours alone already.

    It is never tightened for the user: ``--state-dir /`` as root must not change /run. Raises
    ConfigurationError if it cannot be made, is a symbolic link, belongs to another or is open to others.
    """
    try:
        path.mkdir(mode=DIR_MODE, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot make the directory {path}: {exc.strerror}. Name a place of your own with --state-dir"
        ) from exc
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"{path} is a symbolic link: remove it, or name another with --state-dir")
    if found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"The directory {path} belongs to user {found.st_uid}, not to {os.geteuid()}: "
            "run as its owner, or name another with --state-dir"
        )
    if stat.S_IMODE(found.st_mode) & OTHERS:
        raise ConfigurationError(f"The directory {path} is open to other users: run chmod 700 {path}")
    return path


def replace_file(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` (0600) on the disk, whole or not at all; an older file is replaced."""
    temporary = _written(path, text)
    temporary.replace(path)
    sync_folder(path.parent)


def create_file(path: Path, text: str) -> bool:
    """Put ``text`` at ``path`` (0600) on the disk, whole or not at all; False if something is there."""
    temporary = _written(path, text)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def _written(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of a process that had this pid before us
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(handle, "w", encoding="utf-8") as file:  # noqa: PTH123  # a handle, not a path
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return temporary
