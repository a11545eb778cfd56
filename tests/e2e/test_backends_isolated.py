"""Backends do not hold each other up, and a bulk job asks one of them a few times, whatever its items."""

import re
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest

from support.openbao import bao
from support.service import Service, b64
from support.waiting import until

CALLS: Final = 64
ITEMS: Final = 10_000


@pytest.fixture
def silent() -> Iterator[tuple[str, list[socket.socket]]]:
    """A server that takes connections and never says a word, and the connections that it has."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=CALLS * 2) as listener:

        def accept() -> None:
            try:
                while True:
                    taken.append(listener.accept()[0])
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", taken
        listener.shutdown(socket.SHUT_RDWR)
    for connection in taken:
        connection.close()


def test_calls_on_age_are_answered_while_another_backend_hangs(
    tmp_path: Path, redis_url: str, silent: tuple[str, list[socket.socket]]
) -> None:
    url, connections = silent
    settings = (
        f'[kms.keys]\npayroll = "transit:payroll"\n[kms.transit]\naddress = "{url}"\ntimeout_s = 120.0\n'
        'token = "unused"\n'
    )
    with Service(tmp_path, settings, redis_url) as service, ThreadPoolExecutor(CALLS) as pool:
        service.start("api")
        one = {"plaintext": b64(b"x"), "key_id": "payroll"}
        many = {"operation": "encrypt", "items": [one] * 3}
        for _ in range(CALLS // 2):
            pool.submit(_give_up_at_the_end, f"{service.url}/api/v1/kms/encrypt", one)
            pool.submit(_give_up_at_the_end, f"{service.url}/api/v1/kms/batch", many)
        until(lambda: connections, "calls hang at the silent backend")

        for _ in range(200):
            assert service.decrypt(service.encrypt(b"salary")) == b"salary"
        answer = service.post(
            "/batch", {"operation": "encrypt", "items": [{"plaintext": b64(b"salary")}] * 3}
        )
        sealed = [item["ciphertext"] for item in answer.json()["results"]]
        answer = service.post(
            "/batch", {"operation": "decrypt", "items": [{"ciphertext": c} for c in sealed]}
        )
        assert [item["plaintext"] for item in answer.json()["results"]] == [b64(b"salary")] * 3
        assert service.get("/health").json()["backend"] == "age"
        service.kill("api")


def _give_up_at_the_end(url: str, body: Mapping[str, object]) -> None:
    try:
        httpx.post(url, json=body, timeout=120, trust_env=False)
    except httpx.TransportError:
        return


def test_ten_thousand_items_cost_a_peer_some_dozens_of_calls(tmp_path: Path, redis_url: str) -> None:
    server = bao()
    settings = f'dev_backend = "transit"\n{server.settings()}key_name = "{server.new_key()}"\n'
    with Service(tmp_path, settings, redis_url) as service:
        service.start()
        items = [{"plaintext": b64(b"%d" % n), "context": f"row={n}"} for n in range(ITEMS)]
        service.wait(service.submit({"kind": "encrypt", "items": items}), "succeeded")
        text = httpx.get(f"http://127.0.0.1:{service.port + 1}/metrics", trust_env=False).text

    calls = re.findall(
        r'^kms_backend_duration_seconds_count\{.*call="wrap".*\} ([\d.]+)$', text, re.MULTILINE
    )
    assert 0 < sum(map(float, calls)) <= ITEMS / 100
