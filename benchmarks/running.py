"""Starts what is measured over HTTP, on free ports of 127.0.0.1: the service, and the plain application."""

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlsplit

from benchmarks.children import KMS, PYTHON, ROOT, environ

_START_S: Final = 60.0
_STOP_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Service:
    """A running install."""

    url: str
    state: Path


def free_port() -> int:
    """A port that is free, and so is the next one, for the worker's metrics."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    """``kms up`` over a state directory below ``folder``, until the block ends."""
    state, port = folder / "state", free_port()
    log = folder / "kms-up.log"
    with log.open("ab") as errors, ready([*KMS, "up", *where(state, port)], errors):
        yield Service(f"http://127.0.0.1:{port}", state)


def where(state: Path, port: int) -> Sequence[str]:
    return ["--state-dir", str(state), "--port", str(port)]


@contextmanager
def ready(argv: Sequence[str], errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A program that has said that it is ready, by its first line of output. Raises RuntimeError."""
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT, env=environ()
    )
    with stopped(process):
        line = process.stdout.readline() if process.stdout else b""
        if not line.startswith(b"kms: ready "):
            raise RuntimeError(f"{' '.join(argv)} did not get ready, see {errors.name}")
        yield process


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop the process when the block ends."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


@contextmanager
def plain_app(folder: Path) -> Iterator[str]:
    """The plain application under uvicorn with the service's own choices; its URL."""
    port = free_port()
    argv = [*PYTHON, "uvicorn", "benchmarks.plain_app:app", "--host", "127.0.0.1", "--port", str(port)]
    choices = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    env = environ(PLAIN_DIR=str(folder))
    process = subprocess.Popen([*argv, *choices], stdin=subprocess.DEVNULL, cwd=ROOT, env=env)
    with stopped(process):
        url = f"http://127.0.0.1:{port}"
        _until_answering(f"{url}/answer/2")
        yield url


@contextmanager
def started(argv: Sequence[str], env: Mapping[str, str], url: str) -> Iterator[int]:
    """A program that answers 200 to a GET of ``url`` before long; its process id. Raises OSError."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, cwd=ROOT, env=env)
    with stopped(process):
        _until_answering(url, None)
        yield process.pid


def _until_answering(url: str, body: str | None = "") -> None:
    ends = time.monotonic() + _START_S
    while True:
        try:
            _got(url, body)
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)
        else:
            return


def connect(url: str) -> http.client.HTTPConnection:
    """A connection that moves bodies in pieces of 1 MiB."""
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120, blocksize=1024 * 1024)


def ask(url: str, body: str | None = None, headers: Mapping[str, str] | None = None) -> Any:  # noqa: ANN401 -- JSON
    """POST a body, or GET; the JSON of the answer. Raises RuntimeError unless it is 200."""
    return json.loads(_got(url, body, headers))


def _got(url: str, body: str | None, headers: Mapping[str, str] | None = None) -> bytes:
    connection = connect(url)
    try:
        sent = {"Content-Type": "application/json", **(headers or {})}
        connection.request("GET" if body is None else "POST", urlsplit(url).path, body, sent)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise RuntimeError(f"{url} answered {answer.status}: {text[:300]!r}")
    return text
