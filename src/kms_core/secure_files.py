"""Files that only the user of the service may read: written durably, and checked when read."""

import fcntl
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kms_protocol import small_files
from kms_protocol.errors import ConfigurationError
from kms_protocol.whole_files import replacing, sync_folder

OTHERS: Final = stat.S_IRWXO
GROUP_AND_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def write(path: Path, content: bytes, *, locked: bool = False) -> None:
    """Write a file (0600) durably, in place of an existing one; see ``whole_files``. Raises OSError."""
    with replacing(path, locked=locked) as file:
        file.write(content)


def replace_kept(path: Path, content: bytes) -> None:
    """Replace a file, or the target of a link, and keep its owner and mode. Raises OSError.

    The caller excludes other writers (``lock``).
    """
    path = path.resolve(strict=True)
    old = path.stat()
    with replacing(path, locked=True) as file:
        keep_access(file.fileno(), old)
        file.write(content)


def keep_access(fd: int, old: os.stat_result) -> None:
    """Give an open file the owner and the mode of the one whose place it takes.

    The mode comes last, so that it lets no group in that is not to have it. Raises OSError if the owner
    cannot be changed; the mode is set then too.
    """
    made = os.fstat(fd)
    try:
        if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
            os.fchown(fd, old.st_uid, old.st_gid)
    finally:
        os.fchmod(fd, old.st_mode & 0o777)


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold the lock of a directory, or of a file (0600), which is created; yields its descriptor.

    Raises BlockingIOError if another process holds it and ``wait`` is False, OSError.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


def create(path: Path, content: bytes) -> bool:
    """Write a file (0600) durably; False if the name exists, which stays as it is. Raises OSError.

    Of two processes that create one file at the same time, one succeeds.
    """
    try:
        with replacing(path, overwrite=False) as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data`` at the position of a descriptor. Raises OSError if only a part was written."""
    while data:
        data = data[os.write(fd, data) :]


def make_folders(path: Path) -> None:
    """Make a directory (0700) and those above it that are missing, each on disk with its name.

    Raises OSError.
    """
    for folder in reversed([each for each in (path, *path.parents) if not each.exists()]):
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder.parent)


def secret_text(path: Path, setting: str) -> str:
    """The text of a small file, without white space around it. Raises ConfigurationError for ``setting``."""
    try:
        found = small_files.text(path).strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{setting}: cannot read {path}; check the path and its mode") from exc
    if not found:
        raise ConfigurationError(f"{setting}: {path} is empty")
    return found


# -- permissions ---------------------------------------------------------------------------------------


def open_to_others(file: Path | int) -> int:
    """The permission bits (``0o640``) of a file that others than its owner may use, else 0. Raises OSError.

    ``file`` is a path or a descriptor. Pipes and devices count as private.
    """
    found = os.stat(file)  # noqa: PTH116 -- of a descriptor, too
    mode = stat.S_IMODE(found.st_mode)
    return mode if stat.S_ISREG(found.st_mode) and is_open(found, os.geteuid()) else 0


def is_open(found: os.stat_result, uid: int) -> bool:
    """Return whether others than the process of user ``uid`` may use the file.

    A file of root that its group may read is private too, to a service that is not root: a Secret of
    Kubernetes (``fsGroup``) is such a file, and a credential of systemd (whose access list shows as the
    group's bits). PostgreSQL reads its key file by the same rule (``ssl_key_file``).
    """
    handed_by_root = found.st_uid == 0 and uid != 0
    return bool(found.st_mode & (GROUP_AND_OTHERS & ~stat.S_IRGRP if handed_by_root else GROUP_AND_OTHERS))


def in_shell(path: object) -> str:
    """A path as a word of a command that a message shows: quoted where a shell would read it otherwise."""
    return shlex.quote(str(path))


def check_secret(
    path: Path, warn: Callable[..., object], event: str, *, strict: bool, setting: str = ""
) -> None:
    """Check that only its owner may use the file of a secret, which ``setting`` names.

    If others may: raises ConfigurationError where ``strict`` holds, else calls ``warn`` (of a logger) with
    ``event``. Raises OSError.
    """
    mode = open_to_others(path)
    if not mode:
        return
    advice = f"{path} can be read by others (mode {mode:04o}): run `chmod 600 {in_shell(path)}`"
    if strict:
        raise ConfigurationError(f"{setting}: {advice}" if setting else advice)
    warn(event, path=str(path), mode=f"{mode:04o}", advice=advice)
