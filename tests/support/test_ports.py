"""Ports of tests: processes side by side are never given the same."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from support import ports

TESTS = Path(__file__).parents[1]
CODE = """
import sys
from support import ports
print(ports.block(), *(ports.free_port() for _ in range(90)), flush=True)
sys.stdin.read()
"""


def test_processes_side_by_side_get_ports_of_their_own() -> None:
    own = ports.block()  # before the children: theirs are free again when they end
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE], cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    given = [[int(word) for word in each.stdout.readline().split()] for each in started if each.stdout]
    for each in started:
        each.communicate()

    numbers = [number + offset for block in given for number in set(block[1:]) for offset in range(4)]
    assert len(numbers) == len(set(numbers)) >= 8 * 4 * 50
    assert own not in {block[0] for block in given}
    assert min(numbers) >= 10_000
    assert max(numbers) < 32_000


def test_a_port_belongs_to_the_session_that_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        assert ports.is_of(port, os.getsid(0))
        assert not ports.is_of(port, 1)
    assert not ports.is_of(port, os.getsid(0))
