"""One narrow token that misbehaves holds its bound and no more, is given up in time, and stops nobody else.

Over real connections to a running service of two tenants, whose time limits are seconds here.
"""

import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Final
from urllib.parse import urlencode

import httpx2 as httpx
import pytest

from kms_protocol.wire import PREFIX
from support.credentials import REQUIRED, SecuredService
from support.service import b64, check_problem
from support.waiting import WAIT_S, until

MIB: Final = 1024 * 1024
WRITE: Final = "encrypt,decrypt,jobs:read,jobs:write"
BODY_S: Final = 3.0
STALL_S: Final = 3.0
GRACE_S: Final = 2.0
BOUNDS: Final = {"json": 64 * MIB, "uploads": 16, "downloads": 16, "streams": 64, "logins": 8}
"""The defaults for one credential, or one address."""
CONSTANTS: Final = {
    "kms_api.json_body.BODY_S": BODY_S,
    "kms_api.transport.pace.STALL_S": STALL_S,
    "kms_api.transport.pace.GRACE_S": GRACE_S,
}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[SecuredService]:
    with SecuredService(tmp_path_factory.mktemp("crowded"), REQUIRED, module_redis) as running:
        running.constants, running.has_test_metrics = CONSTANTS, True
        yield running.start()


@pytest.fixture(scope="module")
def bad(crowded: SecuredService) -> dict[str, str]:
    """The credential that misbehaves."""
    return crowded.token_header("jobs:read,jobs:write,encrypt,decrypt context=only=this", tenant="bad")


@pytest.fixture(scope="module")
def good(crowded: SecuredService) -> dict[str, str]:
    """Another tenant's, whose every call is to be answered."""
    return crowded.token_header(WRITE, tenant="good")


class Peer:
    """A connection that has sent a head and a part of its body, and may send more."""

    def __init__(
        self, service: SecuredService, path: str, headers: dict[str, str], body: bytes = b""
    ) -> None:
        self._socket = socket.create_connection(("127.0.0.1", service.port), timeout=WAIT_S)
        self.is_open = True
        self.ask(path, headers, body)

    def ask(self, path: str, headers: dict[str, str], body: bytes) -> None:
        method = "GET" if "Content-Length" not in headers and "Transfer-Encoding" not in headers else "POST"
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:
            self.is_open = False

    def status(self) -> int:
        """Of the answer, once the service has ended the connection; 0 if it ended without an answer."""
        said = b""
        try:
            while piece := self._socket.recv(65536):
                said += piece
        except ConnectionError:
            pass
        return int(said.split(b" ", 2)[1]) if said.startswith(b"HTTP/1.1 ") else 0

    def begun(self) -> int:
        """The status of an answer that goes on; what follows is not read."""
        return int(self._socket.recv(64).split(b" ", 2)[1])

    def has_ended(self) -> bool:
        """Whether the service has ended the connection. Reads nothing: an answer that is read goes on."""
        try:
            self._socket.sendall(b"\r\n")
        except ConnectionError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@contextmanager
def peers(
    service: SecuredService, count: int, path: str, headers: dict[str, str], body: bytes = b""
) -> Iterator[list[Peer]]:
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(Peer(service, path, headers, body))
            stack.callback(made[-1].close)
        yield made


def calls_of_the_other(service: SecuredService, who: dict[str, str]) -> None:
    """Single calls, a job and an upload of a well-behaved tenant: each is answered."""
    plaintext = os.urandom(1000)
    for _ in range(20):
        sealed = service.post("/encrypt", {"plaintext": b64(plaintext)}, headers=who)
        assert sealed.status_code == 200, sealed.text
    large = service.post("/encrypt", {"plaintext": b64(bytes(MIB))}, headers=who)
    assert large.status_code == 200, large.text
    job = service.post("/jobs", {"kind": "encrypt", "items": [{"plaintext": ""}] * 1000}, headers=who)
    assert job.status_code == 202, job.text
    for _ in range(4):
        upload = service.post("/files/encrypt", content=bytes(3 * MIB), headers=who)
        assert upload.status_code == 202, upload.text
    lines = b'{"plaintext":""}\n' * 100
    kind = {"Content-Type": "application/x-ndjson"}
    stream = service.post("/jobs?kind=encrypt", content=lines, headers=who | kind)
    assert stream.status_code == 202, stream.text


