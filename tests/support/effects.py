"""Effects of a process outside itself, in order, and its death at any one of them.

A process is the code in the ``with`` block of ``Process``, in this one. Effects are the commands that it
sends to Redis, and its calls of the functions of ``os`` that change files. After its death each further
effect raises ``Died`` and changes nothing, so no cleanup can happen. ``missed`` has what changed something
and is none of these, as audit events of the interpreter and the sockets show it.
"""

import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, NoReturn, Self, TypeVar

import pytest
from redis.connection import AbstractConnection
from redis.exceptions import ResponseError

from support.synced_disk import SyncedDisk

Moment = Literal["before", "after", "pause", "twice"]
_T = TypeVar("_T")

TARGETS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("write", "writev", "pwrite", "pwritev", "ftruncate", "truncate", "posix_fallocate"), 0),
    **dict.fromkeys(("fsync", "fdatasync", "setxattr", "removexattr", "utime", "sendfile"), 0),
    **dict.fromkeys(("chmod", "fchmod", "chown", "fchown", "lchown", "mkdir", "rmdir"), 0),
    **dict.fromkeys(("unlink", "remove", "mkfifo", "mknod"), 0),
    **dict.fromkeys(("rename", "replace", "link", "symlink", "copy_file_range", "splice"), 1),
}
"""The functions of ``os`` that change files, and which of their arguments says what is changed."""
_SYNCS: Final = frozenset({"fsync", "fdatasync"})
_REMOVALS: Final = frozenset({"rename", "replace", "unlink", "remove"})
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_HANDSHAKE: Final = frozenset({b"HELLO", b"AUTH", b"SELECT", b"CLIENT", b"PING"})
"""Commands about a connection alone."""
_CHANGES: Final = frozenset(
    {
        *(f"os.{name}" for name in ("chflags", "chmod", "chown", "link", "mkdir", "remove", "removexattr")),
        *(f"os.{name}" for name in ("rename", "rmdir", "setxattr", "symlink", "truncate", "utime", "lockf")),
        *(f"os.{name}" for name in ("exec", "fork", "forkpty", "kill", "posix_spawn", "spawn", "system")),
        *("subprocess.Popen", "sqlite3.connect"),
    }
)
"""Audit events of the interpreter about changes outside the process (Python, "Audit events table")."""
_NAMES: Final = (
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "<job>"),
    (re.compile(r"-\d{8}T[\d.]+Z?-\d+"), "-<chain>"),
    (re.compile(r"\b[0-9a-f]{32,64}\b"), "<digest>"),
    (re.compile(r"\b[a-z2-7]{26}\b"), "<attempt>"),
    (re.compile(r"\bw\d+(/\d+)?\b"), "<worker>"),
    (re.compile(r"\bfiles\.\d+"), "files.<number>"),
)


def plain(name: str) -> str:
    """A key or a path in which ids that differ between runs are replaced by what they are of."""
    for pattern, kind in _NAMES:
        name = pattern.sub(kind, name)
    return name


class Died(BaseException):
    """The end of a process, as by SIGKILL: no handler of ours catches it."""


class Point(NamedTuple):
    """An effect, what it changes, and how many such effects there were, with this one."""

    effect: str
    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.effect} {self.name} #{self.number}"


