"""Finds the settings file that ``--config`` and ``KMS_CONFIG`` do not name.

Servers (``kms-service``, ``kms-worker``, ``kms up``) look in their working directory, and note in the state
directory which file they read. Commands read the file of that note: they may run in a foreign repository, and
ignore the settings there.
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from kms_core import secure_files
from kms_core.settings.toml_reader import SectionReader
from kms_protocol.errors import ConfigurationError

HERE: Final = Path("provisioning/config/kms.toml")
"""In the working directory of a server."""
MACHINE: Final = Path("/etc/kms-service/kms.toml")
_NOTE: Final = Path("run/config")  # in the state directory
_LONGEST_PATH_BYTES: Final = 4096
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS: Final = 40  # as Linux: path_resolution(7)


def named(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """``path``, else the settings file that ``KMS_CONFIG`` names."""
    return path or (Path(environ["KMS_CONFIG"]) if environ.get("KMS_CONFIG") else None)


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """``$XDG_STATE_HOME/kms-service``, else ``~/.local/state/kms-service``."""
    xdg = environ.get("XDG_STATE_HOME", "")
    if xdg.startswith("/"):  # relative ones are ignored (XDG Base Directory Specification)
        return Path(xdg, "kms-service")
    if not environ.get("HOME"):
        raise ConfigurationError("Neither HOME nor XDG_STATE_HOME is set: name a directory in KMS_STATE_DIR")
    return Path(environ["HOME"], ".local/state/kms-service")


def for_server(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The settings file of a server: the named one, else HERE (absolute), else MACHINE, else None.

    ``path`` is the flag ``--config``. Raises ConfigurationError if others could have written the file HERE,
    or if there are both: a repository must not replace the settings of the machine.
    """
    if file := named(path, environ):
        return file
    if not _is_found(HERE):
        return MACHINE if _is_file(MACHINE) else None
    if _is_file(MACHINE):
        raise ConfigurationError(
            f"Both {HERE} and {MACHINE} exist: name the one to read: --config FILE, or KMS_CONFIG=FILE"
        )
    return HERE.absolute()


def for_command(
    path: Path | None, environ: Mapping[str, str], state_dir: Path | None, say: Callable[[str], object]
) -> Path | None:
    """The settings file of a command: the named one, else that of the note, else MACHINE, else None.

    ``path`` and ``state_dir`` are the flags ``--config`` and ``--state-dir``. ``say`` gets a line for each
    file that is skipped. Raises ConfigurationError if the file of the note is gone and no MACHINE exists.
    """
    if file := named(path, environ):
        return file
    note, has_machine = _note_path(environ, state_dir), _is_file(MACHINE)
    noted = _read(note, say) if note else None
    file = noted if noted and _is_file(noted) else MACHINE if has_machine else None
    if noted and not file:
        raise ConfigurationError(
            f"{noted}, which the service read last, is gone: name another by --config, or remove {note}"
        )
    if noted and has_machine and noted != MACHINE:
        other = f"{MACHINE} is not read" if file == noted else f"{noted} is gone"
        say(f"settings: {file}; {other}: the service read {noted} last")
    if _is_file(HERE) and (file is None or file.resolve() != HERE.resolve()):
        told = f"{HERE.absolute()} is not read: if you trust it, name it by --config"
        say(f"settings: {file or 'defaults'}; {told}")
    return file


# -- the note ----------------------------------------------------------------------------------------


def write_note(file: Path | None, environ: Mapping[str, str]) -> None:
    """Note for commands which settings file a server reads; without one, or for a pipe, remove the note.

    A directory that cannot be written to changes nothing: commands then need ``--config``.
    """
    path = _note_path(environ, None)
    if path is None:
        return
    with suppress(OSError):
        if file is None or not _is_file(file):
            path.unlink(missing_ok=True)
        else:
            secure_files.make_folders(path.parent)
            secure_files.write(path, os.fsencode(f"{file.absolute()}\n"))


def _note_path(environ: Mapping[str, str], state_dir: Path | None) -> Path | None:
    """The path of the note; None if no state directory is known.

    It is in the state directory that a command finds without settings, not in one that they name.
    """
    given = str(state_dir or environ.get("KMS_STATE_DIR", ""))
    try:
        reader = SectionReader(environ.get("HOME"))
        state: Path = reader.value(Path, given, "kms.state_dir") if given else default_state_dir(environ)
    except ConfigurationError:  # ``load`` says so, unless the settings name one
        return None
    return state / _NOTE


def _read(note: Path, say: Callable[[str], object]) -> Path | None:
    """The path in a note of this user or root that others cannot change."""
    try:
        fd = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:  # noqa: PTH123 -- a descriptor, not a path
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or _is_foreign(found) or found.st_mode & _OTHERS_WRITE:
            say(f"{note} is not read: another user could have written it; name the settings by --config")
            return None
        path = Path(os.fsdecode(file.read(_LONGEST_PATH_BYTES).removesuffix(b"\n")))
    return path if path.is_absolute() else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a directory that this user may not search
        return False


# -- who could have written it -----------------------------------------------------------------------


def _is_found(file: Path) -> bool:
    """Return whether a file exists, and refuse one that other users could have written.

    Each folder on its absolute path and the file must belong to this process's user or to root, and must not
    be writable for others; so must the targets of symbolic links and the folders on their paths. A folder
    with the sticky bit, such as ``/tmp``, may be writable: entries of other users in it are refused.
    Raises ConfigurationError, which says how to trust the file.
    """
    try:
        entries = list(_path_entries(file.absolute()))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as exc:
        raise ConfigurationError(f"Cannot read {file}: {exc.strerror}; check the path and its mode") from exc
    for path, found in entries:
        _check(path, found, file.absolute())
    return True


def _path_entries(file: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Each folder, link and file on the absolute path to ``file``."""
    at, rest, links = Path(), list(reversed(file.parts)), 0
    while rest:
        step = at / rest.pop()
        found = step.lstat()
        yield step, found
        if not stat.S_ISLNK(found.st_mode):
            at = step
            continue
        links += 1
        if links > _MOST_LINKS:
            raise ConfigurationError(f"{file} is a circle of symbolic links")
        rest += reversed(step.readlink().parts)  # a link to an absolute path starts again: at / "/" is "/"


def _check(path: Path, found: os.stat_result, file: Path) -> None:
    name = secure_files.in_shell(file)
    trust = f"if you trust it, name it: --config {name}, or KMS_CONFIG={name}"
    if _is_foreign(found):
        raise ConfigurationError(
            f"{file} is not read: {path} belongs to another user (uid {found.st_uid}); {trust}"
        )
    is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & _OTHERS_WRITE and not is_sticky and not stat.S_ISLNK(found.st_mode):
        raise ConfigurationError(
            f"{file} is not read: others can write to {path} (mode {stat.S_IMODE(found.st_mode):04o}); "
            f"chmod go-w {secure_files.in_shell(path)}, or, {trust}"
        )


def _is_foreign(found: os.stat_result) -> bool:
    return found.st_uid not in {0, os.geteuid()}
