"""A client of each kind over one stand-in server, without a proxy; each test runs with both."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import anyio.from_thread
import pytest

from kms_client import AsyncClient, Client
from support.contract_server import ContractServer, running

Connect = Callable[..., Client]


class OnEventLoop:
    """An AsyncClient on an event loop of another thread, with the calls of a Client."""

    def __init__(self, client: AsyncClient, portal: anyio.from_thread.BlockingPortal) -> None:
        self._client = client
        self._portal = portal

    def within(self, deadline_s: float) -> "OnEventLoop":
        return OnEventLoop(self._client.within(deadline_s), self._portal)

    def __getattr__(self, name: str) -> Callable[..., object]:
        async def call(*args: object, **named: object) -> object:
            found = getattr(self._client, name)(*args, **named)
            return [item async for item in found] if hasattr(found, "__anext__") else await found

        return lambda *args, **named: self._portal.call(lambda: call(*args, **named))


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with running() as service:
        yield service


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, server: ContractServer) -> Iterator[Connect]:
    made: list[Client] = []
    with anyio.from_thread.start_blocking_portal() as portal:

        def of(url: str = server.url, **options: Any) -> Client:  # noqa: ANN401  # Options, passed through
            if request.param == "sync":
                made.append(Client(url, **options))
            else:
                made.append(cast("Client", OnEventLoop(AsyncClient(url, **options), portal)))
            return made[-1]

        yield of
        for client in made:
            client.close()


@pytest.fixture
def kms(connect: Connect) -> Client:
    return connect()