class _Inside(threading.local):
    """Whether this thread is within an effect that is intercepted."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


_inside: Final = _Inside()
_running: list["Process"] = []
"""The process whose code runs, at the end; none: the code of the test."""
_script_names: dict[bytes, str] = {}


class Process:
    """A process whose effects are noted in ``points``, in order, while the block runs. ``Died`` ends that.

    It dies at the point of number ``at`` (from 0): ``before`` the effect, or ``after`` it, without an answer.
    With ``pause`` it does not die: ``meanwhile`` runs before the effect, as if others had gone on while this
    process stood still. ``twice``: a command is run, and sent again, as redis-py does where the line broke
    before the answer. Syncs of files are noted on ``disk``, and do not reach the kernel.
    """

    def __init__(
        self,
        folder: Path,
        at: int | None = None,
        moment: Moment = "before",
        *,
        meanwhile: Callable[[], object] = lambda: None,
        disk: SyncedDisk | None = None,
    ) -> None:
        """``folder`` is the one that names of files are relative to."""
        self.points: list[Point] = []
        self.missed: list[str] = []
        self.is_dead = False
        self.disk = disk
        self._folder = str(folder.absolute()) + os.sep
        self._at, self._moment, self._meanwhile = at, moment, meanwhile
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._fds: set[int] = set()

    def __enter__(self) -> Self:
        _running.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        _running.remove(self)
        if self.is_dead:  # as the kernel does with what a killed process has open
            for fd in self._fds:
                with suppress(OSError):
                    os.close(fd)
        return isinstance(error, Died)

    def note(self, effect: str, name: str) -> Moment | None:
        """Record the next effect; the moment of the end, if it is this one. Raises Died after the end."""
        with self._lock:
            self.require_alive()
            self._counts[effect, name] += 1
            self.points.append(Point(effect, name, self._counts[effect, name]))
            return self._moment if len(self.points) - 1 == self._at else None

    def require_alive(self) -> None:
        """Raise Died after the end."""
        if self.is_dead:
            raise Died

    def die(self) -> NoReturn:
        self.is_dead = True
        raise Died

    def pause(self) -> None:
        """Let others go on meanwhile."""
        _running.remove(self)
        try:
            self._meanwhile()
        finally:
            _running.append(self)

    def run(self, effect: str, name: str, act: Callable[[], _T]) -> _T:
        """The answer of an effect. Raises Died."""
        moment = self.note(effect, name)
        if moment == "before":
            self.die()
        if moment == "pause":
            self.pause()
        with _inside:
            found = act()
        if moment == "after":
            self.die()
        return found

    def place(self, target: int | str | bytes | os.PathLike[str], dir_fd: int | None) -> str:
        """The name of a file, relative to the folder."""
        if isinstance(target, int):
            path = os.readlink(f"/proc/self/fd/{target}")  # noqa: PTH115 -- may be deleted
        else:
            above = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")  # noqa: PTH109, PTH115 -- as above
            path = os.path.join(above, os.fsdecode(target))  # noqa: PTH118 -- a path
        return plain(path.removeprefix(self._folder))

    def opened(self, fd: int) -> int:
        """Note an open descriptor."""
        self._fds.add(fd)
        return fd

    def closed(self, fd: int) -> None:
        self._fds.discard(fd)


def _current() -> Process | None:
    """The process whose effect this is; None for those of the test, and within another effect."""
    return _running[-1] if _running and not _inside.depth else None


# -- files -------------------------------------------------------------------------------------------------


def _of_file(name: str, real: Callable[..., Any], place: int) -> Callable[..., Any]:
    def effect(*args: Any, **named: Any) -> Any:  # noqa: ANN401 -- as os has it
        process = _current()
        if process is None:
            return real(*args, **named)
        dir_fd = named.get("dst_dir_fd") if place else named.get("dir_fd")
        where, kind = process.place(args[place], dir_fd), name
        if name == "pwrite" and where.endswith(".jsonl"):
            kind, where = "audit", _operations(args[1])
        return process.run(kind, where, lambda: _done(process, name, real, args, named))

    return effect


def _done(
    process: Process, name: str, real: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any]
) -> Any:  # noqa: ANN401 -- as os has it
    disk = process.disk
    if name in _SYNCS:
        return disk.synced(args[0]) if disk else None
    if name in _REMOVALS and disk:
        place = TARGETS[name]
        disk.keep(args[place], named.get("dst_dir_fd") if place else named.get("dir_fd"))
    found = real(*args, **named)
    if name == "mkdir" and disk:
        disk.forget(os.stat(args[0], dir_fd=named.get("dir_fd")).st_ino)
    return found


def _operations(lines: bytes) -> str:
    """The operations and kinds of lines of an audit log."""
    found = [json.loads(line) for line in bytes(lines).splitlines()]
    return " ".join(str(line.get("operation") or line.get("kind")) for line in found)


def _opened(real: Callable[..., int]) -> Callable[..., int]:
    def effect(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:  # noqa: ANN401 -- as os has it
        def act() -> int:
            fd = process.opened(real(path, flags, mode, dir_fd=dir_fd)) if process else -1
            if process and process.disk and flags & os.O_EXCL:
                process.disk.forget(os.fstat(fd).st_ino)
            return fd

        process = _current()
        if process is None:
            return real(path, flags, mode, dir_fd=dir_fd)
        if not flags & _WRITES:
            return process.opened(real(path, flags, mode, dir_fd=dir_fd))
        return process.run("open", process.place(path, dir_fd), act)

    return effect


def _closed(real: Callable[[int], None]) -> Callable[[int], None]:
    def close(fd: int) -> None:
        for process in _running:
            process.closed(fd)
        real(fd)

    return close


# -- Redis -------------------------------------------------------------------------------------------------


def split(packed: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
    """Commands as they are sent (RESP arrays of bulk strings): their bytes and their words."""
    at = 0

    def head() -> int:
        nonlocal at
        begin, end = at, packed.index(b"\r\n", at)
        at = end + 2
        return int(packed[begin + 1 : end])

    while at < len(packed):
        begin, words = at, list[bytes]()
        for _ in range(head()):
            size = head()
            words.append(packed[at : at + size])
            at += size + 2
        yield packed[begin:at], words


def command(words: Sequence[bytes]) -> tuple[str, str]:
    """The name of a command, or of its script, and its first key."""
    if words[0] in {b"EVALSHA", b"EVAL"}:
        key = words[3] if len(words) > 3 and int(words[2]) else b""
        return _script_names.get(words[1], "EVAL"), plain(key.decode(errors="replace"))
    return words[0].decode(), plain(words[1].decode(errors="replace") if len(words) > 1 else "")


def _sent(real: Callable[..., None]) -> Callable[..., None]:
    def send(connection: AbstractConnection, packed: Any, check_health: bool = True) -> None:  # noqa: ANN401 -- as redis-py has it
        process = _current()
        if process is None:
            return real(connection, packed, check_health)
        commands = list(split(b"".join(packed)))
        with _inside:
            if check_health:
                connection.check_health()  # type: ignore[no-untyped-call]  # untyped there
        if commands[0][1][0] in _HANDSHAKE:
            process.require_alive()
            with _inside:
                return real(connection, packed, check_health=False)
        return _send_each(process, connection, commands, partial(real, connection, check_health=False))

    return send


def _send_each(
    process: Process,
    connection: AbstractConnection,
    commands: Sequence[tuple[bytes, list[bytes]]],
    send: Callable[[list[bytes]], None],
) -> None:
    """Send commands that go together. When the process dies, Redis has run those before that."""
    waiting = b""
    for at, (raw, words) in enumerate(commands):
        moment = process.note(*command(words))
        if moment is None:
            waiting += raw
            continue
        sent = waiting + raw * (moment in {"after", "twice"})
        if sent:
            with _inside:
                send([sent])
        if moment == "pause":
            process.pause()
            waiting = raw
            continue
        _await(connection, at + (moment != "before"))
        if moment != "twice":
            process.die()
        waiting = b"".join(each for each, _ in commands[: at + 1])
    if waiting:
        with _inside:
            send([waiting])


def _await(connection: AbstractConnection, answers: int) -> None:
    """Return once Redis has run so many commands."""
    with _inside:
        for _ in range(answers):
            with suppress(ResponseError):
                connection.read_response()


# -- the cross-check ---------------------------------------------------------------------------------------


def _watch(event: str, args: tuple[object, ...]) -> None:
    process = _current()
    if process is None:
        return
    if event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
        process.missed.append(f"{event} {args[:2]}")


def _checked(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def send(line: socket.socket, *args: Any, **named: Any) -> Any:  # noqa: ANN401 -- as in the standard library
        process = _current()
        if process is not None:
            process.require_alive()
            process.missed.append(f"socket.{name}")
        return real(line, *args, **named)

    return send


_hooked: list[bool] = []  # an audit hook can be added, and never removed


@contextmanager
def installed(scripts: Mapping[str, str]) -> Iterator[None]:
    """Intercept the effects of each ``Process``; ``scripts`` are those of Redis, name to text."""
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked.append(True)
    _script_names.update(
        (hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode(), name)
        for name, text in scripts.items()
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, place in TARGETS.items():
            patch.setattr(os, name, _of_file(name, getattr(os, name), place))
        patch.setattr(os, "open", _opened(os.open))
        patch.setattr(os, "close", _closed(os.close))
        patch.setattr(
            AbstractConnection, "send_packed_command", _sent(AbstractConnection.send_packed_command)
        )
        for name in ("send", "sendall", "sendmsg", "sendto"):
            patch.setattr(socket.socket, name, _checked(name, getattr(socket.socket, name)))
        yield
