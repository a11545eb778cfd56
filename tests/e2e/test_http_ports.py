"""One HTTP at all ports of an install: the API with the Vault API, and the metrics of the worker."""

import json
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx
import pytest

from kms_api.app import DOCUMENTED, UI, VAULT_ROUTES
from kms_api.routing import ScopedRoute
from support.http_cases import MALFORMED
from support.service import Service, b64
from support.waiting import WAIT_S, until

PORTS: Final = ("api", "vault", "worker")
PATHS: Final = {"api": "/livez", "vault": "/v1/sys/health", "worker": "/livez"}
HALF_OPEN: Final = 1000
UPGRADES: Final = ("h2c", "websocket")


class Install(Service):
    """API and worker. ``vault`` is the port of the API, for paths of the Vault API."""

    def number(self, port: str) -> int:
        return self.port + 1 if port == "worker" else self.port


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Install]:
    with Install(tmp_path_factory.mktemp("ports")) as made:
        made.start()
        yield made


def ask(port: int, *pieces: bytes, source: str = "127.0.0.1") -> bytes:
    """Everything that the server says until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), WAIT_S, (source, 0)) as connection:
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


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_are_refused_at_every_port(install: Install, port: str, case: str) -> None:
    said = ask(install.number(port), MALFORMED[case] + get(PATHS[port], close=False))

    assert statuses(said) == [400]
    assert b"connection: close" in said.lower()
    assert b'"code":"invalid_request"' in said


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("upgrade", UPGRADES)
def test_an_upgrade_is_ignored_and_its_body_is_no_request(install: Install, port: str, upgrade: str) -> None:
    """An answer that leaves a part of the body unread ends the connection."""
    inner = get("/v1/inner")
    head = get(
        PATHS[port],
        "Connection: Upgrade",
        f"Upgrade: {upgrade}",
        f"Content-Length: {len(inner)}",
        method="POST",
        close=False,
    )
    whole = head + inner + get(PATHS[port])
    said = [
        ask(install.number(port), whole[:at], whole[at:]) for at in (len(whole), 10, len(head), len(head) + 9)
    ]

    assert statuses(said[0]) == [405, 200]
    assert all(statuses(each) in ([405, 200], [405]) for each in said)


def test_an_upgrade_keeps_the_body_of_a_call(install: Install) -> None:
    url = f"{install.url}/v1/transit/encrypt/default"
    asked = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    answer = httpx.post(url, headers=asked, content=b'{"plaintext": "aGVsbG8="}', trust_env=False)

    assert answer.status_code == 200
    assert answer.json()["data"]["ciphertext"].startswith("vault:v1:")


def test_the_method_list_is_served(install: Install) -> None:
    last = get("/v1/transit/keys", method="LIST")
    for pieces in ([last], [last[:3], last[3:]]):
        said = ask(install.port, *pieces)

        assert statuses(said) == [200]
        assert said.count(b'"keys":["default"]') == 1


def test_the_worker_lists_nothing(install: Install) -> None:
    said = ask(install.number("worker"), get("/metrics", method="LIST"))

    assert statuses(said) == [405]
    assert b"allow: GET, HEAD" in said


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8082", ""])
def test_the_host_of_somebody_else_is_refused_at_every_port(install: Install, port: str, host: str) -> None:
    number = install.number(port)
    foreign = get(PATHS[port]).replace(b"Host: localhost", f"Host: {host}".encode())
    page = get(PATHS[port], "Origin: http://evil.example")

    assert statuses(ask(number, foreign)) == [403]
    assert statuses(ask(number, page)) == [403]
    assert statuses(ask(number, get(PATHS[port], "Host: localhost"))) == [403]
    assert statuses(ask(number, get(PATHS[port]))) == [200]


def test_foreign_hosts_read_no_metrics_of_the_worker(install: Install) -> None:
    said = ask(install.number("worker"), get("/metrics").replace(b"localhost", b"evil.example"))

    assert statuses(said) == [403]
    assert b"kms_" not in said


# -- HEAD ------------------------------------------------------------------------------------------


def readable() -> Iterator[str]:
    """Every path that GET has."""
    for prefix, routers in {**DOCUMENTED, "": UI}.items():
        for router in routers:
            routes = [route for route in router.routes if isinstance(route, ScopedRoute)]
            yield from (prefix + route.path for route in routes if route.method == "GET")
    yield from ("/livez", "/readyz", "/metrics")
    yield from (path for method, path in VAULT_ROUTES.declared if method == "GET")
    yield from ("/docs", "/openapi.json")


@pytest.fixture(scope="module")
def job_id(install: Install) -> str:
    items = [{"plaintext": b64(b"x")}]
    made = install.http.post("/api/v1/kms/jobs", json={"kind": "encrypt", "items": items}).json()["job_id"]
    until(lambda: install.http.get(f"/api/v1/kms/jobs/{made}").json()["state"] == "succeeded", "its end")
    return str(made)


@pytest.mark.parametrize("path", sorted(set(readable())))
def test_head_is_answered_as_get_without_a_body(install: Install, job_id: str, path: str) -> None:
    names = {
        "job_id": job_id,
        "key_id": "default",
        "name": "default",
        "mount": "transit",
        "audit_id": "0" * 32,
    }
    filled = re.sub(r"\{(\w+)\}", lambda found: names[found[1]], path)
    if "static" in path:
        filled = "/ui/static/page.css"
    with install.http.stream("GET", filled, follow_redirects=False) as of_get:
        if not filled.endswith("jobs/events"):  # a stream that has no end
            of_get.read()
    of_head = install.http.head(filled, follow_redirects=False)
    assert install.http.get("/livez", timeout=20).text == "ok\n", "its connection serves the next request"

    assert (of_head.status_code, of_head.content) == (of_get.status_code, b"")
    same = ("content-type", "etag", "accept-ranges", "cache-control", "location")
    assert {name: of_head.headers.get(name) for name in same} == {
        name: of_get.headers.get(name) for name in same
    }


def test_head_and_get_at_the_worker(install: Install) -> None:
    url = f"http://127.0.0.1:{install.number('worker')}"
    for path in ("/livez", "/metrics"):
        of_head = httpx.head(f"{url}{path}", trust_env=False)

        assert (of_head.status_code, of_head.content) == (200, b"")
        assert int(of_head.headers["content-length"]) > 0


# -- half-open connections -------------------------------------------------------------------------


@pytest.mark.parametrize("port", PORTS)
def test_a_thousand_half_requests_take_no_thread_and_stop_nobody(install: Install, port: str) -> None:
    """The worker's bound is 64: above it the oldest end. Other ports hold them until their time is over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    number, path = install.number(port), PATHS[port]
    process = install.pid("worker" if port == "worker" else "api")
    before = threads(process)
    with ExitStack() as open_:
        for _ in range(HALF_OPEN):
            half = open_.enter_context(socket.create_connection(("127.0.0.1", number), WAIT_S))
            half.sendall(b"GET / HTTP/1.1\r\nHost: local")
        answers = [statuses(ask(number, get(path))) for _ in range(20)]
        during = threads(process)

    assert answers == [[200]] * 20
    assert during <= before + 2


