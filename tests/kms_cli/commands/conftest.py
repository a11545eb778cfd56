"""A folder with a key for commands that need no service, and a service that answers as a test says."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.cli.offline import Workspace, workspace
from support.http_servers import QuietHandler, served

Json = dict[str, Any]
Answers = Callable[[Callable[[str, Json], Json]], str]


@pytest.fixture(name="workspace")
def _workspace(tmp_path: Path) -> Workspace:
    return workspace(tmp_path)


@pytest.fixture
def stub_service() -> Iterator[Answers]:
    """Start a service that answers every POST by a function of its path and body; returns its URL."""
    with ExitStack() as stack:

        def started(answer: Callable[[str, Json], Json]) -> str:
            class Handler(QuietHandler):
                wbufsize = 65536  # head and body in one segment

                def do_POST(self) -> None:  # noqa: N802 -- the library's name
                    given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    self.reply(200, json.dumps(answer(self.path, given)).encode(), "application/json")

            return f"http://127.0.0.1:{stack.enter_context(served(Handler))}"

        yield started
