"""Ports on 127.0.0.1 that no other test process is given, from any run in this network namespace.

A server needs its port before it starts, so each test process holds a block of ports until it ends, and gives
them out one after another. What holds a block is an abstract Unix socket (unix(7)): it belongs to the network
namespace, as ports do, and is gone with its process, however that ends.
"""

import contextlib
import functools
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_SIZE: Final = 400
_STEP: Final = 4  # ports in a row for each call: the API, the worker's metrics, Prometheus
_FIRST: Final = 10_000
_LISTEN: Final = "0A"  # a state of proc_net_tcp(5)
_EPHEMERAL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")  # the kernel's, for outgoing connections
_NAMESPACE: Final = Path("/proc/self/ns/net")


def free_port() -> int:
    """Return a port that is free, as are the next three. Raises AssertionError if there is none."""
    for number in itertools.islice(_numbers(), _SIZE // _STEP):
        if all(_is_free(number + offset) for offset in range(_STEP)):
            return number
    raise AssertionError("no port of this test process is free")


def listens(port: int) -> bool:
    """Whether connections to the port are taken."""
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0


def is_of(port: int, session: int) -> bool:
    """Whether a process of this session listens at the port; one that hides its files may be the one."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listeners = {
        f"socket:[{line[9]}]" for line in lines if line[3] == _LISTEN and line[1][-4:] == f"{port:04X}"
    }
    if not listeners:
        return False
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_theirs = os.getsid(int(process.name)) == session
            if is_theirs and any(open_file in listeners for open_file in _open_files(process)):
                return True
        except PermissionError:
            return True
        except OSError:  # it has ended
            continue
    return False


def _open_files(process: Path) -> Iterator[str]:
    for file in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            yield str(file.readlink())


@functools.cache
def _numbers() -> Iterator[int]:
    first = block()
    return itertools.cycle(range(first, first + _SIZE, _STEP))


@functools.cache
def block() -> int:
    """Return the first port of the block that this process holds. Raises AssertionError if none is left."""
    end = min(32_000, int(_EPHEMERAL.read_text().split()[0]))
    blocks = range(_FIRST, end - _SIZE + 1, _SIZE)
    # SeaweedFS names sockets in /tmp by ports alone: another namespace had better begin elsewhere.
    begin = _NAMESPACE.stat().st_ino * 5 % len(blocks)
    for first in itertools.chain(blocks[begin:], blocks[:begin]):
        holder = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            holder.bind(f"\0kms-test-ports-{first}")
            _held.append(holder)
            return first
        holder.close()
    raise AssertionError("other test processes hold all blocks of ports")


_held: Final[list[socket.socket]] = []


def _is_free(number: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True