def threads(pid: int) -> int:
    found = re.search(r"^Threads:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def test_scrapes_that_come_at_once_are_all_answered(install: Install) -> None:
    url = f"http://127.0.0.1:{install.number('worker')}/metrics"
    found: list[Any] = []
    asking = [
        threading.Thread(target=lambda: found.append(httpx.get(url, trust_env=False, timeout=WAIT_S)))
        for _ in range(16)
    ]
    for each in asking:
        each.start()
    for each in asking:
        each.join()

    assert [answer.status_code for answer in found] == [200] * 16
    assert all("kms_" in answer.text for answer in found)


def test_refusals_are_problems_at_the_worker(install: Install) -> None:
    url = f"http://127.0.0.1:{install.number('worker')}"
    missing = httpx.get(f"{url}/nothing", trust_env=False)
    posted = httpx.post(f"{url}/metrics", content=b"x" * 100_000, trust_env=False)

    assert (missing.status_code, json.loads(missing.content)["code"]) == (404, "not_found")
    assert (posted.status_code, json.loads(posted.content)["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("port", PORTS)
def test_requests_that_wait_and_are_never_read_leave_room_for_others(install: Install, port: str) -> None:
    """At the worker's port 64 such connections once kept the probe out until they were closed.

    A client at the same address may be refused until the requests that wait were worked on; others may not.
    """
    number, path = install.number(port), PATHS[port]
    wanted = {"api": "/docs", "vault": "/v1/sys/health", "worker": "/metrics"}[port]
    with ExitStack() as open_:
        for _ in range(80):
            unread = open_.enter_context(socket.create_connection(("127.0.0.1", number), WAIT_S))
            with suppress(ConnectionError):
                unread.sendall(get(wanted, close=False) * 400)
        answers = [statuses(ask(number, get(path), source="127.0.0.2")) for _ in range(20)]
        until(lambda: statuses(ask(number, get(path))) == [200], "there is room at the same address")

    assert answers == [[200]] * 20


@pytest.mark.parametrize("port", ["api", "vault"])
def test_a_trailer_is_no_credential_and_ends_no_other_request(install: Install, port: str) -> None:
    """Behind a proxy that keeps connections a swallowed request is another caller's."""
    head = get("/v1/transit/encrypt/default", "Transfer-Encoding: chunked", method="POST", close=False)
    chunked = head + b'19\r\n{"plaintext": "aGVsbG8="}\r\n0\r\n'
    said = ask(install.number(port), chunked + b"Connection: close\r\n\r\n", get("/v1/sys/health"))
    hosts = ask(
        install.number(port), chunked.replace(b"Host: localhost\r\n", b"") + b"Host: localhost\r\n\r\n"
    )

    assert statuses(said) == [200]
    assert b"connection: close" in said
    assert statuses(hosts)[0] == 403
