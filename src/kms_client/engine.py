"""From a Call to its answer over a Transport, with bounded retries; knows no single call.

Retries are safe: a call whose effect would come twice is not repeated (``ClientRequest.repeatable``), a
submission carries its Idempotency-Key, and a streamed body is repeated only when its source can be read
again.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final, TypeVar
from urllib.parse import urlsplit

import httpcore

from kms_client.http_client import AnswerHead, Transport
from kms_client.problems import RETRYABLE, Reply, ServiceUnreachable, error_of
from kms_client.requests import ClientRequest
from kms_client.settings import ClientSettings
from kms_client.transfer import Download, Upload
from kms_protocol import __version__
from kms_protocol.errors import KmsError

T = TypeVar("T")

LONGEST_WAIT_S: Final = 10.0
_SHORTEST_SILENCE_S: Final = 0.05


class Engine:
    """Requests, answers, retries. Raises the KmsError of a problem, ServiceUnreachable without an answer."""

    def __init__(self, settings: ClientSettings, transport: Transport) -> None:
        self._settings = settings
        self._always = {
            "Host": urlsplit(settings.url).netloc,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": f"kms-client/{__version__}",
        }
        self.transport = transport

    async def send(self, call: ClientRequest[T], upload: Upload | None = None) -> T:
        """The answer, after up to ``retries`` further attempts within ``deadline_s``."""
        failed, until = 0, self._deadline()
        while True:
            try:
                reply = await self.exchange(call, upload, self._silence_s(until))
                delay_s = _told_to_wait(call, reply)
                if delay_s is None:
                    return call.read(reply)
                error: KmsError = error_of(reply)
            except ServiceUnreachable as exc:
                error, delay_s = exc, exc.retry_after_s * 2**failed
            if not call.repeatable or (upload is not None and not upload.rewind()):
                raise error
            if time.monotonic() + delay_s >= until:
                raise error
            await self.pause(error, delay_s, failed)
            failed += 1

    def _deadline(self) -> float:
        """When the last attempt may begin, as time.monotonic tells it."""
        return time.monotonic() + (self._settings.deadline_s or float("inf"))

    def _silence_s(self, until: float) -> float:
        return max(_SHORTEST_SILENCE_S, min(self._settings.timeout_s, until - time.monotonic()))

    async def pause(self, error: KmsError, delay_s: float, failed: int) -> None:
        """Wait before another attempt, or raise the error when there shall be none."""
        if failed >= self._settings.retries or delay_s > LONGEST_WAIT_S:
            raise error
        await self.transport.sleep(delay_s)

    async def exchange(
        self, call: ClientRequest[T], upload: Upload | None = None, silence_s: float | None = None
    ) -> Reply:
        """One attempt, one whole answer."""
        async with self.responding(call, upload=upload, silence_s=silence_s) as answer:
            return await self._reply(answer)

    @contextlib.asynccontextmanager
    async def responding(
        self, call: ClientRequest[T], *, upload: Upload | None = None, silence_s: float | None = None
    ) -> AsyncIterator[AnswerHead]:
        """One attempt; the answer's head has arrived, its body is still to be read."""
        answer = await self.transport.open(self._request(call, upload, silence_s))
        try:
            yield answer
        finally:
            await self.transport.close(answer)

    async def stream(self, call: ClientRequest[T]) -> AsyncGenerator[bytes]:
        """The body of one answer as it comes."""
        async with self.responding(call) as answer:
            if not call.is_answer(answer.status):
                raise error_of(await self._reply(answer))
            async with contextlib.aclosing(self.transport.chunks(answer)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def fetch(self, call: ClientRequest[T], part: Download) -> None:
        """Fill the target with what one answer brings. Raises ServiceUnreachable if that is not all."""
        async with self.responding(call) as answer:
            if not part.begin(answer.status, answer.headers):
                raise error_of(await self._reply(answer))
            async with contextlib.aclosing(self.transport.chunks(answer)) as chunks:
                async for chunk in chunks:
                    await self.transport.call(part.write, chunk)
        part.end()

    async def _reply(self, answer: AnswerHead) -> Reply:
        return Reply(answer.status, answer.headers, await self.transport.read(answer))

    def _request(
        self, call: ClientRequest[T], upload: Upload | None, silence_s: float | None
    ) -> httpcore.Request:
        settings = self._settings
        timeout_s = settings.timeout_s
        timeouts = {
            "connect": timeout_s,
            "read": silence_s or timeout_s,
            "write": timeout_s,
            "pool": timeout_s,
        }
        headers = {**self._always, **call.headers, **_length(call, upload), **settings.authorization()}
        return httpcore.Request(
            call.method,
            settings.url + call.path,
            headers=list(headers.items()),
            content=call.body if upload is None else self.transport.body(upload.pieces()),
            extensions={"timeout": timeouts},
        )


def _length(call: ClientRequest[T], upload: Upload | None) -> dict[str, str]:
    """How the end of the body is told."""
    if upload is None:
        return {"Content-Length": str(len(call.body or b""))} if call.method == "POST" else {}
    if upload.size_bytes is None:
        return {"Transfer-Encoding": "chunked"}
    return {"Content-Length": str(upload.size_bytes)}


def _told_to_wait(call: ClientRequest[T], reply: Reply) -> float | None:
    """Seconds to wait before another attempt, if the answer invites one."""
    if call.is_answer(reply.status) or reply.status not in RETRYABLE:
        return None
    return reply.retry_after_s()
