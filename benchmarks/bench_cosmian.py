"""How many file keys a second a Cosmian KMS server wraps for us, and what we add to the server's own time.

``--server`` is the program (``cosmian_kms``), which is then started here with an empty database, or the URL
of one that runs already, whose load counts as foreign. Without it a double in Python answers: its figures
say nothing of the real one. The server's own time is that of our very request, one wrap in one message,
sent by wrk over as many connections as there are callers.
"""

import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.request import urlopen
from uuid import uuid4

from benchmarks import http_load, report
from benchmarks.children import PYTHON, ROOT, environ
from benchmarks.http_load import Shot
from benchmarks.measure import Contender, Reading, in_turn
from benchmarks.running import free_port, stopped
from benchmarks.wrapping import AAD, COLUMNS, SECRET, TITLE, cells, wraps

from kms_core.backends.batching import BATCHES, Batcher
from kms_core.backends.cosmian.backend import CosmianCipher, CosmianKey
from kms_core.backends.cosmian.server import CosmianServer, Protocol
from kms_core.http_client import PeerAnswer, PeerServer

CALLERS: Final = (1, 16, 64)
ALONE: Final = 1_000
"""Lanes of a server whose calls never have to wait for company: a message for each."""

_START_S: Final = 30.0
_TIMEOUT_S: Final = 30.0


class Listening(CosmianServer):
    """Remembers the last request."""

    last = Shot("", "")

    def post(self, path: str, body: bytes, judged: Sequence[int]) -> PeerAnswer:
        self.last = Shot(path, body.decode())
        return super().post(path, body, judged)


def main() -> None:
    options = report.options(
        "cosmian", "Wraps by a Cosmian KMS server.", runs=5, budget_s=120.0, seconds=1.0, server=""
    )
    http_load.warn_without_wrk()
    with (
        tempfile.TemporaryDirectory(prefix="kms-bench-") as folder,
        _server(options.given.server, Path(folder)) as url,
    ):
        parts = [_what(options.given.server, url), _table(url, options)]
    options.write(parts)


def _what(given: str, url: str) -> str:
    with urlopen(f"{url}/version") as answer:  # noqa: S310 -- our own server, or the one that was named
        version = json.loads(answer.read())
    kind = "Cosmian KMS" if given else "A DOUBLE in Python, no real server, of Cosmian KMS"
    return (
        f"{kind} {version}, over loopback, on the same processors as the callers, which are threads of one "
        f"process. Together: calls that wait go in one message, {BATCHES} of which may be under way."
    )


def _table(url: str, options: report.Options) -> str:
    name = f"bench-{uuid4().hex}"
    budget = options.budget(len(CALLERS))
    rows = []
    for callers in CALLERS:
        work = Work(url, name, callers, options.given.seconds)
        own = Contender("server alone", functools.partial(http_load.load, work.shot(), callers, work.seconds))
        contenders = [
            Contender("together", work.by(work.server("kmip", BATCHES))),
            Contender("a message each", work.by(work.server("kmip", ALONE))),
            Contender("JOSE", work.by(work.server("jose", BATCHES))),
            own,
        ]
        found = options.keep(f"{callers} callers", in_turn(contenders, options.plan, budget.share()))
        rows += [[str(callers), *cells(series, found[-1])] for series in found]
    return report.grid(TITLE, COLUMNS, rows)


@dataclass(frozen=True, slots=True)
class Work:
    """Callers who wrap again and again under one key, for some seconds."""

    url: str
    name: str
    callers: int
    seconds: float

    def server(self, protocol: Protocol, batches: int) -> Listening:
        server = PeerServer(self.url, "Cosmian KMS", "kms.cosmian.server_url", _TIMEOUT_S)
        found = Listening(server, None, protocol)
        send = found.messages._send  # noqa: SLF001 -- its messages, with another number in flight
        found.messages.batcher = Batcher(send, batches=batches)
        return found

    def by(self, server: CosmianServer) -> Callable[[], Reading]:
        return wraps(CosmianCipher(_made(CosmianKey(server, self.name))), "1", self.callers, self.seconds)

    def shot(self) -> Shot:
        """The request of one wrap."""
        server = self.server("kmip", BATCHES)
        CosmianCipher(_made(CosmianKey(server, self.name))).encrypt(SECRET, "1", AAD)
        return Shot(self.url + server.last.url, server.last.body)


def _made(key: CosmianKey) -> CosmianKey:
    with key.call():
        key.init()
    return key


# -- servers -------------------------------------------------------------------------------------------


@contextmanager
def _server(given: str, folder: Path) -> Iterator[str]:
    """The address of what was asked for."""
    if given.startswith("http"):
        yield given.rstrip("/")
    elif given:
        url = f"http://127.0.0.1:{(port := free_port())}"
        argv = [given, "--database-type", "sqlite", "--sqlite-path", str(folder / "db")]
        argv += ["--hostname", "127.0.0.1", "--port", str(port)]
        with _started(argv, RUST_LOG="error", KMS_UI_ENABLE="false"):
            _until_answering(url)
            yield url
    else:
        with _started([*PYTHON, "support.contract.cosmian_double"], PYTHONPATH=str(ROOT / "tests")) as double:
            yield double.stdout.readline().decode().strip() if double.stdout else ""


@contextmanager
def _started(argv: Sequence[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    env = environ(**variables)
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
    with stopped(process):
        yield process


def _until_answering(url: str) -> None:
    ends = time.monotonic() + _START_S
    while True:
        try:
            urlopen(f"{url}/version").close()  # noqa: S310 -- as above
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)
        else:
            return


if __name__ == "__main__":
    main()
