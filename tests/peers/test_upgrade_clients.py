"""Clients that offer an upgrade to HTTP/2 by default: their requests are answered as if they had not.

``java.net.http.HttpClient`` sends ``Upgrade: h2c`` over http unless told otherwise; so do Spring's RestClient
on it and ``curl --http2``. A server ignores an upgrade that it does not take (RFC 9110 §7.8), body intact.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from kms_protocol.wire import PREFIX
from support.programs import locked_cache, program
from support.service import CONTEXT, Service, b64, unb64

PEERS: Final = Path(__file__).parent
LIMIT_S: Final = 180
PLAINTEXT: Final = b"offered to be upgraded"
UPLOAD: Final = bytes(range(256)) * 4096  # 1 MiB: many segments


def spring_libraries() -> Path:
    """The folder with spring-web and what it needs, as the pom names them; fetched once."""
    mvn, pom = program("mvn"), PEERS / "spring" / "pom.xml"
    with locked_cache("spring-web") as folder:
        libraries = folder / "lib"
        fetched_for = libraries / "pom.xml"
        if not fetched_for.exists() or fetched_for.read_bytes() != pom.read_bytes():
            shutil.rmtree(libraries, ignore_errors=True)
            fetch = [
                *(mvn, "--quiet", "--batch-mode", "--file", str(pom)),
                *("dependency:copy-dependencies", "-DincludeScope=runtime"),
                *(f"-DoutputDirectory={libraries}", f"-Dmaven.repo.local={folder / 'repository'}"),
            ]
            subprocess.run(fetch, check=False, capture_output=True, timeout=LIMIT_S)
            if list(libraries.glob("spring-web-*.jar")):
                shutil.copy(pom, fetched_for)
    if fetched_for.exists():
        return libraries
    pytest.skip("mvn could not fetch spring-web")


def prepared(folder: Path) -> Path:
    """A folder with what a peer sends."""
    folder.joinpath("encrypt.json").write_text(json.dumps({"plaintext": b64(PLAINTEXT), "context": CONTEXT}))
    folder.joinpath("upload").write_bytes(UPLOAD)
    return folder


def run(argv: Sequence[str | Path], service: Service, folder: Path) -> None:
    """Run a peer, which must end well."""
    ran = subprocess.run(
        [*argv, f"{service.url}{PREFIX}", folder],
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def check(service: Service, folder: Path) -> None:
    """What the peer was answered is right."""
    sealed = unb64(json.loads(folder.joinpath("encrypt.answer").read_bytes())["ciphertext"])
    assert service.decrypt(sealed) == PLAINTEXT
    result = folder.joinpath("result").read_bytes()
    job_id = service.upload("decrypt", result)
    service.wait(job_id, "succeeded")
    assert service.result(job_id) == UPLOAD


def test_the_http_client_of_the_jdk(service: Service, tmp_path: Path) -> None:
    source = PEERS / "java" / "HttpClientCalls.java"

    run([program("java"), source], service, prepared(tmp_path))

    check(service, tmp_path)


def test_the_rest_client_of_spring(service: Service, tmp_path: Path) -> None:
    java, libraries = program("java"), spring_libraries()
    source = PEERS / "spring" / "RestClientCalls.java"

    run([java, "--class-path", f"{libraries}/*", source], service, prepared(tmp_path))

    check(service, tmp_path)


def test_curl_with_http2(service: Service, tmp_path: Path) -> None:
    curl, folder = program("curl"), prepared(tmp_path)

    def call(path: str, *more: str | Path) -> bytes:
        """The body of an answer that is not an error; curl offers the upgrade with each first request."""
        argv = [curl, "--silent", "--show-error", "--fail-with-body", "--http2", "--noproxy", "*"]
        done = subprocess.run(
            [*argv, *more, f"{service.url}{PREFIX}{path}"], check=False, capture_output=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, (done.stdout[-1000:], done.stderr[-1000:])
        return done.stdout

    as_json = ("--header", "Content-Type: application/json")
    sealed = call("/encrypt", *as_json, "--data-binary", f"@{folder / 'encrypt.json'}")
    folder.joinpath("encrypt.answer").write_bytes(sealed)
    accepted = json.loads(call("/files/encrypt", "--data-binary", f"@{folder / 'upload'}"))
    service.wait(accepted["job_id"], "succeeded")
    folder.joinpath("result").write_bytes(call(f"/jobs/{accepted['job_id']}/result"))

    check(service, folder)
