"""What the client's flows need of a transport, and what httpx raises as errors of ours; knows no request.

The flows (flows.py) are written once, as coroutines over ``Transport``. The async transport (aio.py)
really awaits. The sync one (sync.py) has coroutines that never suspend, so ``run`` finishes each in one
step, without an event loop: the sync client is the same code as the async one.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Final, Protocol, TypeVar

import httpx

from kms_client.problems import ServiceUnreachable

T = TypeVar("T")
P = TypeVar("P")

SILENCE_S: Final = 60.0  # whoever was silent for a whole timeout is not asked again at once
CA_HINT: Final = "name the authority that signed the server's certificate with SSL_CERT_FILE or ca_file"


class Transport(Protocol):
    """One connection pool. Whatever httpx raises becomes an error of ours; see ``transport_errors``."""

    async def open(self, request: httpx.Request) -> httpx.Response:
        """Send, and return when the head of the answer has arrived. The caller closes it."""

    async def read(self, response: httpx.Response) -> bytes:
        """The rest of the body."""

    def chunks(self, response: httpx.Response) -> AsyncGenerator[bytes]:
        """The rest of the body as it comes."""

    async def close(self, response: httpx.Response) -> None:
        """Give the connection back, or drop it when the body was not read to its end."""

    async def sleep(self, seconds: float) -> None:
        """Wait, and let others run where there are others."""

    async def call(self, work: Callable[[P], T], given: P) -> T:
        """Run blocking file work without stopping the event loop."""

    def body(self, pieces: Iterator[bytes]) -> Iterator[bytes] | AsyncIterator[bytes]:
        """A request body of these pieces."""

    async def shut(self) -> None:
        """Close every connection."""


@contextlib.contextmanager
def transport_errors(url: str) -> Iterator[None]:
    """Whatever httpx raises, as an error of ours."""
    try:
        yield
    except httpx.ConnectError as exc:
        if "CERTIFICATE_VERIFY_FAILED" in str(exc):
            raise ServiceUnreachable(f"The certificate of {url} is not trusted", hint=CA_HINT) from exc
        raise ServiceUnreachable(f"Nothing answers at {url}") from exc
    except httpx.TimeoutException as exc:
        raise ServiceUnreachable(f"No answer from {url} in time", retry_after_s=SILENCE_S) from exc
    except httpx.TransportError as exc:
        raise ServiceUnreachable(f"The connection to {url} broke") from exc
