"""Behind a proxy that forwards upgrades, each caller gets the answers to its own requests.

An attacker offers upgrades (``websocket``, ``h2c``) that the service does not take, with bodies that are
requests themselves. A server that drops such a body, or reads it as the next request of the connection, has
the proxy hand answers to the wrong callers, plaintext included (RFC 9110 §7.8, RFC 9112 §11.2).
"""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Final

import pytest

from kms_protocol.wire import PREFIX
from support.ports import free_port, listens
from support.programs import program, running
from support.service import Service, b64, unb64

CALLERS: Final = 4
CALLS: Final = 150  # pairs of encrypt and decrypt by each caller
ATTACKS: Final = 300
LIMIT_S: Final = 20.0  # of one answer: no healthy machine meets it
PAUSE_S: Final = 0.003
OFFERS: Final = ("websocket", "h2c")
ACCEPTED: Final = 202
EXPECTED: Final = (("/files/encrypt", ACCEPTED), ("/encrypt", 422))
"""What a request without an upgrade is answered, whose body is a request in plain text."""

NGINX: Final = """
daemon off; master_process off; worker_processes 1; error_log {folder}/error.log; pid {folder}/nginx.pid;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  upstream kms {{ server 127.0.0.1:{to}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://kms;
      proxy_http_version 1.1;
      proxy_request_buffering off;
      proxy_set_header Host $http_host;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
    }}
  }}
}}
"""
HAPROXY: Final = """
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  http-reuse always
frontend callers
  bind 127.0.0.1:{port}
  default_backend kms
backend kms
  server kms 127.0.0.1:{to}
"""


@contextmanager
def proxy(name: str, folder: Path, to: int) -> Iterator[int]:
    """A proxy before a port of this machine; its own port."""
    port = free_port()
    configuration = folder / f"{name}.conf"
    template = NGINX if name == "nginx" else HAPROXY
    configuration.write_text(template.format(folder=folder, port=port, to=to))
    words = ["-p", str(folder), "-c"] if name == "nginx" else ["-db", "-f"]
    with running([program(name), *words, configuration], folder / f"{name}.log", lambda: listens(port)):
        yield port


