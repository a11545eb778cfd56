"""What the command shows at a terminal while the service does not answer."""

import io
import os
import socket
from contextlib import redirect_stderr
from threading import Event
from typing import Final

import click
import pytest

from kms_cli import terminal
from kms_cli.connection import connect
from kms_cli.session import AS_JSON, META
from support.scripted_servers import scripted
from support.waiting import WAIT_S

ANSWER: Final = b'{"keys": []}'
HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)


class WatchedTerminal(io.StringIO):
    """A terminal that sets ``waits`` once a wait is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = Event()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, text: str) -> int:
        if "waiting for" in text:
            self.waits.set()
        return super().write(text)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> WatchedTerminal:
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
    monkeypatch.setattr(terminal, "WAIT_SHOWN_AFTER_S", 0.01)
    return WatchedTerminal()


def ask(shown: WatchedTerminal, *, as_json: bool = False, drawn: str = "", waits_s: float = WAIT_S) -> str:
    """What a request draws whose answer comes once a wait is drawn, or after ``waits_s``."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        shown.waits.wait(waits_s)
        connection.sendall(HEAD + ANSWER)

    with redirect_stderr(shown), scripted(answer) as service, click.Context(click.Command("kms")) as ctx:
        ctx.meta.update({f"{META}url": service.url} | ({AS_JSON: True} if as_json else {}))
        line = terminal.Meter()
        if drawn:
            line.show(drawn, 0, None)
        with connect(timeout_s=2 * WAIT_S) as kms:
            kms.keys()
        text = shown.getvalue().replace(service.url, "URL")
        line.erase()
        return text


def test_a_service_that_does_not_answer_is_named_until_it_does(shown: WatchedTerminal) -> None:
    assert ask(shown) == "\r\x1b[Kwaiting for URL\r\x1b[K"


def test_a_wait_replaces_no_progress_line(shown: WatchedTerminal) -> None:
    assert ask(shown, drawn="verifying", waits_s=0.1) == "\r\x1b[Kverifying"


def test_a_wait_is_not_shown_to_programs(shown: WatchedTerminal) -> None:
    assert not ask(shown, as_json=True, waits_s=0.1)