# -- uploads and streams of items ------------------------------------------------------------------------

CONTEXT: Final = {"X-KMS-Context": "only=this"}
UPLOADS: Final = {
    "upload": (f"{PREFIX}/files/encrypt", CONTEXT),
    "items": (f"{PREFIX}/jobs?kind=encrypt", CONTEXT | {"Content-Type": "application/x-ndjson"}),
}


PIECE: Final = json.dumps({"plaintext": b64(bytes(12_000))}).encode() + b"\n"


@contextmanager
def sending(uploads: Sequence[Peer]) -> Iterator[None]:
    """Uploads that go on, far above the least rate."""
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(0.2):
            for upload in uploads:
                upload.send(PIECE)

    with ThreadPoolExecutor(1) as threads:
        sent = threads.submit(send)
        try:
            yield
        finally:
            ended.set()
        sent.result()


@pytest.mark.parametrize("how", UPLOADS)
def test_idle_uploads_of_one_token(
    crowded: SecuredService, bad: dict[str, str], good: dict[str, str], how: str
) -> None:
    path, headers = UPLOADS[how]
    head, slots = bad | headers | {"Content-Length": str(8 * MIB)}, BOUNDS["uploads"]
    with peers(crowded, slots, path, head, PIECE) as idle:
        with sending(idle):  # until all others have come, however long that takes
            until(lambda: crowded.held("uploads") == slots, "its slots are taken")
            with peers(crowded, 300 - slots, path, head, PIECE) as late:
                assert Counter(peer.status() for peer in late) == {429: 300 - slots}
            calls_of_the_other(crowded, good)
        assert Counter(peer.status() for peer in idle) == {408: slots}

    until(lambda: crowded.held("uploads") == 0, "nothing is held")


# -- JSON ------------------------------------------------------------------------------------------------

SIZE: Final = 31 * MIB


def test_large_json_bodies_that_drip(
    crowded: SecuredService, bad: dict[str, str], good: dict[str, str]
) -> None:
    head = bad | {"Content-Length": str(SIZE)}
    with peers(crowded, 32, f"{PREFIX}/jobs", head, b" " * 60_000) as senders:
        until(lambda: crowded.held("json") == 2 * SIZE, "two bodies have their room")
        calls_of_the_other(crowded, good)
        assert crowded.held("json") <= BOUNDS["json"]
        statuses = Counter(peer.status() for peer in senders)

    assert statuses == {408: 2, 429: 30}
    until(lambda: crowded.held("json") == 0, "nothing is held")


@pytest.mark.parametrize("path", ["/encrypt", "/batch", "/jobs", "/codec/encode"])
@pytest.mark.parametrize("framing", ["Content-Length: 70000", "Transfer-Encoding: chunked"])
def test_a_json_body_has_its_time_however_it_comes(
    crowded: SecuredService, good: dict[str, str], path: str, framing: str
) -> None:
    name, value = framing.split(": ")
    part = b"1\r\n \r\n" if value == "chunked" else b" "
    with peers(crowded, 3, PREFIX + path, good | {name: value}) as senders:
        ends = time.monotonic() + BODY_S + 1
        while time.monotonic() < ends:
            for peer in senders:
                peer.send(part)
            time.sleep(0.2)
        assert [peer.status() for peer in senders] == [408] * 3
    until(lambda: crowded.held("json") == 0, "nothing is held")


