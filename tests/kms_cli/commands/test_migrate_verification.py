"""``kms migrate`` against a service that lies or gives up in the middle: what is not proven is not kept."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kms_protocol.wire import PREFIX
from support.cli.fixtures import Place
from support.cli.migrate import Json, Ran, Workspace, b64, report
from support.openbao import ROOT_TOKEN, bao

Answer = Callable[[str, bytes], Json]
"""What comes of an operation on one plaintext."""


def honest(operation: str, plaintext: bytes) -> Json:
    if operation == "encrypt":
        return {
            "ciphertext": b64(plaintext[::-1] + b"!"),
            "key_id": "k",
            "key_version": "1",
            "backend": "age",
        }
    return {"plaintext": b64(plaintext)}


@contextmanager
def batches(answer: Answer) -> Iterator[str]:
    """A service that knows batches alone, and seals by writing backwards; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65536  # head and body in one segment

        def do_POST(self) -> None:
            assert self.path == f"{PREFIX}/batch"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            results = []
            for index, item in enumerate(body["items"]):
                given = base64.b64decode(item.get("plaintext") or item["ciphertext"])
                plaintext = given if item.get("plaintext") else given[:-1][::-1]
                results.append({"index": index, **answer(body["operation"], plaintext)})
            out = json.dumps(
                {"results": results, "failed": sum("error" in each for each in results)}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vault-token").write_text(ROOT_TOKEN)
    (tmp_path / "vault-token").chmod(0o600)
    return tmp_path


def migrated(folder: Path, answer: Answer) -> tuple[Workspace, Ran]:
    """Three secrets, moved to a service that answers so."""
    key = bao().new_key()
    lines = [
        bao().admin("POST", f"transit/encrypt/{key}", {"plaintext": b64(secret)})["data"]["ciphertext"]
        for secret in (b"first", b"second", b"third")
    ]
    with batches(answer) as url:
        workspace = Workspace(folder, Place(url, folder))
        access = ["--vault-address", bao().url, "--vault-token-file", "vault-token", "--key", key]
        done = workspace.kms(
            "migrate", "transit", "--json", *access, "-o", "out", workspace.write("in", lines)
        )
    return workspace, done


def kept(workspace: Workspace) -> list[bytes]:
    return [base64.b64decode(record["ciphertext"])[:-1][::-1] for record in workspace.records("out")]


def test_an_honest_service_keeps_all(folder: Path) -> None:
    workspace, done = migrated(folder, honest)

    assert (done.returncode, done.stderr) == (0, b"")
    assert kept(workspace) == [b"first", b"second", b"third"]


def test_what_does_not_open_to_the_same_is_not_kept(folder: Path) -> None:
    def lying(operation: str, plaintext: bytes) -> Json:
        return honest(
            operation, b"sth else" if (operation, plaintext) == ("decrypt", b"second") else plaintext
        )

    workspace, done = migrated(folder, lying)

    assert done.returncode == 65
    assert b"line 2: not_verified" in done.stderr
    assert kept(workspace) == [b"first", b"third"]


@pytest.mark.parametrize("operation", ["encrypt", "decrypt"])
def test_what_the_service_refuses_is_told_and_not_kept(folder: Path, operation: str) -> None:
    def refusing(asked: str, plaintext: bytes) -> Json:
        refused = (asked, plaintext) == (operation, b"second")
        return {"error": {"code": "forbidden"}} if refused else honest(asked, plaintext)

    workspace, done = migrated(folder, refusing)

    assert done.returncode == 65
    assert b"line 2: forbidden" in done.stderr
    assert kept(workspace) == [b"first", b"third"]


@pytest.mark.parametrize("operation", ["encrypt", "decrypt"])
def test_a_backend_that_goes_away_is_no_fault_of_the_line(folder: Path, operation: str) -> None:
    def leaving(asked: str, plaintext: bytes) -> Json:
        gone = asked == operation and plaintext != b"first"
        return {"error": {"code": "backend_unavailable"}} if gone else honest(asked, plaintext)

    workspace, done = migrated(folder, leaving)

    assert done.returncode == 69
    assert report(done) == {"lines": 3, "moved": 1, "already_there": 0, "failed": 0}
    assert kept(workspace) == [b"first"]
