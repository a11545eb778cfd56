"""Two hosts behind HAProxy, configured as docs/hosts.md says."""

import csv
import re
import shutil
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import httpx2 as httpx
import pytest

from kms_core.programs.liveness import is_alive
from kms_protocol.wire import PREFIX
from support.ports import free_port
from support.programs import program, running
from support.service import CONTEXT, Service, b64
from support.waiting import WAIT_S, until
from support.webhooks import LocalhostTls, make_localhost_tls

DOCS: Final = (Path(__file__).parents[2] / "docs/hosts.md").read_text()
CALLERS: Final = 4
ITEMS: Final = [{"plaintext": b64(b"x")}]


class Host(Service):
    """An API over TLS."""

    def __init__(self, folder: Path, settings: str, redis: str) -> None:
        super().__init__(folder, settings, redis)
        self.url = self.url.replace("http:", "https:")


@dataclass
class Callers:
    """Threads that send requests, each on a connection of its own, until the end of the block."""

    url: str
    context: ssl.SSLContext
    seen: Counter[str] = field(default_factory=Counter)
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(CALLERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def more(self, count: int = 40) -> None:
        """Wait until so many more calls were answered well."""
        before = self.seen["ok"]
        until(lambda: self.seen["ok"] >= before + count, lambda: f"{count} more answers: {self.seen}")

    @property
    def failed(self) -> dict[str, int]:
        return {what: count for what, count in self.seen.items() if what != "ok"}

    def _call(self, caller: int) -> None:
        number = 0
        with httpx.Client(base_url=self.url, verify=self.context, timeout=WAIT_S, trust_env=False) as http:
            while not self._ended.is_set():
                number += 1
                what = self._answer(http, f"{caller}-{number}", number % 3)
                with self._lock:
                    self.seen[what] += 1

    @staticmethod
    def _answer(http: httpx.Client, key: str, kind: int) -> str:
        try:
            if kind == 0:
                answer = http.get(f"{PREFIX}/keys")
            elif kind == 1:
                answer = http.post(f"{PREFIX}/encrypt", json={"plaintext": b64(b"x"), "context": CONTEXT})
            else:
                job = {"kind": "encrypt", "items": ITEMS}
                answer = http.post(f"{PREFIX}/jobs", json=job, headers={"Idempotency-Key": f"key-{key}"})
        except httpx.TransportError as exc:
            return f"{kind}: {type(exc).__name__}"
        return "ok" if answer.is_success else f"{kind}: {answer.status_code}"


@dataclass(frozen=True)
class Balanced:
    one: Host
    two: Host
    url: str
    folder: Path
    context: ssl.SSLContext

    @property
    def log(self) -> str:
        return (self.folder / "haproxy.log").read_text()

    def tell(self, command: str) -> str:
        """The answer of HAProxy's socket."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.folder / "haproxy.sock"))
            line.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: line.recv(65_536), b"")).decode()

    def _statistics(self, name: str) -> dict[str, str]:
        rows = csv.DictReader(self.tell("show stat").removeprefix("# ").splitlines())
        (found,) = (row for row in rows if (row["pxname"], row["svname"]) == ("kms", name))
        return found

    def in_hand(self, name: str) -> int:
        """The requests that a host has."""
        return int(self._statistics(name)["scur"])

    def is_up(self, name: str) -> bool:
        return self._statistics(name)["status"] == "UP"

    def callers(self) -> Callers:
        return Callers(self.url, self.context)

    def get(self, path: str) -> int:
        with httpx.Client(base_url=self.url, verify=self.context, timeout=WAIT_S, trust_env=False) as http:
            return http.get(path).status_code


@pytest.fixture
def balanced(tmp_path: Path, redis_url: str) -> Iterator[Balanced]:
    authority = make_localhost_tls(tmp_path)
    settings = (
        f'[kms.server]\ntls_cert = "{authority.cert_and_key}"\ntls_key = "{authority.cert_and_key}"\n'
        'trusted_proxies = ["127.0.0.1"]\n'
    )
    authority.cert_and_key.chmod(0o600)
    with ExitStack() as stack:
        one = stack.enter_context(Host(tmp_path / "one", settings, redis_url))
        shared = f'{settings}[kms.jobs]\nspool_dir = "{one.spool}"\n'
        two = stack.enter_context(Host(tmp_path / "two", shared, redis_url))
        two.take_keys(one)
        for host in (one, two):
            host.start("api")
        url = stack.enter_context(haproxy(tmp_path, authority, one, two))
        yield Balanced(one, two, url, tmp_path, ssl.create_default_context(cafile=authority.ca_file))


@contextmanager
def haproxy(folder: Path, authority: LocalhostTls, one: Host, two: Host) -> Iterator[str]:
    """The configuration of the page, at other addresses, until the end of the block; its URL."""
    found = re.search(r"```haproxy\n(.+?)```", DOCS, re.DOTALL)
    assert found
    text, port = found[1], free_port()
    for old, new in {
        "/run/haproxy.sock": str(folder / "haproxy.sock"),
        "bind :443": f"bind 127.0.0.1:{port}",
        "/etc/haproxy/kms.pem": str(authority.cert_and_key),
        "/etc/haproxy/kms-ca.pem": str(authority.ca_file),
        "kms.example.com": "localhost",
        "192.0.2.11:8082": f"127.0.0.1:{one.port}",
        "192.0.2.12:8082": f"127.0.0.1:{two.port}",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "haproxy.cfg").write_text(text)
    argv = [program("haproxy"), "-f", folder / "haproxy.cfg", "-db"]
    with running(argv, folder / "haproxy.log", lambda: is_alive("localhost", port, tls=True)):
        yield f"https://localhost:{port}"


def test_no_call_is_lost_by_a_killed_host_but_those_in_hand(balanced: Balanced) -> None:
    with balanced.callers() as callers:
        callers.more()
        balanced.one.kill("api")
        until(lambda: not balanced.is_up("kms-1"), "HAProxy notices that it is gone")
        callers.more(200)
        balanced.one.start("api")
        until(lambda: balanced.is_up("kms-1"), "HAProxy notices that it is back")
        callers.more(200)
        balanced.two.kill("api")  # all calls go to the one that is back
        callers.more(200)

    assert sum(callers.failed.values()) <= 2 * CALLERS, callers.failed
    assert all("Error" in what or what.endswith(("502", "503")) for what in callers.failed), callers.failed


def test_no_call_is_lost_by_a_host_that_is_taken_out_first(balanced: Balanced) -> None:
    with balanced.callers() as callers:
        callers.more()
        for name, host in (("kms-1", balanced.one), ("kms-2", balanced.two)):
            balanced.tell(f"set server kms/{name} state drain")
            until(lambda name=name: balanced.in_hand(name) == 0, f"{name} has no request")  # type: ignore[misc]  # mypy#12557
            host.stop("api")
            callers.more(100)
            host.start("api")
            balanced.tell(f"set server kms/{name} state ready")
            until(lambda name=name: balanced.is_up(name), f"{name} is back")  # type: ignore[misc]  # mypy#12557

    assert callers.failed == {}


def test_hosts_without_keys_are_called_for_what_needs_none(balanced: Balanced) -> None:
    assert balanced.get("/readyz") == 200
    for host in (balanced.one, balanced.two):
        shutil.rmtree(host.state / "age")

    until(lambda: "backend 'kms' has no server" in balanced.log, "no host is ready")

    assert balanced.get(f"{PREFIX}/status") == 200
