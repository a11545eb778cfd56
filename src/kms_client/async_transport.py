"""The transport of AsyncClient, for asyncio and trio: connections of httpcore2, the layer below httpx2."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Final, TypeVar
from urllib.parse import SplitResult

import anyio.to_thread
import httpcore2

from kms_client.http_client import (
    KEPT_S,
    MOST_KEPT,
    HttpRequest,
    broken_error,
    connect_error,
    timeout_error,
)
from kms_client.settings import ClientSettings, credentials_of

T = TypeVar("T")
P = TypeVar("P")
BROKEN: Final = (
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
    httpcore2.UnsupportedProtocol,
)


@contextlib.contextmanager
def transport_errors(url: str) -> Iterator[None]:
    """Convert exceptions of httpcore2 to ServiceUnreachable."""
    try:
        yield
    except httpcore2.ConnectError as exc:
        raise connect_error(url, exc) from exc
    except httpcore2.TimeoutException as exc:
        raise timeout_error(url) from exc
    except BROKEN as exc:
        raise broken_error(url) from exc


def _of_httpcore(proxy: SplitResult | None) -> httpcore2.Proxy | None:
    if proxy is None:
        return None
    host = proxy.netloc.rpartition("@")[2]
    return httpcore2.Proxy(f"{proxy.scheme}://{host}", auth=credentials_of(proxy))


class AsyncAnswer:
    """An answer of httpcore2."""

    def __init__(self, response: httpcore2.Response, url: str) -> None:
        self._response, self._url = response, url
        self.status = response.status
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers
        }

    async def chunks(self) -> AsyncGenerator[bytes]:
        with transport_errors(self._url):
            async for chunk in self._response.aiter_stream():
                yield chunk

    async def close(self) -> None:
        with transport_errors(self._url):
            await self._response.aclose()


class AsyncTransport:
    """Runs on asyncio or trio, as its caller does. Raises ConfigurationError for unusable settings."""

    def __init__(self, settings: ClientSettings) -> None:
        self._url = settings.url
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=settings.tls(),
            proxy=_of_httpcore(settings.proxy()),
            max_connections=100,
            max_keepalive_connections=MOST_KEPT,
            keepalive_expiry=KEPT_S,
        )

    async def open(self, request: HttpRequest) -> AsyncAnswer:
        timeouts = dict.fromkeys(("connect", "write", "pool"), request.timeout_s)
        sent = httpcore2.Request(
            request.method,
            request.url,
            headers=list(request.headers.items()),
            content=request.body,
            extensions={"timeout": {**timeouts, "read": request.silence_s}},
        )
        with transport_errors(self._url):
            return AsyncAnswer(await self._pool.handle_async_request(sent), self._url)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def call(self, work: Callable[[P], T], given: P) -> T:
        return await anyio.to_thread.run_sync(work, given)

    async def body(self, parts: Iterator[bytes]) -> AsyncIterator[bytes]:
        while part := await anyio.to_thread.run_sync(next, parts, b""):
            yield part

    async def shut(self) -> None:
        await self._pool.aclose()
