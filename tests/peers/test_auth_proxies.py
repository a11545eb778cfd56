"""The client's address behind nginx and HAProxy, configured as docs/auth.md says."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest

from kms_protocol.wire import PREFIX
from support.credentials import SecuredService, bearer
from support.ports import free_port
from support.programs import program, running
from support.waiting import answers

DOCS: Final = (Path(__file__).parents[2] / "docs/auth.md").read_text()
CLIENT: Final = "127.0.0.5"
OTHER: Final = "127.0.0.6"
FORGED: Final = "203.0.113.66"


def snippet(language: str) -> str:
    found = re.search(rf"```{language}\n(.+?)```", DOCS, re.DOTALL)
    assert found
    return found[1]


def nginx(folder: Path, port: int, upstream: int, *, more: str = "$remote_addr") -> list[str]:
    """The command of an nginx that listens at ``port``."""
    location = snippet("nginx").replace("8082", str(upstream)).replace("$remote_addr", more)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"pid {folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{temporary}"
        f"server {{\nlisten 127.0.0.1:{port};\n{location}}}\n}}\n"
    )
    return [program("nginx"), "-c", str(config), "-p", str(folder), "-g", "daemon off; master_process off;"]


def haproxy(folder: Path, port: int, upstream: int) -> list[str]:
    """The command of a HAProxy that listens at ``port``."""
    config = folder / "haproxy.cfg"
    times = "defaults\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n"
    text = snippet("haproxy").replace("8443", str(port)).replace("8082", str(upstream))
    config.write_text(times + text)
    return [program("haproxy"), "-f", str(config), "-db"]


@contextmanager
def proxied(folder: Path, service: SecuredService, kind: str) -> Iterator[str]:
    """The service behind one proxy, or behind HAProxy and then nginx."""
    to = service.port
    with ExitStack() as proxies:
        for name in ("nginx", "haproxy"):
            if kind not in {name, "both"}:
                continue
            (own := folder / name).mkdir()
            port = free_port()
            if name == "haproxy":
                argv = haproxy(own, port, to)
            else:
                more = "$proxy_add_x_forwarded_for" if kind == "both" else "$remote_addr"
                argv = nginx(own, port, to, more=more)
            is_up = partial(answers, f"http://127.0.0.1:{port}/livez")
            proxies.enter_context(running(argv, own / "proxy.log", is_up))
            to = port
        yield f"http://127.0.0.1:{to}"


def sources(service: SecuredService) -> set[str]:
    """The source addresses in the audit log."""
    lines = [
        json.loads(line)
        for path in (service.state / "audit").rglob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return {line["source"] for line in lines if line.get("source")}


@pytest.mark.parametrize("kind", ["nginx", "haproxy", "both"])
def test_a_client_cannot_choose_its_address_behind_a_proxy(tmp_path: Path, kind: str) -> None:
    settings = (
        '[kms.auth]\nmode = "required"\nfailures_per_minute = 3\n'
        '[kms.server]\ntrusted_proxies = ["127.0.0.1/32"]\n'
    )
    with SecuredService(tmp_path / "install", settings, "unix:///nonexistent.sock") as own:
        own.start("api")
        with proxied(tmp_path, own, kind) as url:
            codes = {
                address: failing(url, address, own.token_header("status")) for address in (CLIENT, OTHER)
            }
            metrics = httpx.get(f"{url}/metrics", trust_env=False).status_code

    assert set(codes) == {CLIENT, OTHER}
    assert all(each == [401, 401, 401, 429, 200] for each in codes.values())
    assert sources(own) - {"127.0.0.1"} == {CLIENT, OTHER}
    assert FORGED not in own.output("api")
    assert metrics == 401


def failing(url: str, address: str, good: dict[str, str]) -> list[int]:
    """The answers to four failed attempts from an address, each with forged headers, and to a good one."""
    transport = httpx.HTTPTransport(local_address=address)
    codes = []
    with httpx.Client(base_url=url, transport=transport) as http:
        for number in range(4):
            forged = f"{FORGED}, 198.51.100.{number}"
            headers = {"X-Forwarded-For": forged, "Forwarded": f"for={FORGED}", **bearer("kms_bad")}
            codes.append(http.get(f"{PREFIX}/status", headers=headers).status_code)
        codes.append(http.get(f"{PREFIX}/status", headers=good).status_code)
    return codes


@pytest.mark.parametrize("kind", ["nginx", "haproxy", "both"])
def test_an_upload_goes_through_a_proxy(tmp_path: Path, kind: str) -> None:
    data = bytes(5_000_000)
    with SecuredService(tmp_path / "install") as own:
        own.start("api")
        with proxied(tmp_path, own, kind) as url:
            made = httpx.post(
                f"{url}{PREFIX}/files/encrypt", content=data, headers=own.token_header("*"), trust_env=False
            )

    assert made.status_code == 202, made.text
