"""The worker's metrics port: how often the metrics are read, and when it is ready."""

import asyncio
import threading
from collections.abc import Callable
from typing import Final

import pytest

from kms_core.auth.authenticator import MetricsAccess
from kms_core.auth.policy import AllowAll
from kms_core.observability import metrics
from kms_core.proxies import Proxies
from kms_worker.metrics_server import MetricsApp

SCRAPES: Final = 50
SCOPE: Final = {
    "type": "http",
    "method": "GET",
    "path": "/metrics",
    "headers": [(b"host", b"localhost")],
    "server": ("127.0.0.1", 9091),
    "client": ("127.0.0.1", 40000),
}


def _app(is_ready: Callable[[], bool]) -> MetricsApp:
    access = MetricsAccess("open", None, AllowAll(), Proxies(()))
    return MetricsApp(access, (), is_ready)


async def _scraped(app: MetricsApp) -> bytes:
    """The body of one answer."""
    sent: list[bytes] = []

    async def send(message: dict[str, object]) -> None:
        body = message.get("body", b"")
        assert isinstance(body, bytes)
        sent.append(body)

    async def receive() -> dict[str, object]:
        return {"type": "http.request"}

    await app(SCOPE, receive, send)  # type: ignore[arg-type]  # ASGI as plain dicts
    return b"".join(sent)


def test_scrapes_that_wait_share_one_reading_that_began_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks a thousand times and reads nothing would keep the port busy for half a minute."""
    readings = 0
    begun, free = threading.Event(), threading.Event()

    def exposition(_: object) -> bytes:
        nonlocal readings
        readings += 1
        number = readings
        begun.set()
        free.wait(30)
        return b"%d" % number

    async def scrapes() -> list[bytes]:
        app = _app(lambda: True)
        first = asyncio.create_task(_scraped(app))
        await asyncio.to_thread(begun.wait, 30)
        others = [asyncio.create_task(_scraped(app)) for _ in range(SCRAPES)]
        await asyncio.sleep(0.01)
        others[0].cancel()  # its client has gone: the others are answered
        free.set()
        return [await first, *await asyncio.gather(*others[1:])]

    monkeypatch.setattr(metrics, "exposition", exposition)

    assert asyncio.run(scrapes()) == [b"1", *[b"2"] * (SCRAPES - 1)]


@pytest.mark.parametrize(("ready", "status"), [(False, 503), (True, 200)])
def test_a_worker_is_ready_once_it_takes_jobs(ready: bool, status: int) -> None:
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(_app(lambda: ready)(SCOPE | {"path": "/readyz"}, None, send))  # type: ignore[arg-type]  # as above

    assert sent[0]["status"] == status
