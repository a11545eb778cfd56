"""The notes of each ``kms up`` of this user: which of them run, and at which address. Imports little."""

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec

from kms_cli import terminal
from kms_cli.local.directories import is_private, place, private_directory, runtime_dir
from kms_cli.session import DEFAULT_URL, global_options, is_completion, is_given
from kms_core import secure_files
from kms_core.secure_files import in_shell
from kms_protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from kms_core.settings.model import Settings

NOTE: Final = "up.json"
_LONGEST_BYTES: Final = 64 * 1024
SETTLED: Final = ("HOME", "XDG_STATE_HOME", "PROVISIONING_ENV", "KMS_BIND", "KMS_PORT")
PATHS: Final = ("KMS_CONFIG", "KMS_STATE_DIR")
_PERHAPS_SECRET: Final = ("KMS_REDIS_URL", "KMS_BROKER_URL", "COSMIAN_KMS_URL", "COSMIAN_API_KEY")


class Running(msgspec.Struct, frozen=True):
    """The note of a ``kms up`` that runs. It holds no secret.

    ``started`` is in seconds since the epoch. ``environ`` has the variables with which a command reads the
    same settings; ``others`` are the names of set variables whose values are left out, as they may be secret.
    """

    started: float
    url: str
    state_dir: str
    environ: dict[str, str]
    others: list[str]


@contextmanager
def keep_note(settings: "Settings", url: str, environ: Mapping[str, str]) -> Iterator[None]:
    """Keep a locked note (``Running``) in ``runtime_dir`` until the block ends, then remove it.

    Removes also the directory if it is empty then. Raises ConfigurationError as ``private_directory``,
    OSError.
    """
    folder = private_directory(runtime_dir(settings.state_dir, environ))
    named = {name: environ[name] for name in SETTLED if environ.get(name)}
    named |= {name: str(Path(environ[name]).absolute()) for name in PATHS if environ.get(name)}
    note = Running(
        time.time(),
        url,
        str(settings.state_dir.absolute()),
        named,
        [name for name in _PERHAPS_SECRET if environ.get(name)],
    )
    try:
        with secure_files.lock(folder / NOTE) as handle:
            os.ftruncate(handle, 0)
            secure_files.write_all(handle, msgspec.json.encode(note))
            yield
    finally:
        (folder / NOTE).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def address(environ: Mapping[str, str]) -> str:
    """Return the address of the ``kms up`` that runs, else the default one.

    Prints which one it is if others are possible. Raises ConfigurationError if the state directory that the
    options name is not that of the ``kms up`` at the default address.
    """
    found, named = running(environ), global_options().state_dir
    for note in filter(_is_default, () if found or not named else _notes(environ)):
        text = f"No kms up runs with --state-dir {in_shell(str(named))}; that at {DEFAULT_URL} has"
        raise ConfigurationError(f"{text} {_name(note)}: name one that runs, or --url")
    if not found:
        return DEFAULT_URL
    others = _others(found)
    if not named and not any(map(_is_default, found)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", _port(DEFAULT_URL))) == 0:
                others += f"{' or ' if others else ''}--url {DEFAULT_URL}"
    if others and not is_completion():
        terminal.say(f"using {found[0].url}, kms up with {_name(found[0])}; for another: {others}")
    return found[0].url


def running(environ: Mapping[str, str]) -> list[Running]:
    """Return each ``kms up`` that runs and fits the global options, the likeliest first.

    It is of this user, and has this HOME or the named state directory. The likeliest is the one with the
    default port, else the newest.
    """
    notes = [note for note in _notes(environ) if _fits(note, environ)]
    return sorted(notes, key=lambda note: (not _is_default(note), -note.started))


def doubts(running: Sequence[Running]) -> Iterator[tuple[str, str]]:
    """Yield reasons why the settings of this command may not be those of ``kms up``, each with a remedy."""
    if others := _others(running):
        yield f"kms up runs {len(running)} times, this is {running[0].state_dir}", f"for another: {others}"
    for each in running[:1]:
        if unset := [name for name in each.others if not os.environ.get(name)]:
            yield f"kms up runs with {', '.join(unset)}, this command without", "set the same here"


def _others(running: Sequence[Running]) -> str:
    return " or ".join(map(_name, running[1:]))


def _name(note: Running) -> str:
    return f"--state-dir {in_shell(note.state_dir)}"


def _notes(environ: Mapping[str, str]) -> list[Running]:
    """Return the note of each ``kms up`` of this user that runs, in a login session or outside of any."""
    places = {place(environ), place({}), (Path(f"/run/user/{os.geteuid()}"), "kms")}
    folders = (folder for parent, prefix in places for folder in parent.glob(f"{prefix}-*"))
    return [note for folder in folders if (note := _read(folder))]


def _read(folder: Path) -> Running | None:
    """Return a note, if it is this user's, and locked by its ``kms up``."""
    if not is_private(folder, {os.geteuid()}):
        return None
    with suppress(OSError, msgspec.DecodeError), open(folder / NOTE, "rb", opener=_own) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return msgspec.json.decode(file.read(_LONGEST_BYTES), type=Running)
    return None


def _own(path: str, flags: int) -> int:
    """Open a plain file of this user: the folder may be another one by now. Raises OSError."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(handle)
        raise PermissionError
    return handle


def _fits(note: Running, environ: Mapping[str, str]) -> bool:
    given = global_options()
    if given.state_dir:
        is_meant = os.path.realpath(given.state_dir) == os.path.realpath(note.state_dir)
    else:
        is_meant = note.environ.get("HOME") == environ.get("HOME")
    return (
        is_meant
        and (given.config is None or str(given.config.absolute()) == note.environ.get("KMS_CONFIG"))
        and (not is_given("url") or _port(given.url) == _port(note.url))
        and environ.get("KMS_PORT") in {None, "", str(_port(note.url))}
    )


def _port(url: str) -> int | None:
    return urlsplit(url).port


def _is_default(note: Running) -> bool:
    """Return whether it has the port of the default address."""
    return _port(note.url) == _port(DEFAULT_URL)


def environ_of(found: Sequence[Running], environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment for reading the settings of the first one; ``environ`` if there is none."""
    if not found:
        return environ
    kept = {name: found[0].environ.get(name, "") for name in (*SETTLED, *PATHS)}
    return {name: value for name, value in {**environ, **kept}.items() if value or name not in kept}
