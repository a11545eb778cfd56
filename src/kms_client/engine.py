"""From a Call to its answer over a Transport, with bounded retries; knows no single call.

Retries are safe: every JSON call may be repeated (a submit carries its Idempotency-Key), and a streamed
body is repeated only when its source can be read again.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final, TypeVar

import httpx

from kms_client.calls import Call
from kms_client.problems import RETRYABLE, Reply, ServiceUnreachable, error_of
from kms_client.settings import ClientSettings
from kms_client.transfer import Download, Upload
from kms_client.transport import Transport
from kms_core.errors import KmsError

T = TypeVar("T")

LONGEST_WAIT_S: Final = 10.0


class Engine:
    """Requests, answers, retries. Raises the KmsError of a problem, ServiceUnreachable without an answer."""

    def __init__(self, settings: ClientSettings, transport: Transport) -> None:
        self._settings = settings
        self.transport = transport

    async def send(self, call: Call[T], upload: Upload | None = None) -> T:
        """The answer, after up to ``retries`` further attempts."""
        failed = 0
        while True:
            try:
                reply = await self.exchange(call, upload)
                delay_s = _told_to_wait(call, reply)
                if delay_s is None:
                    return call.read(reply)
                error: KmsError = error_of(reply)
            except ServiceUnreachable as exc:
                error, delay_s = exc, exc.retry_after_s * 2**failed
            if not call.repeatable or (upload is not None and not upload.rewind()):
                raise error
            await self.pause(error, delay_s, failed)
            failed += 1

    async def pause(self, error: KmsError, delay_s: float, failed: int) -> None:
        """Wait before another attempt, or raise the error when there shall be none."""
        if failed >= self._settings.retries or delay_s > LONGEST_WAIT_S:
            raise error
        await self.transport.sleep(delay_s)

    async def exchange(self, call: Call[T], upload: Upload | None = None) -> Reply:
        """One attempt, one whole answer."""
        async with self.responding(call, upload=upload) as response:
            return await self._reply(response)

    @contextlib.asynccontextmanager
    async def responding(
        self, call: Call[T], *, upload: Upload | None = None, silence_s: float | None = None
    ) -> AsyncIterator[httpx.Response]:
        """One attempt; the answer's head has arrived, its body is still to be read."""
        response = await self.transport.open(self._request(call, upload, silence_s))
        try:
            yield response
        finally:
            await self.transport.close(response)

    async def stream(self, call: Call[T]) -> AsyncGenerator[bytes]:
        """The body of one answer as it comes."""
        async with self.responding(call) as response:
            if not call.is_answer(response.status_code):
                raise error_of(await self._reply(response))
            async with contextlib.aclosing(self.transport.chunks(response)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def fetch(self, call: Call[T], part: Download) -> None:
        """Fill the target with what one answer brings. Raises ServiceUnreachable if that is not all."""
        async with self.responding(call) as response:
            if not part.begin(response.status_code, response.headers):
                raise error_of(await self._reply(response))
            async with contextlib.aclosing(self.transport.chunks(response)) as chunks:
                async for chunk in chunks:
                    await self.transport.call(part.write, chunk)
        part.end()

    async def _reply(self, response: httpx.Response) -> Reply:
        body = await self.transport.read(response)
        return Reply(response.status_code, dict(response.headers), body)

    def _request(self, call: Call[T], upload: Upload | None, silence_s: float | None) -> httpx.Request:
        settings = self._settings
        headers = {"Accept-Encoding": "identity", **call.headers, **settings.authorization()}
        if upload is not None and upload.size_bytes is not None:
            headers["Content-Length"] = str(upload.size_bytes)
        timeout = httpx.Timeout(settings.timeout_s, read=silence_s or settings.timeout_s)
        return httpx.Request(
            call.method,
            settings.url + call.path,
            headers=headers,
            content=call.body if upload is None else self.transport.body(upload.pieces()),
            extensions={"timeout": timeout.as_dict()},
        )


def _told_to_wait(call: Call[T], reply: Reply) -> float | None:
    """Seconds to wait before another attempt, if the answer invites one."""
    if call.is_answer(reply.status) or reply.status not in RETRYABLE:
        return None
    return reply.retry_after_s()