def test_a_refusal_is_read_by_a_sender_that_reads_only_at_the_end(
    crowded: SecuredService, bad: dict[str, str]
) -> None:
    head = bad | {"Content-Length": str(SIZE)}
    with peers(crowded, 2, f"{PREFIX}/jobs", head, b" "):
        until(lambda: crowded.held("json") == 2 * SIZE, "two bodies have their room")
        body = b" " * (8 * MIB)
        late = Peer(crowded, f"{PREFIX}/jobs", bad | {"Content-Length": str(len(body))}, body)
        assert late.is_open, "the whole body could be sent"
        assert late.status() == 429
        late.close()
        answer = crowded.post("/jobs", content=body, headers=bad)

        check_problem(answer, 429, "rate_limited")
        assert answer.headers["connection"] == "close"
        assert int(answer.headers["retry-after"]) > 0


# -- logins ------------------------------------------------------------------------------------------------


def test_unfinished_logins_need_no_credential_and_hold_little(
    crowded: SecuredService, good: dict[str, str]
) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": "1000"}
    with peers(crowded, 100, "/ui/login", form, b"token=") as senders:
        until(lambda: crowded.held("logins") == BOUNDS["logins"], "the slots of one address are taken")
        calls_of_the_other(crowded, good)
        with httpx.Client(base_url=crowded.url, trust_env=False) as browser:
            page = browser.get("/ui/login").text
            stamp = re.search(r'name="stamp" value="([^"]+)"', page)
            assert stamp
            sent = {"stamp": stamp[1], "token": good["Authorization"].removeprefix("Bearer ")}
            text, cookie = urlencode(sent).encode(), f"kms_login={browser.cookies['kms_login']}"
            length = {"Content-Length": str(len(text)), "Connection": "close"}
            apart = Peer(crowded, "/ui/login", form | length | {"Cookie": cookie})
            time.sleep(0.2)  # as a browser may send it
            apart.send(text)
            assert apart.status() == 303
            apart.close()
            assert browser.post("/ui/login", data=sent).status_code == 303
        statuses = Counter(peer.status() for peer in senders)

    assert statuses == {408: BOUNDS["logins"], 429: 100 - BOUNDS["logins"]}
    until(lambda: crowded.held("logins") == 0, "nothing is held")


# -- event streams -----------------------------------------------------------------------------------------


def test_event_streams_of_one_token(
    crowded: SecuredService, bad: dict[str, str], good: dict[str, str]
) -> None:
    path = f"{PREFIX}/jobs/events"
    with peers(crowded, 200, path, bad) as senders:
        statuses = Counter(peer.begun() for peer in senders)
        assert crowded.held("streams") == BOUNDS["streams"]
        calls_of_the_other(crowded, good)
        with peers(crowded, 5, path, good) as others:
            assert [peer.begun() for peer in others] == [200] * 5
    assert statuses == {200: BOUNDS["streams"], 429: 200 - BOUNDS["streams"]}
    until(lambda: crowded.held("streams") == 0, "streams end with their readers")


def test_waits_of_one_token(crowded: SecuredService, bad: dict[str, str], good: dict[str, str]) -> None:
    """They share the slots of event streams; one without a slot is answered at once."""

    def waiting(who: dict[str, str]) -> str:
        body = {"kind": "encrypt", "items": [{"plaintext": ""}], "context": "only=this"}
        answer = crowded.post("/jobs", body, headers=who)
        assert answer.status_code == 202, answer.text
        return f"{PREFIX}/jobs/{answer.json()['job_id']}?wait=60"

    crowded.kill("worker")  # so that jobs stay queued, and waits open
    try:
        path = waiting(bad)
        with peers(crowded, BOUNDS["streams"], path, bad):
            until(lambda: crowded.held("streams") == BOUNDS["streams"], "they wait")
            job = crowded.http.get(path, headers=bad, timeout=20)
            assert (job.json()["state"], job.headers["retry-after"]) == ("queued", "1")
            calls_of_the_other(crowded, good)
            with peers(crowded, 5, waiting(good), good):
                until(lambda: crowded.held("streams") == BOUNDS["streams"] + 5, "the other waits too")
        until(lambda: crowded.held("streams") == 0, "waits end with their callers")
    finally:
        crowded.start("worker")


