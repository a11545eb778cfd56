"""What holds the first tier, of which these tests are."""

import socket

import pytest

from support.programs import program
from support.service import Service
from support.waiting import RealTime


@pytest.mark.parametrize("name", ["connect", "connect_ex"])
def test_no_other_host_is_asked(name: str) -> None:
    with socket.socket() as line, pytest.raises(pytest.fail.Exception, match=r"connects to 192\.0\.2\.1"):
        getattr(line, name)(("192.0.2.1", 80))


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_no_program_is_asked_for() -> None:
    with pytest.raises(pytest.fail.Exception, match="needs the program age"):
        program("age")


@pytest.mark.parametrize("name", ["sleep", "now_s", "processor_s"])
def test_no_seconds_are_waited_for_or_measured(name: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="goes by seconds"):
        getattr(RealTime, name)(*[0.0] * (name == "sleep"))


def test_no_process_of_an_install_is_stopped() -> None:
    with pytest.raises(pytest.fail.Exception, match="ends a process"):
        Service.stop(None, "api")  # type: ignore[arg-type]  # it does not get so far
