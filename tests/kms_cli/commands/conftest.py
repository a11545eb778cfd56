"""A folder with a key for commands that need no service, and a service that answers as a test says."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from support.cli.offline import Workspace, workspace

Json = dict[str, Any]
Answers = Callable[[Callable[[str, Json], Json]], str]


@pytest.fixture(name="workspace")
def _workspace(tmp_path: Path) -> Workspace:
    return workspace(tmp_path)


@pytest.fixture
def answers() -> Iterator[Answers]:
    """Start a service that answers every POST by a function of its path and body; returns its URL."""
    with ExitStack() as stack:

        def started(answer: Callable[[str, Json], Json]) -> str:
            class Handler(BaseHTTPRequestHandler):
                wbufsize = 65536  # head and body in one segment

                def do_POST(self) -> None:
                    given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    body = json.dumps(answer(self.path, given)).encode()
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

                def log_message(self, *_: object) -> None:
                    """Say nothing."""

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            thread = Thread(target=server.serve_forever, args=(0.02,))
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            thread.start()
            return f"http://127.0.0.1:{server.server_port}"

        yield started
