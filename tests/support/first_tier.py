"""Holds tests of the first tier to what a new machine can run in seconds: a pytest plugin.

While the body of such a test runs, this process connects to nothing but loopback and Unix sockets, asks for
no program that the lock files do not bring, stops no process of an install, and neither sleeps nor measures
seconds: `tests/ruff.toml` bans the functions of ``time``. Fixtures may.
"""

import ipaddress
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest

from support import programs
from support.service import Service, Supervised
from support.tiers import is_second
from support.waiting import RealTime

_HELD: Final = "a test of the first tier {}: see tests/README.md"


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a test. In the first tier its path has a space and a letter beyond ASCII, as homes do."""
    if is_second(request.node.nodeid):
        return tmp_path
    folder = tmp_path / "a é"
    folder.mkdir(mode=0o700)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if is_second(item.nodeid):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "which", lambda name, **_: _refuse(f"needs the program {name}"))
        for place, name in ((Service, "stop"), (Supervised, "kill")):
            patch.setattr(place, name, lambda *_: _refuse("ends a process of an install"))
        for name in ("sleep", "now_s", "processor_s"):
            patch.setattr(RealTime, name, lambda *_: _refuse("goes by seconds"))
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _on_loopback(getattr(socket.socket, name)))
        return (yield)


def _refuse(what: str) -> NoReturn:
    pytest.fail(_HELD.format(what))


def _on_loopback(connect: Callable[..., Any]) -> Callable[..., Any]:
    def connect_to(line: socket.socket, address: Any) -> Any:  # noqa: ANN401 -- as in the standard library
        if line.family in {socket.AF_INET, socket.AF_INET6} and not _is_loopback(address[0]):
            _refuse(f"connects to {address[0]}")
        return connect(line, address)

    return connect_to


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host in {"localhost", ""}
