"""The ports: taken once, and clients that come at once are let in together."""

import asyncio
import os
import socket

import pytest
import uvloop

from kms_api.server import process

CLIENTS = 16


class Counting(asyncio.Protocol):
    let_in = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        Counting.let_in += 1
        transport.close()


async def let_in(listeners: list[socket.socket], turns: int) -> int:
    """How many of the clients that wait are let in within so many turns of the loop."""
    Counting.let_in = 0
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Counting, sock=each) for each in listeners]
    for _ in range(turns):
        await asyncio.sleep(0)
    for server in servers:
        server.close()
    return Counting.let_in


@pytest.mark.parametrize("copied", [True, False], ids=["copies", "one socket"])
def test_clients_that_wait_are_let_in_within_a_few_turns(copied: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(CLIENTS)]
        listeners = process.copies_of(listener, 1) if copied else [listener]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(let_in(listeners, 3))
        for each in (*clients, *listeners):
            each.close()

    assert (found == CLIENTS) == copied


def test_copies_make_nobody_wait_who_serves_the_same_socket_already() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        inherited = socket.socket(fileno=os.dup(listener.fileno()))  # as by a process that starts again
        copies = process.copies_of(inherited, 2)
        waits = os.get_blocking(listener.fileno())
        for each in copies:
            each.close()

    assert not waits
