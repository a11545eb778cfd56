"""Hosts of a network on one machine: namespaces with a host name, ports and addresses of their own each.

They share the file system, so a Unix socket reaches a server of another host. Where the kernel allows this
user no namespaces, each host of ``hosts_or_local`` is this one, and only the processes differ.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from kms_core.programs import tether
from support.waiting import until

_NEW_NETWORK: Final = 0x4000_0000  # CLONE_NEWNET; ``os.unshare`` is of Python 3.12
ETH0: Final = "eth0"
NO_NAMESPACES: Final = "no network namespaces can be made here: they need root, unshare, nsenter and ip"


@dataclass(frozen=True, slots=True)
class NetworkLink:
    """A link between a host and the test: the test's device and address, and the host's address."""

    device: str
    test_address: str
    address: str

    def cut(self) -> None:
        """Pull the plug at our end: packets of both directions are lost, and nothing answers."""
        _ip("link", "set", self.device, "down")

    def mend(self) -> None:
        _ip("link", "set", self.device, "up")


@dataclass(frozen=True, slots=True)
class Host:
    """``enter`` is the command that runs another one on this host."""

    enter: Sequence[str]
    lines: Mapping[str, NetworkLink] = field(default_factory=dict)

    @property
    def is_separate(self) -> bool:
        return bool(self.enter)

    @property
    def test_address(self) -> str:
        """Our address as seen from it, over its first line."""
        return next((line.test_address for line in self.lines.values()), "127.0.0.1")


HERE = Host(())


@contextmanager
def hosts_or_local(count: int) -> Iterator[Sequence[Host]]:
    """So many hosts, each with a line to this one. Started from a thread that lives as long as they do."""
    with ExitStack() as stack:
        yield _hosts(stack, count, [ETH0]) if _is_allowed() else [HERE] * count


@contextmanager
def isolated_network(count: int, lines: Sequence[str]) -> Iterator[Sequence[Host]]:
    """So many hosts with such lines each to this thread, which is a host of its own for so long.

    Threads and programs that it starts are on that host too, and none of it outlives them. Skips where there
    are no namespaces.
    """
    require()
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "unshare")
        try:
            _ip("link", "set", "lo", "up")
            with ExitStack() as stack:
                yield _hosts(stack, count, lines)
        finally:
            if libc.setns(before, _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(before)


def require() -> None:
    """Skip a test that needs namespaces where there are none."""
    if not _is_allowed():
        pytest.skip(NO_NAMESPACES)


def _is_allowed() -> bool:
    if os.geteuid() or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    return (
        subprocess.run(["unshare", "--net", "--uts", "true"], check=False, capture_output=True).returncode
        == 0
    )


def _hosts(stack: ExitStack, count: int, lines: Sequence[str]) -> list[Host]:
    return [_host(stack, number, lines) for number in range(1, count + 1)]


def _host(stack: ExitStack, number: int, lines: Sequence[str]) -> Host:
    argv = ["unshare", "--net", "--uts", "sh", "-c", f"hostname host{number} && exec sleep infinity"]
    process = tether.spawn([shutil.which(argv[0]) or argv[0], *argv[1:]], env=dict(os.environ))
    stack.callback(process.wait)
    stack.callback(process.kill)  # and the last process that ends takes the namespace and its lines along
    until(lambda: _namespace(process.pid) != _namespace(os.getpid()), f"the namespace of host {number}")
    enter = (shutil.which("nsenter") or "nsenter", f"--target={process.pid}", "--net", "--uts", "--")
    subprocess.run([*enter, "ip", "link", "set", "lo", "up"], check=True)
    first = number * len(lines)
    nets = [f"10.{process.pid % 250}.{each}" for each in range(first, first + len(lines))]
    made = [_line(process.pid, enter, name, net) for name, net in zip(lines, nets, strict=True)]
    return Host(enter, dict(zip(lines, made, strict=True)))


def _line(pid: int, enter: Sequence[str], name: str, net: str) -> NetworkLink:
    line = NetworkLink(f"{name}-{pid}", f"{net}.1", f"{net}.2")
    _ip("link", "add", line.device, "type", "veth", "peer", "name", name, "netns", str(pid))
    _ip("address", "add", f"{line.test_address}/24", "dev", line.device)
    line.mend()
    for words in (("address", "add", f"{line.address}/24", "dev", name), ("link", "set", name, "up")):
        subprocess.run([*enter, "ip", *words], check=True)
    return line


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _namespace(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/uts").readlink())
