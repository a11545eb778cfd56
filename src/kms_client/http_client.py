"""What the client's flows need of a transport, and what httpcore raises as errors of ours; knows no request.

The flows (engine.py, watch.py, aio.py) are written once, as coroutines over ``Transport``. The async
transport (aio.py) really awaits. The sync one (sync.py) has coroutines that never suspend, so ``run``
finishes each in one step, without an event loop: the sync client is the same code as the async one.

httpcore is what httpx is made of, and all of it that is needed here: loading httpx as well would double the
time that a short command takes to start.
"""

import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, TypedDict, TypeVar

import httpcore

from kms_client.problems import ServiceUnreachable
from kms_client.settings import ClientSettings

T = TypeVar("T")
P = TypeVar("P")

SILENCE_S: Final = 60.0  # whoever was silent for a whole timeout is not asked again at once
KEPT_S: Final = 5.0  # an idle connection
BROKEN: Final = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
)
CA_HINT: Final = "name the authority that signed the server's certificate with SSL_CERT_FILE or ca_file"


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The head of an answer; names of headers are in lower case. The body is read with its transport."""

    status: int
    headers: Mapping[str, str]
    raw: httpcore.Response = field(repr=False)

    @classmethod
    def of(cls, raw: httpcore.Response) -> "AnswerHead":
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw.headers}
        return cls(raw.status, headers, raw)


class Transport(Protocol):
    """One connection pool. Whatever httpcore raises becomes an error of ours; see ``transport_errors``."""

    async def open(self, request: httpcore.Request) -> AnswerHead:
        """Send, and return when the head of the answer has arrived. The caller closes it."""

    async def read(self, answer: AnswerHead) -> bytes:
        """The rest of the body."""

    def chunks(self, answer: AnswerHead) -> AsyncGenerator[bytes]:
        """The rest of the body as it comes."""

    async def close(self, answer: AnswerHead) -> None:
        """Give the connection back, or drop it when the body was not read to its end."""

    async def sleep(self, seconds: float) -> None:
        """Wait, and let others run where there are others."""

    async def call(self, work: Callable[[P], T], given: P) -> T:
        """Run blocking file work without stopping the event loop."""

    def body(self, pieces: Iterator[bytes]) -> Iterator[bytes] | AsyncIterator[bytes]:
        """A request body of these pieces."""

    async def shut(self) -> None:
        """Close every connection."""


class PoolOptions(TypedDict):
    """What both kinds of pool are made with."""

    ssl_context: ssl.SSLContext
    proxy: httpcore.Proxy | None
    max_connections: int
    max_keepalive_connections: int
    keepalive_expiry: float


def pool_options(settings: ClientSettings) -> PoolOptions:
    """Raises ConfigurationError if certificates or the proxy cannot be used."""
    proxy = settings.proxy()
    return PoolOptions(
        ssl_context=settings.tls(),
        proxy=None if proxy is None else httpcore.Proxy(proxy.url, auth=proxy.credentials),
        max_connections=100,
        max_keepalive_connections=20,
        keepalive_expiry=KEPT_S,
    )


@contextlib.contextmanager
def transport_errors(url: str) -> Iterator[None]:
    """Whatever httpcore raises, as an error of ours."""
    try:
        yield
    except httpcore.ConnectError as exc:
        if "CERTIFICATE_VERIFY_FAILED" in str(exc):
            raise ServiceUnreachable(f"The certificate of {url} is not trusted", hint=CA_HINT) from exc
        raise ServiceUnreachable(f"Nothing answers at {url}") from exc
    except httpcore.TimeoutException as exc:
        raise ServiceUnreachable(f"No answer from {url} in time", retry_after_s=SILENCE_S) from exc
    except BROKEN as exc:
        raise ServiceUnreachable(f"The connection to {url} broke") from exc
