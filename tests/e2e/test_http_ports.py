"""One HTTP at both ports of an install: the API, and the metrics of the worker."""

import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest

from support.http_cases import MALFORMED
from support.service import Service, b64
from support.waiting import WAIT_S, until

HALF_OPEN: Final = 1000
UPGRADES: Final = ("h2c", "websocket")


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("ports")) as made:
        yield made.start()


@pytest.fixture(params=[0, 1], ids=["api", "worker"])
def port(request: pytest.FixtureRequest, install: Service) -> int:
    """That of the API, and of the metrics of the worker."""
    offset: int = request.param
    return install.port + offset


def ask(port: int, *pieces: bytes) -> bytes:
    """Everything that the server says until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as connection:
        connection.settimeout(WAIT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(ConnectionError):  # it may refuse before everything was sent
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.01)
        found = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                found += piece
        return found


def statuses(said: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


def get(path: str, *headers: str, method: str = "GET", close: bool = True) -> bytes:
    last = ["Connection: close"] if close else []
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, *last]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_are_refused_at_every_port(port: int, case: str) -> None:
    said = ask(port, MALFORMED[case] + get("/livez", close=False))

    assert statuses(said) == [400]
    assert b"connection: close" in said.lower()
    assert b'"code":"invalid_request"' in said


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_an_upgrade_is_ignored_and_its_body_is_no_request(port: int, upgrade: str) -> None:
    """An answer that leaves a part of the body unread ends the connection."""
    inner = get("/v1/inner")
    headers = ("Connection: Upgrade", f"Upgrade: {upgrade}", f"Content-Length: {len(inner)}")
    head = get("/livez", *headers, method="POST", close=False)
    whole = head + inner + get("/livez")
    said = [ask(port, whole[:at], whole[at:]) for at in (len(whole), 10, len(head), len(head) + 9)]

    assert statuses(said[0]) == [405, 200]
    assert all(statuses(each) in ([405, 200], [405]) for each in said)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8082", ""])
def test_the_host_of_somebody_else_is_refused_at_every_port(port: int, host: str) -> None:
    foreign = get("/livez").replace(b"Host: localhost", f"Host: {host}".encode())
    page = get("/livez", "Origin: http://evil.example")

    assert statuses(ask(port, foreign)) == [403]
    assert statuses(ask(port, page)) == [403]
    assert statuses(ask(port, get("/livez", "Host: localhost"))) == [403]
    assert statuses(ask(port, get("/livez"))) == [200]


# -- HEAD ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job_id(install: Service) -> str:
    items = [{"plaintext": b64(b"x")}]
    made = install.http.post("/api/v1/kms/jobs", json={"kind": "encrypt", "items": items}).json()["job_id"]
    until(lambda: install.http.get(f"/api/v1/kms/jobs/{made}").json()["state"] == "succeeded", "its end")
    return str(made)


READABLE: Final = (
    *("/api/v1/kms/keys", "/api/v1/kms/jobs/{job_id}/result", "/api/v1/kms/jobs/events"),
    *("/v1/sys/health", "/ui", "/ui/static/page.css", "/docs", "/openapi.json", "/metrics"),
)


@pytest.mark.parametrize("path", READABLE)
def test_head_has_the_headers_of_get_and_no_body(install: Service, job_id: str, path: str) -> None:
    """Of every path: tests/kms_api/test_permissions.py."""
    filled = path.format(job_id=job_id)
    with install.http.stream("GET", filled, follow_redirects=False) as of_get:
        if not filled.endswith("jobs/events"):  # a stream that has no end
            of_get.read()
    of_head = install.http.head(filled, follow_redirects=False)
    assert install.http.get("/livez", timeout=20).text == "ok\n", "its connection serves the next request"

    assert (of_head.status_code, of_head.content) == (of_get.status_code, b"")
    for name in ("content-type", "etag", "accept-ranges", "cache-control", "location"):
        assert of_head.headers.get(name) == of_get.headers.get(name), name


def test_the_worker_answers_reads_of_its_own_and_refuses_the_rest(install: Service) -> None:
    url = f"http://127.0.0.1:{install.port + 1}"
    for path in ("/livez", "/metrics"):
        of_head = httpx.head(f"{url}{path}", trust_env=False)
        assert (of_head.status_code, of_head.content) == (200, b"")
        assert int(of_head.headers["content-length"]) > 0

    for method, path, status, code in (
        ("LIST", "/metrics", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("GET", "/nothing", 404, "not_found"),
    ):
        answer = httpx.request(method, f"{url}{path}", content=b"x" * 100_000, trust_env=False)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert status == 404 or answer.headers["allow"] == "GET, HEAD"
    foreign = httpx.get(f"{url}/metrics", headers={"Host": "evil.example"}, trust_env=False)
    assert foreign.status_code == 403
    assert "kms_" not in foreign.text


# -- half-open connections -------------------------------------------------------------------------


def test_a_thousand_half_requests_take_no_thread_and_stop_nobody(install: Service, port: int) -> None:
    """The worker's bound is 64: above it the oldest end. Other ports hold them until their time is over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    process = install.pid("api" if port == install.port else "worker")
    before = threads(process)
    with ExitStack() as open_:
        for _ in range(HALF_OPEN):
            half = open_.enter_context(socket.create_connection(("127.0.0.1", port), WAIT_S))
            half.sendall(b"GET / HTTP/1.1\r\nHost: local")
        answers = [statuses(ask(port, get("/livez"))) for _ in range(20)]
        during = threads(process)

    assert answers == [[200]] * 20
    assert during <= before + 2


def threads(pid: int) -> int:
    found = re.search(r"^Threads:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])