@dataclass
class CallerResults:
    """What callers and attacker were answered. Safe for threads: each adds to lists of its own."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)


class Caller(threading.Thread):
    """Encrypts plaintexts of its own, decrypts them again, and looks at each answer."""

    def __init__(self, number: int, port: int) -> None:
        super().__init__(name=f"caller-{number}")
        self.seen = CallerResults()
        self._port = port
        self._connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)

    def run(self) -> None:
        for call in range(CALLS):
            plaintext = f"{self.name} call {call}".encode()
            try:
                sealed = self._post("/encrypt", {"plaintext": b64(plaintext)})["ciphertext"]
                opened = unb64(self._post("/decrypt", {"ciphertext": sealed})["plaintext"])
            except (HTTPException, OSError, ValueError, KeyError) as exc:
                self.seen.wrong.append(f"{type(exc).__name__}: {exc}"[:200])
                self._connection.close()
                continue
            if opened == plaintext:
                self.seen.right += 1
            else:
                self.seen.wrong.append(f"foreign plaintext: {opened!r} instead of {plaintext!r}")
        self._connection.close()

    def _post(self, path: str, body: object) -> dict[str, str]:
        self._connection.request(
            "POST", f"{PREFIX}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise ValueError(f"{answer.status} {content[:120]!r}")
        found: dict[str, str] = json.loads(content)
        return found


def hidden_requests() -> list[bytes]:
    """Bodies that are requests: a quick one, one that encrypts, one that waits for Redis."""
    host = b"Host: 127.0.0.1\r\n"
    body = json.dumps({"plaintext": b64(b"hidden in a body")}).encode()
    head = f"POST {PREFIX}/encrypt HTTP/1.1\r\nContent-Type: application/json\r\n".encode() + host
    return [
        b"GET /livez HTTP/1.1\r\n" + host + b"\r\n",
        head + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        f"GET {PREFIX}/jobs HTTP/1.1\r\n".encode() + host + b"\r\n",
    ]


class Attacker(threading.Thread):
    """Posts requests as bodies and offers an upgrade with each, on a new connection each time.

    As a plain request an upload of any bytes is accepted, and one to encrypt is refused, since it is no JSON.
    Head and body are sent in one segment, or up to 3 ms apart: then the proxy has sent the head on, and the
    server answers it at about the time at which it reads the body.
    """

    def __init__(self, port: int) -> None:
        super().__init__(name="attacker")
        self.seen = CallerResults()
        self.uploads: dict[str, int] = {}
        """Sizes in bytes of what was accepted, by job id."""
        self._port = port

    def run(self) -> None:
        choice = random.Random(4711)  # noqa: S311 -- which attack comes next, no secret
        for attack in range(ATTACKS):
            body, offer = choice.choice(hidden_requests()), OFFERS[attack % 2]
            path, status = EXPECTED[attack // 2 % 2]
            pause_s = None if attack % 8 == 0 else choice.random() * PAUSE_S
            try:
                answered, content = self._post(path, body, offer, pause_s)
            except (HTTPException, OSError) as exc:
                self.seen.wrong.append(f"{path} {offer}: {type(exc).__name__}")
                continue
            if answered != status:
                self.seen.wrong.append(f"{path} {offer}: {answered} {content[:80]!r}")
                continue
            self.seen.right += 1
            if status == ACCEPTED:
                self.uploads[json.loads(content)["job_id"]] = len(body)

    def _post(self, path: str, body: bytes, offer: str, pause_s: float | None) -> tuple[int, bytes]:
        extra = b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n" if offer == "h2c" else b""
        connection = b"Upgrade, HTTP2-Settings" if offer == "h2c" else b"Upgrade"
        head = (
            f"POST {PREFIX}{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Upgrade: {offer}\r\n"
        ).encode() + b"Connection: %s\r\n%sContent-Length: %d\r\n\r\n" % (connection, extra, len(body))
        with socket.create_connection(("127.0.0.1", self._port), timeout=LIMIT_S) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if pause_s is None:
                link.sendall(head + body)
            else:
                link.sendall(head)
                time.sleep(pause_s)
                link.sendall(body)
            answer = HTTPResponse(link, method="POST")
            answer.begin()
            return answer.status, answer.read()


@pytest.fixture
def attacked(tmp_path: Path) -> Iterator[Service]:
    """An API of its own: what its connections hold afterwards is of no use to other tests."""
    with Service(tmp_path) as service:
        yield service.start("api")


def meet(port: int, attacker: Attacker) -> CallerResults:
    """What honest callers saw beside an attacker."""
    callers = [Caller(number, port) for number in range(CALLERS)]
    for thread in (*callers, attacker):
        thread.start()
    for thread in (*callers, attacker):
        thread.join()
    wrong = [text for caller in callers for text in caller.seen.wrong]
    return CallerResults(sum(caller.seen.right for caller in callers), wrong)


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_callers_beside_an_attacker_get_their_own_answers(
    attacked: Service, tmp_path: Path, name: str
) -> None:
    with proxy(name, tmp_path, attacked.port) as port:
        attacker = Attacker(port)
        seen = meet(port, attacker)

    assert Counter(seen.wrong) == Counter()
    assert seen.right == CALLERS * CALLS
    assert Counter(attacker.seen.wrong) == Counter()
    assert attacker.seen.right == ATTACKS
    told = {job_id: attacked.job(job_id)["progress"]["bytes"] for job_id in attacker.uploads}
    assert told == attacker.uploads


@pytest.mark.parametrize(("path", "status"), EXPECTED)
def test_what_is_expected_is_what_plain_requests_get(attacked: Service, path: str, status: int) -> None:
    for body in hidden_requests():
        headers = {"Content-Type": "application/json"}
        assert attacked.post(path, content=body, headers=headers).status_code == status