# -- answers that are not taken ----------------------------------------------------------------------------


def result_of(service: SecuredService, who: dict[str, str], data: bytes) -> str:
    """The path of the result of an upload."""
    answer = service.post("/files/encrypt", content=data, headers=who | CONTEXT)
    assert answer.status_code == 202, answer.text
    path = f"/jobs/{answer.json()['job_id']}"
    until(lambda: service.get(path, headers=who).json()["state"] == "succeeded", "the job has ended")
    return f"{PREFIX}{path}/result"


def test_readers_that_take_nothing(
    crowded: SecuredService, bad: dict[str, str], good: dict[str, str]
) -> None:
    data = os.urandom(24 * MIB)
    slow, other = result_of(crowded, bad, data), result_of(crowded, good, data)
    with peers(crowded, 40, slow, bad) as readers:
        statuses = Counter(peer.begun() for peer in readers)
        assert statuses == {200: BOUNDS["downloads"], 429: 40 - BOUNDS["downloads"]}
        assert crowded.held("downloads") == BOUNDS["downloads"]
        calls_of_the_other(crowded, good)
        assert len(crowded.http.get(other, headers=good).content) > len(data)
        until(lambda: crowded.held("downloads") == 0, "they are given up")


def test_a_slow_reader_that_goes_on_gets_everything(crowded: SecuredService, good: dict[str, str]) -> None:
    data = os.urandom(8 * MIB)
    path = result_of(crowded, good, data)

    size, began = 0, time.monotonic()
    with crowded.http.stream("GET", path, headers=good) as answer:
        for piece in answer.iter_raw(400_000):
            size += len(piece)
            time.sleep(0.3)  # longer than the grace, over all

    assert size == int(answer.headers["content-length"]) > len(data)
    assert time.monotonic() - began > GRACE_S


def test_an_answer_at_once_that_nobody_takes_ends_its_connection(
    crowded: SecuredService, good: dict[str, str]
) -> None:
    item = {"plaintext": b64(bytes(2000))}
    body = json.dumps({"operation": "encrypt", "items": [item] * 1000}).encode()
    head = good | {"Content-Length": str(len(body))}
    with peers(crowded, 3, f"{PREFIX}/batch", head, body) as readers:
        for peer in readers * 4:  # the kernel takes some of them
            peer.ask(f"{PREFIX}/batch", head, body)
        until(lambda: all(map(Peer.has_ended, readers)), "they are given up")
        until(lambda: crowded.held("json") == 0, "nothing is held of them")


# -- nothing is kept -----------------------------------------------------------------------------------------

ABORTED: Final[Sequence[tuple[str, dict[str, str], bytes]]] = (
    ("/encrypt", {"Content-Length": "1000"}, b"{"),
    ("/encrypt", {"Transfer-Encoding": "chunked"}, b"1\r\n{\r\n"),
    ("/jobs", {"Content-Length": "100000"}, b""),
    ("/files/encrypt", {"Content-Length": "1000"}, b"x"),
    ("/files/decrypt", {"Transfer-Encoding": "chunked"}, b"1\r\nx\r\n"),
    ("/jobs?kind=encrypt", {"Content-Length": "1000", "Content-Type": "application/x-ndjson"}, b"{"),
)


def test_a_thousand_aborted_bodies_leave_nothing(
    crowded: SecuredService, bad: dict[str, str], good: dict[str, str]
) -> None:
    for number in range(1000):
        path, headers, body = ABORTED[number % len(ABORTED)]
        peer = Peer(crowded, PREFIX + path, (good if number % 2 else bad) | headers, body)
        if number % 3:
            time.sleep(0.002)
        peer.close()

    idle: Callable[[], bool] = lambda: all(crowded.held(name) == 0 for name in BOUNDS)  # noqa: E731 -- a fact
    until(idle, "all counters are zero")
    calls_of_the_other(crowded, good)
    until(idle, "they are again")
    assert crowded.output("api").count("crashed") == 0
